"""Localisation: which op is the first to differ, by its module path (design section 7).

Nodes of a restricted graph remember the node of the captured forward that they came from ("origin"). Both are run on
the failing case and compared value by value, each against its own noise floor.
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
from aropt.ir.units import rows, rows_for
from aropt.loops.runtime import slots
from aropt.loops.scheme import scheme_of
from aropt.validate.localize_rounds import first_in_rounds
from aropt.validate.record import Enough, History, Recorder, distance, exact_values, node_values, own

if TYPE_CHECKING:
    from aropt.loops.requests.cases import Case
    from aropt.validate.oracle import Oracle


def localize(oracle: Oracle, candidate: Program, executor: Executor, case: Case, row: int = 0) -> dict[str, Any] | None:
    """The first op that differs for prompt `row`: {module, node, op, error, round, repro}, or no node and `where`."""
    first = first_in_program
    if not scheme_of(oracle.program).forced:
        first = first_in_rounds
    found = first(oracle, candidate, case, row)
    if found is None:
        found = first_in_target(candidate, executor, case, row)
    if found is None:
        return {"module": "", "node": "", "op": "", "error": 0.0, "where": "outside the model: rule, loop or state",
                "repro": case.repro("program")}  # fmt: skip
    return {**found, "repro": case.repro("program")}


@dataclass
class Round:
    """One call of the model: the tokens that it stands for [branches, T], and the values of nodes with an origin."""

    ids: Tensor
    values: list[tuple[fx.Node, Any]]


def first_in_program(oracle: Oracle, candidate: Program, case: Case, row: int) -> dict[str, Any] | None:
    """Compares the candidate's graphs, run eagerly, with the captured forward."""
    group = next(g for g in case.groups(candidate) if row in g)

    def height(i: int) -> int:
        return len(rows(candidate.meta, case.prompts[i]))

    place, pads = group.index(row), max(map(height, group)) - height(row)
    captured = oracle.program.graphs[oracle.model.graph]
    weights = {w: oracle.program.weights[w] for w in captured.weights()}
    by_name = {n.name: n for n in captured.fx.nodes}
    for number, one in enumerate(rounds(candidate, case, group, place, pads)):
        single: dict[fx.Node, Any] = {}
        node_values(captured, [one.ids], weights, single)
        exact = exact_values(oracle, captured, one.ids)
        for node, value in one.values:
            origin = by_name.get(node.meta["origin"])
            if origin is None or not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            like, true = single[origin], exact[origin]
            found = sides(value, like, place, len(group), len(one.ids))
            error, floor = min((distance(x, like[at], true[at], pads) for x, at in found), key=relative)
            if error > 16 * floor:
                return {"module": node.meta.get("where", ""), "node": node.name, "op": op_name(node), "error": error,
                        "floor": floor, "round": number}  # fmt: skip
    return None


def rounds(candidate: Program, case: Case, group: list[int], place: int, pads: int) -> list[Round]:
    """Runs the candidate eagerly on a batch, until the prompt at `place` ends or an op fails."""
    recorder, inputs, kept = History(candidate), case.inputs(candidate, group), []
    ids = torch.stack([inputs[n][place, pads:] for n in ("prompt", "negative") if n in inputs])
    first = ids.shape[1]

    def latest() -> Round:
        found = [(n, v) for values in recorder.found for n, v in values.items() if "origin" in n.meta]
        recorder.found = []
        return Round(ids, found)

    def keep(loop: Loop, values: Values) -> None:
        nonlocal ids
        kept.append(latest())
        new = values[loop.shown][place].reshape(-1, *ids.shape[2:])  # one row, or those of a draft that count
        new = new[(new >= 0).reshape(len(new), -1).all(1)]
        if not len(new) or ids.shape[1] + len(new) >= first + rows_for(candidate.meta, case.n):
            raise Enough
        ids = torch.cat([ids, new.expand(len(ids), *new.shape)], 1)

    try:
        with contextlib.suppress(Enough):
            run(candidate, inputs, slots(candidate, inputs), recorder, keep)
    except Exception:  # the candidate fails: what it computed before may show why
        kept.append(latest())
    return kept


def sides(value: Tensor, like: Tensor, place: int, batch: int, branches: int) -> list[tuple[Tensor, slice]]:
    """The rows of one prompt, and which rows of the captured forward's value they may be.

    A value of one branch does not say of which one.
    """
    found = [(own(value, like, place, batch, branches), slice(None))]
    if branches > 1 and value.dim() and like.dim() and value.shape[0] * branches == like.shape[0] * batch:
        mine, rows = value.reshape(batch, -1, *value.shape[1:])[place], like.shape[0] // branches
        found += [(mine, slice(i * rows, (i + 1) * rows)) for i in range(branches)]
    return found


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
