"""The eager target: ATen ops one by one, with caches updated in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import fx

from aropt.ir import ops
from aropt.ir.executor import Executor, Values
from aropt.ir.program import Graph, Program, donated
from aropt.rewriting.target import Target

aten = torch.ops.aten
TARGET = Target("eager", "torch", frozenset({"batched-chunks"}))


def in_place(graph: Graph, aliases: Mapping[str, str]) -> fx.Graph:
    """The graph with the aliased outputs written into their inputs' buffers: no copy of the cache a step."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph.fx, nodes))
    for output, result in zip(graph.outputs, graph.results(), strict=True):
        if output in aliases and result.target is aten.index_copy.default:
            nodes[result].target = aten.index_copy_.default
        elif output in aliases:
            writer = nodes[ops.updated(result)[0]]
            writer.target = ops.overwriting(writer.target) or writer.target
    return copy


class InPlace(Executor):
    """Executes graphs eagerly; values under an alias are overwritten."""

    def __init__(self, program: Program) -> None:
        ops.load_all()
        self.program, self.aliases = program, donated(program)
        self.modules: dict[str, Callable[..., tuple[torch.Tensor, ...]]] = {}

    def module(self, name: str) -> Callable[..., tuple[torch.Tensor, ...]]:
        graph = self.program.graphs[name]
        bound = graph.bind(self.program.weights)
        bound.graph = in_place(graph, self.aliases[name])
        bound.recompile()
        compiled: Callable[..., tuple[torch.Tensor, ...]] = bound
        return compiled

    def call(self, graph: str, inputs: Values) -> Values:
        if graph not in self.modules:
            self.modules[graph] = self.module(graph)
        spec = self.program.graphs[graph]
        with torch.no_grad():
            return dict(zip(spec.outputs, self.modules[graph](*[inputs[n] for n in spec.inputs]), strict=True))

    def without_probe(self, program: Program) -> InPlace:
        """What was made of graphs that validation did not change stays; others are made when they are called."""
        other = type(self)(program)
        same = [name for name in self.modules if program.graphs[name] is self.program.graphs[name]]
        other.modules = {name: self.modules[name] for name in same}
        return other


def build(
    program: Program, folder: Path | None, progress: Callable[[str], None], threads: int | None, read: bool
) -> Executor:
    return InPlace(program)
