"""Ops that capture replaces at once: those that torch can't trace with symbolic sizes, or that hide a product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def baddbmm(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """torch.baddbmm as a product and a sum."""
    product = torch.bmm(left, right)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


def einsum(equation: str, operands: list[Tensor], *, path: Any = None) -> Tensor:
    """torch.einsum of two operands as one matmul: axes [shared, kept of the left, summed] x [shared, summed, kept].

    Anything else (one operand, three, an ellipsis, a repeated letter) stays an einsum.
    """
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not arrow or "." in equation or any(len(set(t)) != len(t) for t in (*terms, result)):
        return NotImplemented  # type: ignore[no-any-return]
    a, b = terms
    if any(c not in result and (c not in a or c not in b) for c in a + b):
        return NotImplemented  # type: ignore[no-any-return]
    shared = [c for c in a if c in b and c in result]
    summed = [c for c in a if c in b and c not in result]
    left, right = [c for c in a if c not in b], [c for c in b if c not in a]
    sizes = dict(zip(a, operands[0].shape)) | dict(zip(b, operands[1].shape))

    def arranged(x: Tensor, term: str, groups: tuple[list[str], list[str]]) -> Tensor:
        order = [*shared, *groups[0], *groups[1]]
        x = x.permute([term.index(c) for c in order])
        return x if as_is or len(groups[0]) == len(groups[1]) == 1 else x.reshape(*shape(shared), *map(total, groups))

    def shape(letters: list[str]) -> list[Any]:
        return [sizes[c] for c in letters]

    def total(letters: list[str]) -> Any:
        product: Any = 1
        for c in letters:
            product = product * sizes[c]
        return product

    as_is = not shared and len(summed) == len(right) == 1  # a stack of rows times one matrix
    product = arranged(operands[0], a, (left, summed)) @ arranged(operands[1], b, (summed, right))
    if not as_is and (len(left) != 1 or len(right) != 1):
        product = product.reshape(shape([*shared, *left, *right]))
    return product.permute([[*shared, *left, *right].index(c) for c in result])


TABLE: dict[Any, Callable[..., Any]] = {
    aten.baddbmm.default: baddbmm,
    aten.einsum.default: einsum,
}
