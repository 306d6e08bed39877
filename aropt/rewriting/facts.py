"""Facts of any program that contracts speak of; those of a loop's own kind lie beside that loop."""

from __future__ import annotations

from aropt.ir.control import calls, loops
from aropt.ir.program import Graph, Program
from aropt.ir.units import window
from aropt.rewriting.contract import Fact


def forward(program: Program) -> Graph | None:
    """The graph of the model's full forward, where a loop runs it."""
    found = (c for loop in loops(program.control) for c in calls(loop.body) if "ids" in c.reads)
    return next((program.graphs[c.graph] for c in found if "slots" not in c.reads), None)


FORWARD = Fact("full forward", lambda p: "" if forward(p) else "no loop runs a full forward")
WINDOWS = Fact("rows of several ids", lambda p: "" if window(p.meta) else "a row is one id")
ROWS_OF_ONE = Fact("rows of one id", lambda p: "a row holds several ids" if window(p.meta) else "")
