"""Which graphs of a program run in its loops, and which once a generation."""

from __future__ import annotations

from collections import Counter

from aropt.ir.control import calls, loops
from aropt.ir.program import Program, growing, own_sizes


def hot_graphs(program: Program) -> list[str]:
    """Graphs that run in a loop, once each; not those that make a value longer in each round."""
    found = {c.graph: c for loop in loops(program.control) for c in calls(loop.body)}
    return [name for name, call in found.items() if not growing(call, program.graphs[name])]


def starting_graphs(program: Program) -> set[str]:
    """Graphs that run once a generation, whose results nobody has after it: the next one may overwrite them."""
    found = Counter(c.graph for c in calls(program.control))
    results = {c.graph for c in calls(program.control) if set(c.writes.values()) & set(program.outputs)}
    results |= {c.graph for loop in loops(program.control) for c in calls(loop.body)}
    return {g for g, n in found.items() if n == 1 and g not in results and not own_sizes(program.graphs[g])}
