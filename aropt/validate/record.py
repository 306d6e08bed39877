"""Values of all nodes of a run, and how far two runs are apart: what localisation compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.executor import Values
from aropt.ir.interpreter import Eager
from aropt.ir.program import Graph, Program, dict_root
from aropt.validate.oracle import Oracle


class Recorder(Eager):
    """Executes eagerly and keeps every node's value of the latest call of each graph, also of a call that fails."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.values: dict[str, dict[fx.Node, Any]] = {}

    def call(self, graph: str, inputs: Values) -> Values:
        g = self.program.graphs[graph]
        found: dict[fx.Node, Any] = {}
        self.values[graph] = found
        node_values(g, [inputs[n] for n in g.inputs], {w: self.program.weights[w] for w in g.weights()}, found)
        return {o: found[n] for o, n in zip(g.outputs, g.results(), strict=True)}


class History(Recorder):
    """Keeps the values of nodes with an origin, each with the slots that its call reads, until they are taken."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.found: list[tuple[fx.Node, Tensor, Tensor | None]] = []

    def call(self, graph: str, inputs: Values) -> Values:
        try:
            return super().call(graph, inputs)
        finally:
            named = [(n, v) for n, v in self.values[graph].items() if "origin" in n.meta and isinstance(v, Tensor)]
            self.found += [(n, v, inputs.get("slots")) for n, v in named if v.is_floating_point()]

    def taken(self) -> list[tuple[fx.Node, Tensor, Tensor | None]]:
        """What was kept, and forgets it."""
        found, self.found = self.found, []
        return found


def node_values(graph: Graph, inputs: list[Tensor], weights: dict[str, Tensor], found: dict[fx.Node, Any]) -> None:
    """Puts every node's value into `found`."""

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            found[n] = super().run_node(n)
            return found[n]

    with torch.no_grad():
        Keep(dict_root(list(weights), weights), garbage_collect_values=False, graph=graph.fx).run(*inputs)


class Enough(Exception):
    """Nothing more to see."""


def own(value: Tensor, like: Tensor, place: int, batch: int, branches: int) -> Tensor:
    """The rows of one prompt in a batch, where the first axis holds branches x batch sequences; else all of it."""
    if batch == 1 or value.dim() == 0 or like.dim() == 0 or value.shape[0] != like.shape[0] * batch:
        return value
    return value.reshape(branches, batch, -1, *value.shape[1:])[:, place].flatten(0, 1)


def exact_values(oracle: Oracle, captured: Graph, *inputs: Tensor) -> dict[fx.Node, Any]:
    """The captured forward's values in fp64, by the nodes of the fp32 graph."""
    found: dict[fx.Node, Any] = {}
    exact = [n for n in oracle.exact.graph.nodes if "nudge" not in n.meta]
    twins = dict(zip(exact, captured.fx.nodes, strict=True))

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n in twins:
                found[twins[n]] = value
            return value

    with torch.no_grad():
        Keep(oracle.exact, garbage_collect_values=False).run(*inputs)
    return found


def distance(mine: Tensor, theirs: Tensor, exact: Tensor, pads: int) -> tuple[float, float]:
    """Largest difference over the rows that both have, and the noise floor of that value."""
    eps = torch.finfo(torch.float32).eps
    if mine.dim() != theirs.dim():
        return 0.0, 1.0
    for axis, (a, b) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
        if a < b:  # rows: the candidate has the last ones
            theirs, exact = theirs.narrow(axis, b - a, a), exact.narrow(axis, b - a, a)
        elif a > b:  # rows or slots: the candidate has padding before, and empty slots after
            mine = mine.narrow(axis, min(pads, a - b), b)
    finite = torch.isfinite(theirs) & torch.isfinite(exact)
    if not finite.any():
        return 0.0, 1.0
    mine, theirs, exact = (x[finite].double() for x in (mine, theirs, exact))
    floor = max(float((theirs - exact).abs().max()), 4 * eps * float(theirs.abs().max()), 1e-30)
    error = (mine - theirs).abs().max()
    return (float(error) if torch.isfinite(error) else float("inf")), floor
