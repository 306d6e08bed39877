"""Which module loops over the sequence in Python: found by counting, where torch names a size alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """How many ops each module calls itself, by the module's name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.calls = [""], Counter[str]()
        self.hooks = []
        for name, module in model.named_modules():
            self.hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self.stack.append(name)))
            self.hooks.append(module.register_forward_hook(lambda *_: self.leave(), always_call=True))

    def leave(self) -> None:
        self.stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[self.stack[-1]] += 1
        return func(*args, **(kwargs or {}))


def counts(model: nn.Module, ids: torch.Tensor) -> Counter[str]:
    """The calls of a forward, by module."""
    counted = Counted(model)
    try:
        with torch.no_grad(), counted:
            model(ids)
    finally:
        for hook in counted.hooks:
            hook.remove()
    return counted.calls


def looping(model: nn.Module, example: torch.Tensor, capacity: int) -> tuple[str, str] | None:
    """The module that calls the most ops more for longer sequences: (its name and class, how many); None if none does.

    A kernel called once for any length is none of these. The forward itself may fail: that is no module's loop.
    """
    short, long = 3, min(capacity, 80)
    try:
        few, many = (counts(model, example.repeat_interleave(n, 1)[:, :n]) for n in (short, long))
    except Exception:  # of the model's own code, or of a length that it doesn't take
        return None
    grown = {name: many[name] - few[name] for name in many if many[name] - few[name] >= 4}
    if not grown:
        return None
    name = max(grown, key=lambda n: grown[n])
    kind = type(model.get_submodule(name)).__name__
    return f"{name} ({kind})", f"it calls {few[name]} ops for {short} tokens and {many[name]} for {long}"
