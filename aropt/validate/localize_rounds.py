"""Localisation round by round: the first op of the forward that differs (see localize.py).

The candidate generates, run eagerly. The reference's control runs on the same rounds (`replay.Replay`), and nodes with
the same origin are compared in the rows that the round computed. Other rows are left out: what is stored of them may be
stale without harm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from aropt.ir.calls import op_name
from aropt.ir.control import calls, loops
from aropt.ir.executor import Values
from aropt.ir.interpreter import run
from aropt.ir.program import Program
from aropt.loops.requests.cases import Case
from aropt.loops.scheme import Mismatch, Round
from aropt.validate.oracle import Oracle
from aropt.validate.record import Enough, Recorder, distance, exact_values, node_values, own
from aropt.validate.replay import Replay, Trace
from aropt.validate.verdict import TOLERANCE


@dataclass
class Computed:
    """One call of the candidate's forward: nodes with an origin, and its slots int64 [B, N] (None: all)."""

    values: dict[fx.Node, Any]
    slots: Tensor | None


class Rounds(Recorder):
    """Keeps each call of the candidate's forward."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        shown = {loop.evidence for loop in loops(program.control) if loop.evidence}
        self.forwards = {c.graph for c in calls(program.control) if shown & set(c.writes.values())}
        self.kept: list[Computed] = []

    def call(self, graph: str, inputs: Values) -> Values:
        results = super().call(graph, inputs)
        if graph in self.forwards:
            kept = {n: v for n, v in self.values[graph].items() if "origin" in n.meta and floating(v)}
            self.kept.append(Computed(kept, inputs.get("slots")))
        return results


class Compared(Replay):
    """The reference's control on the candidate's rounds; stops at the first value that differs."""

    def __init__(self, oracle: Oracle, rounds: list[Round], case: Case, kept: list[Computed], place: int) -> None:
        super().__init__(oracle, case.inputs(oracle.program, [place]), rounds)
        self.kept, self.place, self.batch = kept, place, len(case.prompts)
        self.diverges: dict[str, Any] | None = None

    def forward(self, inputs: Values) -> Values:
        number, graph = self.number, self.oracle.program.graphs[self.oracle.model.graph]
        theirs: dict[fx.Node, Any] = {}
        weights = {w: self.oracle.program.weights[w] for w in graph.weights()}
        node_values(graph, [inputs[n] for n in graph.inputs], weights, theirs)
        wide = [self.exact.get(n, inputs[n]) for n in graph.inputs]
        exact = exact_values(self.oracle, graph, *[v.double() if v.is_floating_point() else v for v in wide])
        results = super().forward(inputs)
        self.scheme.compared(self.program, inputs, self.rounds[number], number)  # Mismatch where it computes other rows
        by_origin = {n.meta.get("origin", n.name): n for n, v in theirs.items() if floating(v)}
        one, rows, alone = self.kept[number], self.rounds[number].rows, inputs.get("slots")
        for node, value in one.values.items():
            origin = by_origin.get(node.meta["origin"])
            if origin is None:
                continue
            single, double = (self.chosen(x[origin], origin, rows, alone) for x in (theirs, exact))
            mine = own(value, theirs[origin], self.place, self.batch, 1)
            mine = self.chosen(mine, node, rows, one.slots)
            error, floor = distance(mine, single, double, 0) if mine.shape == single.shape else (0.0, 1.0)
            if error > TOLERANCE * floor:
                self.diverges = {"module": node.meta.get("where", ""), "node": node.name, "op": op_name(node),
                              "error": error, "floor": floor, "round": number}  # fmt: skip
                raise Enough
        return results

    def chosen(self, value: Tensor, node: fx.Node, rows: Tensor, slots: Tensor | None) -> Tensor:
        """The round's rows of a value: of a whole canvas these, of slots the first ones (what nobody sees is last)."""
        width = len(self.rounds[0].before)
        for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())[: value.dim()]):
            if isinstance(size, int):
                continue
            if slots is None and value.shape[axis] == width:
                value = value.index_select(axis, rows)
            elif slots is not None and value.shape[axis] == slots.shape[1]:
                value = value.narrow(axis, 0, len(rows))
        return value


def floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def first_in_rounds(oracle: Oracle, candidate: Program, case: Case, row: int) -> dict[str, Any] | None:
    """The first op that differs for prompt `row`, {module, node, op, error, floor, round}; None if none does."""
    group = next(g for g in case.groups(candidate) if row in g)
    prompts, streams = (
        tuple(case.prompts[i] for i in group),
        tuple(case.streams[i] if case.streams else i for i in group),
    )
    batch, place, recorder = replace(case, prompts=prompts, streams=streams), group.index(row), Rounds(candidate)
    try:
        rounds = Trace(candidate, batch, recorder).rounds[place]
    except Exception:  # it fails when run eagerly too, or does not end: the outcome says so
        return None
    compared = Compared(oracle, rounds, batch, recorder.kept, place)
    try:
        run(oracle.program, compared.inputs, 0, compared)
    except Mismatch:  # it computes other rows: nothing to compare with
        return None
    except Enough:
        pass
    return compared.diverges
