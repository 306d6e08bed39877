"""How many tokens a captured forward takes in fact: its tables of positions may end before the length that it states.

RoBERTa's table begins after the padding id, Whisper's decoder has a length of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from aropt.errors import Unsupported
from aropt.ir.calls import op_name
from aropt.ir.printer import symbol_names
from aropt.ir.program import Graph
from aropt.restrict.excluded import counted
from aropt.restrict.positions import Positions, content_nodes

LOOKUPS = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}


def most_tokens(graph: Graph, weights: Mapping[str, Tensor], capacity: int) -> int:
    """The most tokens up to the capacity for which every lookup by position finds its row."""
    names, never = symbol_names(graph), tuple(counted(graph))
    content, positions = content_nodes(graph.fx, names, never), Positions(weights, names, capacity, never)
    lookups = [n for n in graph.fx.nodes if n.op == "call_function" and op_name(n) in LOOKUPS and n not in content]

    def found(length: int) -> bool:
        try:
            for node in lookups:
                positions.value(node, length)
        except Unsupported:
            return False
        return True

    if found(capacity):
        return capacity
    low, high = 1, capacity
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if found(middle) else (low, middle)
    return low
