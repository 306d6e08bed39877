"""What models compute in here: float32, on the CPU, with weights of their own, however they were stored or trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from aropt.errors import UsageError

HALVES = (torch.bfloat16, torch.float16)
CASTS = ("aten::to", "aten::_to_copy", "aten::type_as")


def owned(module: nn.Module) -> nn.Module:
    """A copy of a caller's module that shares nothing with it: float32, in eval mode, without gradients.

    Raises UsageError for a module that Python can't copy.
    """
    memo: dict[int, Any] = {id(p.grad): None for p in module.parameters() if p.grad is not None}
    for part in module.modules():
        held = [v for v in vars(part).values() if isinstance(v, Tensor) and not v.is_leaf]
        memo |= {id(v): v.detach().clone() for v in held}  # what hooks computed: torch copies leaves alone
    try:
        made = copy.deepcopy(module, memo)
    except Exception as error:  # an attribute of the user's may raise anything
        raise UsageError(
            what=f"the module {type(module).__name__} can't be copied",
            why=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}",
            hint="give a function that makes it, as file.py:function, or take what can't be copied out of the module",
        ) from error
    return made.to("cpu").float().eval().requires_grad_(False)


def single(value: Any) -> Any:
    """float32 for a dtype of 16 bits."""
    return torch.float32 if isinstance(value, torch.dtype) and value in HALVES else value


def needless(node: fx.Node) -> bool:
    """Whether a cast from or to 16 bits does nothing once both are float32."""
    kind = node.target.name().split(".")[0] if isinstance(node.target, torch._ops.OpOverload) else ""
    if kind not in CASTS:
        return False
    found = [n.meta["val"].dtype for n in (node.args[0], node) if isinstance(n, fx.Node)]
    return any(d in HALVES for d in found) and len({single(d) for d in found}) == 1
