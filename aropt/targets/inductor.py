"""The inductor target: torch.compile of each graph, caches updated in place.

The cache update is written as a copy into the input, which Inductor turns into an update of the rows. aropt's own ops
are inlined, so that they fuse with what is around them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.control import calls, loops
from aropt.ir.executor import Executor, Values
from aropt.ir.program import Program, own_sizes
from aropt.rewriting.target import Target
from aropt.targets.eager import InPlace, in_place

TARGET = Target("inductor", "Inductor", frozenset({"batched-chunks", "int8-weights"}))
SHAPES = 256  # of a graph's values that are compiled: requests have many prompts' lengths and batches; torch stops at 8


class Inductor(InPlace):
    """Graphs inside loops are compiled at their first call (and again for a prompt's shape).

    Others run eagerly, and so do those with sizes of their own.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.hot = {c.graph for loop in loops(program.control) for c in calls(loop.body)}

    def module(self, name: str) -> Callable[..., tuple[Tensor, ...]]:
        graph = self.program.graphs[name]
        if name not in self.hot or own_sizes(graph):
            return super().module(name)
        bound = graph.bind(self.program.weights)
        bound.graph = inline_ops(in_place(graph, self.aliases[name]))
        bound.recompile()
        compiled: Callable[..., tuple[Tensor, ...]] = torch.compile(bound, fullgraph=True, dynamic=None)
        return compiled

    def call(self, graph: str, inputs: Values) -> Values:
        spec = self.program.graphs[graph]
        if graph in self.hot:
            for name, value in inputs.items():
                state = self.program.state.get(name)
                if state is not None and state.axis is not None:
                    torch._dynamo.mark_dynamic(value, state.axis)
        if graph not in self.modules:
            self.modules[graph] = self.module(graph)
        settings: Any = torch._dynamo.config  # its `patch` would take 14 us a call, a twentieth of a small step
        limit, settings.recompile_limit = settings.recompile_limit, SHAPES
        try:
            with torch.no_grad():
                return dict(zip(spec.outputs, self.modules[graph](*[inputs[n] for n in spec.inputs]), strict=True))
        finally:
            settings.recompile_limit = limit


def inline_ops(graph: fx.Graph) -> fx.Graph:
    """aropt's ops by their references, which torch.compile can look into."""
    references: dict[Any, Callable[..., Any]] = ops.decompositions()
    for node in graph.nodes:
        if node.op == "call_function" and node.target in references:
            node.target = references[node.target]
    return graph


def build(
    program: Program, folder: Path | None, progress: Callable[[str], None], threads: int | None, read: bool
) -> Executor:
    return Inductor(program)
