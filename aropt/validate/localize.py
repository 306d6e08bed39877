"""Localisation: which op is the first to differ, by its module path (design section 7).

Nodes of a restricted graph remember the node of the captured forward that they came from ("origin"). The candidate
generates the failing case, run eagerly. The reference's control runs on its rounds (`replay.Replay`), and values of the
same origin are compared round by round, each against its own noise floor. Of a canvas, rows that the round did not
compute are left out: what is stored of them may be stale without harm.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import op_name
from aropt.ir.control import Loop
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import run
from aropt.ir.program import Program
from aropt.ir.units import rows
from aropt.loops.runtime import slots
from aropt.loops.scheme import Mismatch, Round, scheme_of
from aropt.validate.record import Enough, History, Recorder, distance, exact_values, node_values, own
from aropt.validate.replay import Replay
from aropt.validate.verdict import TOLERANCE

if TYPE_CHECKING:
    from aropt.loops.requests.cases import Case
    from aropt.validate.oracle import Oracle


def localize(oracle: Oracle, candidate: Program, executor: Executor, case: Case, row: int = 0) -> dict[str, Any] | None:
    """The first op that differs for prompt `row`: {module, node, op, error, round, repro}, or no node and `where`."""
    found = first_in_rounds(oracle, candidate, case, row) or first_in_target(candidate, executor, case, row)
    if found is None:
        return {"module": "", "node": "", "op": "", "error": 0.0, "where": "outside the model: rule, loop or state",
                "repro": case.repro("program")}  # fmt: skip
    return {**found, "repro": case.repro("program")}


@dataclass
class Computed:
    """What the candidate computed until a round was decided, or several of them, or it failed: nodes with an origin,
    each with the slots int64 [B, N] of its call (None: all), and the rounds of the prompt.
    """

    values: list[tuple[fx.Node, Tensor, Tensor | None]]
    rounds: list[Round]


def first_in_rounds(oracle: Oracle, candidate: Program, case: Case, row: int) -> dict[str, Any] | None:
    """The first op that differs for prompt `row`, {module, node, op, error, floor, round}; None if none does."""
    group = next(g for g in case.groups(candidate) if row in g)
    compared = Compared(oracle, computed(candidate, case, group, row), candidate, case, group, row)
    with contextlib.suppress(Mismatch, Enough):  # it computes other rows: nothing to compare with
        run(oracle.program, compared.inputs, 0, compared)
    return compared.diverges


def computed(candidate: Program, case: Case, group: list[int], row: int) -> list[Computed]:
    """Runs the candidate eagerly on a batch, until it ends, or an op fails."""
    recorder, inputs, kept, scheme = History(candidate), case.inputs(candidate, group), [], scheme_of(candidate)
    look, most, place = scheme.observe(candidate, inputs), scheme.most_rounds(inputs), group.index(row)

    def keep(loop: Loop, values: Values) -> None:
        if not loop.decides:
            return
        kept.append(Computed(recorder.taken(), look(loop, values)[place]))
        if len(kept) > most:
            raise Enough

    try:
        run(candidate, inputs, slots(candidate, inputs), recorder, keep)
    except Enough:
        pass
    except Exception:  # what it computed before may show why it fails
        kept.append(Computed(recorder.taken(), []))
    while kept and kept[-1].rounds and all(one.empty for one in kept[-1].rounds):  # others of the batch go on
        kept.pop()
    return kept


class Compared(Replay):
    """The reference's control on the candidate's rounds; stops at the first value that differs."""

    def __init__(
        self, oracle: Oracle, kept: list[Computed], candidate: Program, case: Case, group: list[int], row: int
    ) -> None:
        super().__init__(oracle, case.inputs(oracle.program, [row]), [one for some in kept for one in some.rounds])
        heights = {i: len(rows(candidate.meta, case.prompts[i])) for i in group}
        self.place, self.batch, self.pads = group.index(row), len(group), max(heights.values()) - heights[row]
        self.kept: dict[int, Computed] = {}  # by the first of their rounds
        for some in kept:
            self.kept[sum(len(one.rounds) for one in self.kept.values())] = some
        self.branches: list[Values] = []  # what the forward reads in this round
        self.diverges: dict[str, Any] | None = None

    def forward(self, inputs: Values) -> Values:
        self.branches.append(inputs)
        if len(self.branches) == self.oracle.branches:
            read = {n: torch.cat([v[n] for v in self.branches]) if self.branches[1:] else inputs[n] for n in inputs}
            self.branches = []
            if self.number in self.kept:
                self.compare(self.kept[self.number].values, read)
        return super().forward(inputs)

    def compare(self, values: list[tuple[fx.Node, Tensor, Tensor | None]], inputs: Values) -> None:
        """Compares the values with those of the reference's forward on these inputs; raises Enough if one differs."""
        graph = self.oracle.program.graphs[self.oracle.model.graph]
        round = self.rounds[self.number] if self.number < len(self.rounds) else None
        if round is not None and canvas(round):
            self.scheme.compared(self.program, {**self.inputs, **inputs}, round, self.number)  # Mismatch: other rows
        theirs: dict[fx.Node, Any] = {}
        weights = {w: self.oracle.program.weights[w] for w in graph.weights()}
        node_values(graph, [inputs[n] for n in graph.inputs], weights, theirs)
        wide = [self.exact.get(n, inputs[n]) for n in graph.inputs]
        exact = exact_values(self.oracle, graph, *[v.double() if v.is_floating_point() else v for v in wide])
        by_origin = {
            n.meta.get("origin", n.name): n
            for n, v in theirs.items()
            if isinstance(v, Tensor) and v.is_floating_point()
        }
        for node, value, picked in values:
            origin = by_origin.get(node.meta["origin"])
            if origin is None:
                continue
            like, true = (chosen(x[origin], origin, round, inputs.get("slots")) for x in (theirs, exact))
            mine = [(chosen(x, node, round, picked), at) for x, at in self.sides(value, theirs[origin])]
            error, floor = min((self.distance(x, like, true, at, round) for x, at in mine), key=relative)
            if error > TOLERANCE * floor:
                self.diverges = {"module": node.meta.get("where", ""), "node": node.name, "op": op_name(node),
                                 "error": error, "floor": floor, "round": self.number}  # fmt: skip
                raise Enough

    def sides(self, value: Tensor, like: Tensor) -> list[tuple[Tensor, slice | None]]:
        """The rows of one prompt, and which rows of the captured forward's value they may be (None: all).

        A value of one branch does not say of which one.
        """
        branches, batch = self.oracle.branches, self.batch
        found: list[tuple[Tensor, slice | None]] = [(own(value, like, self.place, batch, branches), None)]
        if branches > 1 and value.dim() and like.dim() and value.shape[0] * branches == like.shape[0] * batch:
            mine, rows = value.reshape(batch, -1, *value.shape[1:])[self.place], like.shape[0] // branches
            found += [(mine, slice(i * rows, (i + 1) * rows)) for i in range(branches)]
        return found

    def distance(
        self, mine: Tensor, like: Tensor, true: Tensor, at: slice | None, round: Round | None
    ) -> tuple[float, float]:
        """How far a value is from the reference's, and its noise floor."""
        if canvas(round):
            return distance(mine, like, true, 0) if mine.shape == like.shape else (0.0, 1.0)
        like, true = (like, true) if at is None else (like[at], true[at])
        return distance(mine, like, true, self.pads)


