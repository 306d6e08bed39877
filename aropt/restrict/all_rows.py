"""All rows of a step whose last row alone was computed to the end (`restrict` with rows="last")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.edit import copied
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build

aten = torch.ops.aten
END = 2**63 - 1


def wide(step: Graph, weights: Mapping[str, Tensor]) -> Graph | None:
    """The step with logits [B, R, V] in the place of [B, 1, V], called "verify"; None if that can't be had."""
    graph, after = copied(step.fx), set[fx.Node]()  # after: nodes that read what was the last row alone
    for node in list(graph.nodes):
        if node.target is aten.slice.Tensor and last_row(node):
            after |= set(node.users)
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node in after:
            after |= set(node.users)
            if node.target in (aten.reshape.default, aten.expand.default) and not widened(graph, node):
                return None
    try:
        made = build("verify", graph, step.inputs, list(step.outputs), weights)
    except Exception:  # of shape propagation: a later shape holds one row
        return None
    return made if made.outputs["logits"].dims[:2] == ("B", "R") else None


def last_row(node: fx.Node) -> bool:
    """Whether a slice takes the last of an axis whose size is not known, which is that of rows."""
    source, axis, *rest = node.args
    assert isinstance(source, fx.Node) and isinstance(axis, int)
    return rest == [-1, END] and not isinstance(shape(source)[axis], int)


def shape(node: fx.Node) -> Sequence[Any]:
    """Its sizes, as they were for the last row alone."""
    return tuple(node.meta["val"].shape)


def widened(graph: fx.Graph, node: fx.Node) -> bool:
    """Gives a reshape all rows in the place of its one size of 1; one that changes nothing goes. Whether it is so."""
    source, sizes = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(sizes, (list, tuple))
    before, now = shape(source), shape(node)
    pairs = zip(before, now, strict=False)
    if len(before) == len(now) and all(str(a) == str(b) or (b == 1 and not isinstance(a, int)) for a, b in pairs):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return True
    if node.target is aten.expand.default and len(before) == len(now):
        node.args = (source, [-1 if str(a) == str(b) else size for a, b, size in zip(before, now, sizes, strict=True)])
        return True
    if node.target is not aten.reshape.default or -1 not in sizes:
        return False
    if 1 not in sizes:  # rows are part of the axis that takes what is left
        return True
    second = list(sizes[:2]) == [-1, 1] and (not isinstance(before[1], int) or before[1] == 1)
    if not second and list(sizes).count(1) > 1:
        return False
    with graph.inserting_before(node):
        rows = graph.call_function(aten.sym_size.int, (next(iter(graph.nodes)), 1))
    at = 1 if second else list(sizes).index(1)
    node.args = (source, [*sizes[:at], rows, *sizes[at + 1 :]])
    return True
