"""What a round of a program costs: ops, and bytes that it touches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from aropt.ir.calls import op_name
from aropt.ir.control import If, calls, loops
from aropt.ir.program import Graph, Program
from aropt.loops.positions import decoding

LOOKUPS = ("embedding", "index", "index_select", "gather", "token_shuffle", "cached_attention", "canvas_attention")


def nodes(program: Program) -> int:
    """Ops in the graphs that run each round."""
    hot = {c.graph for loop in loops(program.control) for c in calls(loop.body)}
    return sum(sum(n.op == "call_function" for n in program.graphs[g].fx.nodes) for g in hot)


def step_bytes(program: Program, stored: int | None = None) -> int:
    """Bytes that a round of one sequence touches, with `stored` rows before it (half the capacity): weights, state that
    is read, and activations of a forward over all rows, one read and one write of each value. Rounds with drafts are
    left aside: how many ids they give is not known from here.
    """
    rows = stored or max(1, program.meta["capacity"] // 2)
    body = (decoding(program.control) or loops(program.control))[0].body
    while isinstance(body, If):  # a guided round, where others run less
        body = body.then
    called = list(calls(body))
    graphs = {c.graph: program.graphs[c.graph] for c in called}
    sizes = defaultdict(lambda: 1, T=rows, S=rows)  # one of whatever else a loop counts
    read = {v for c in called for v in c.reads.values()}
    total = sum(program.weights[w].nbytes for w in set().union(*map(multiplied, graphs.values())))
    total += sum(s.nbytes(sizes) for n, s in program.state.items() if n in read)
    forwards = [graphs[c.graph] for c in called if "ids" in c.reads and "slots" not in c.reads]
    for node in (node for graph in forwards for node in graph.fx.nodes if node.op == "call_function"):
        value = node.meta.get("val")
        if hasattr(value, "shape"):
            total += 2 * value.element_size() * product(value.shape, rows)
    return total


def multiplied(graph: Graph) -> set[str]:
    """The weights that are read whole: all but tables, of which a call looks up a few rows."""
    read = [n for n in graph.fx.nodes if n.op == "get_attr"]
    return {str(n.target) for n in read if not all(op_name(user).rpartition("::")[2] in LOOKUPS for user in n.users)}


def product(shape: Sequence[Any], tokens: int) -> int:
    """Elements of a fake shape, its symbols read as one sequence of `tokens`."""
    count = 1
    batch_seen = False
    for size in shape:
        if isinstance(size, int):
            count *= size
        elif not batch_seen and len(shape) > 1:
            batch_seen = True
        else:
            count *= tokens
    return count