def chosen(value: Tensor, node: fx.Node, round: Round | None, slots: Tensor | None) -> Tensor:
    """A canvas round's rows of a value: of a whole canvas these, of slots the first ones (what nobody sees is last)."""
    if round is None or not canvas(round):
        return value
    for axis, size in enumerate(getattr(node.meta.get("val"), "shape", ())[: value.dim()]):
        if isinstance(size, int):
            continue
        if slots is None and value.shape[axis] == len(round.before):
            value = value.index_select(axis, round.rows)
        elif slots is not None and value.shape[axis] == slots.shape[1]:
            value = value.narrow(axis, 0, min(len(round.rows), value.shape[axis]))  # fewer: it compares with nothing
    return value


def canvas(round: Round | None) -> bool:
    """Whether a round decides rows that were there before, some of which it computes."""
    return round is not None and len(round.before) > 0


def relative(found: tuple[float, float]) -> float:
    """The error in multiples of the floor."""
    return found[0] / found[1]


def first_in_target(candidate: Program, executor: Executor, case: Case, row: int) -> dict[str, Any] | None:
    """Compares what the target's graphs compute with the same graphs run eagerly, if the target can show it."""
    if not executor.shows_values:
        return None
    recorder = Recorder(candidate)
    inputs = case.inputs(candidate, next(g for g in case.groups(candidate) if row in g))
    problem: dict[str, Any] = {}

    class Both(Executor):
        def call(self, graph: str, values: Values) -> Values:
            kept = {n: v.clone() for n, v in values.items()}
            results = recorder.call(graph, values)
            floats = (n for n, v in recorder.values[graph].items() if isinstance(v, Tensor) and v.is_floating_point())
            nodes = {n.name: n for n in floats}
            for name, mine in executor.intermediates(graph, kept, list(nodes)).items():
                node, value = nodes[name], recorder.values[graph][nodes[name]]
                error, floor = distance(mine, value, value.double(), 0) if mine.shape == value.shape else (0.0, 1.0)
                if error > 64 * floor:
                    problem.update(module=node.meta.get("where", ""), node=name, op=op_name(node), error=error,
                                   floor=floor, where=f"in the target's graph {graph}")  # fmt: skip
                    raise Enough
            return results

    seen = 0

    def keep(_: Loop, values: Values) -> None:
        nonlocal seen
        seen += 1
        if seen >= case.n:
            raise Enough

    with contextlib.suppress(Enough):
        run(candidate, inputs, slots(candidate, inputs), Both(), keep)
    return problem or None
