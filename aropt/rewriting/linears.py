"""Linear layers in a graph, however they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


@dataclass(frozen=True)
class Layer:
    """A product of `x` with the rows of a weight, or with its columns if it is `turned`. All but `turned` are nodes."""

    x: Any
    weight: Any
    bias: Any
    turned: bool

    def of(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The weight [N, K]."""
        found = weights[str(self.weight.target)]
        return found.T.contiguous() if self.turned else found


def product(node: Any, weights: Mapping[str, Tensor]) -> Any:
    """The Layer that a node is: a linear one, or a product written out, as in GPT-2's Conv1D; None if it is none."""
    if node.op != "call_function" or node.kwargs:
        return None
    match node.target, node.args:
        case (aten.linear.default, (x, weight, *bias)):
            found = Layer(x, weight, bias[0] if bias else None, False)
        case (aten.addmm.default, (bias, x, weight)):
            found = Layer(x, weight, bias, True)
        case ((aten.mm.default | aten.matmul.default), (x, weight)):
            found = Layer(x, weight, None, True)
        case _:
            return None
    fixed = [found.weight] if found.bias is None else [found.weight, found.bias]
    if any(n.op != "get_attr" for n in fixed) or found.x.op == "get_attr":
        return None
    return found if weights[str(found.weight.target)].dim() == 2 else None
