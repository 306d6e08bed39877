"""What a round of a program costs: ops, and bytes that it touches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aropt.ir.control import If, calls
from aropt.ir.program import Program


def nodes(program: Program) -> int:
    """Ops in the graphs that run each round."""
    from aropt.ir.control import loops

    hot = {c.graph for loop in loops(program.control) for c in calls(loop.body)}
    return sum(sum(n.op == "call_function" for n in program.graphs[g].fx.nodes) for g in hot)


def step_bytes(program: Program) -> int:
    """Bytes that a decoding round of one sequence touches at half capacity: weights, state read, and recomputed rows.

    A full forward touches its activations of all tokens; they are counted as one read and one write of each value.
    """
    from aropt.ir.control import loops

    half = max(1, int(program.meta["capacity"]) // 2)
    sizes = {"B": 1, "R": 1, "Q": 1, "T": half, "S": half, "P": 1, "K": 1}
    body = loops(program.control)[0].body
    while isinstance(body, If):  # a guided round, where others run less
        body = body.then
    called = list(calls(body))
    weights = {w for c in called for w in program.graphs[c.graph].weights() if program.weights[w].dim() > 1}
    total = sum(program.weights[w].nbytes for w in weights)
    read = {v for c in called for v in c.reads.values()}
    total += sum(s.nbytes(sizes) for n, s in program.state.items() if n in read)
    model = [program.graphs[c.graph] for c in called if "ids" in c.reads and "slots" not in c.reads]
    for graph in model:
        for node in graph.fx.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and hasattr(value, "shape"):
                total += 2 * value.element_size() * product(value.shape, half)
    return total


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
