"""Position biases that change with the length by a number for each row of scores, which a softmax takes out.

ALiBi counted from the last token adds slope * (j - T + 1) to the score of column j: with T all of a row's scores move
alike, and their softmax stays. Such a bias is replaced by its difference to its first column, or to the row's own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name
from aropt.restrict.positions import Positions, close

aten = torch.ops.aten

Taken = Callable[[Tensor], Tensor]  # what is subtracted of a bias


def unsteady(graph: fx.Graph, content: set[fx.Node], positions: Positions) -> list[tuple[fx.Node, fx.Node, Taken]]:
    """Biases that change with the length where a steady one gives the same: (user, bias, what to subtract)."""
    found: list[tuple[fx.Node, fx.Node, Taken]] = []
    for node in graph.nodes:
        users = [user for user in node.users if node not in content and is_bias(node, user, content)]
        if not users or steady(positions, node):
            continue
        take = next((t for t in TAKES if steady(positions, node, t)), None)
        found += [(user, node, take) for user in users if take is not None]
    return found


def is_bias(node: fx.Node, user: fx.Node, content: set[fx.Node]) -> bool:
    """Whether a float value with columns is added to the scores of an attention."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() < 2 or user not in content:
        return False
    return op_name(user) == "aten::scaled_dot_product_attention" and bind(user)["attn_mask"] is node


def first(bias: Tensor) -> Tensor:
    """The first column."""
    return bias[..., :1]


def own(bias: Tensor) -> Tensor:
    """Each row's entry for itself."""
    return torch.diagonal(bias, 0, -2, -1).unsqueeze(-1)


TAKES: tuple[Taken, ...] = (first, own)


def steady(positions: Positions, node: fx.Node, take: Taken | None = None) -> bool:
    """Whether the values for shorter sequences, less what `take` says, are parts of the one at full capacity."""

    def value(n: int) -> Tensor:
        bias: Tensor = positions.value(node, n)
        return bias if take is None else bias - take(bias)

    full = value(positions.capacity)
    for n in sorted({min(n, positions.capacity) for n in (1, 5, 12, positions.capacity - 1) if n > 0}):
        short = value(n)
        part = full[tuple(slice(0, s) for s in short.shape)]
        if part.shape != short.shape or part.isnan().any() or not close(part, short):
            return False
    return True


def replace(graph: fx.Graph, user: fx.Node, bias: fx.Node, take: Taken) -> None:
    """Gives `user` the shifted bias."""
    with graph.inserting_before(user):
        call = graph.call_function
        if take is first:
            column = call(aten.slice.Tensor, (bias, -1, 0, 1))
        else:
            column = call(aten.unsqueeze.default, (call(aten.diagonal.default, (bias, 0, -2, -1)), -1))
        new = call(aten.sub.Tensor, (bias, column))
    new.meta["where"] = bias.meta.get("where", "")
    user.replace_input_with(bias, new)
