"""A forward in the form that `restrict` takes: with steady biases (see shift.py), memories apart (see memory.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from aropt.ir.edit import copied
from aropt.ir.program import Graph
from aropt.ir.torch_compat import propagate
from aropt.restrict.memory import memories, part
from aropt.restrict.positions import Positions, content_nodes
from aropt.restrict.shift import replace, unsteady


def prepared(
    graph: Graph, weights: Mapping[str, Tensor], names: dict[Any, str], capacity: int, never: Sequence[int]
) -> tuple[fx.Graph, dict[Any, str]]:
    """The forward to restrict, and the names of its sizes: itself where nothing is to be written anew."""
    content, positions = content_nodes(graph.fx, names, never), Positions(weights, names, capacity, never)
    if not unsteady(graph.fx, content, positions) and not memories(graph.fx, content, positions):
        return graph.fx, names
    traced = copied(graph.fx)
    names = propagate(traced, graph.inputs, weights)
    content, positions = content_nodes(traced, names, never), Positions(weights, names, capacity, never)
    for user, bias, take in unsteady(traced, content, positions):
        replace(traced, user, bias, take)
    for node, keys, values in memories(traced, content, positions):
        part(traced, node, keys, values)
    traced.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return traced, propagate(traced, graph.inputs, weights)
