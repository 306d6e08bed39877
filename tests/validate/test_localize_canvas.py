"""Localisation in canvas programs: the op that was changed is named, in any round, batch or cache; and none without."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.pipeline.checks import Instruments, describe
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.validate.compare import Case, Oracle, cases, fails, shrink, validate, with_probe
from aropt.validate.localize import first_in_rounds, localize
from tests.support.canvases import capture, tiny

aten = torch.ops.aten
KINDS = ["block-cache", "dual-cache", "lossy", "optimized", "plain"]
SLOW = dict.fromkeys(("dual-cache", "optimized"), pytest.mark.exhaustive)


@functools.cache
def captured(block: int) -> Program:
    return capture(tiny(block), "threshold")


@functools.cache
def pair(kind: str) -> tuple[Program, Program]:
    """A reference, and what must equal it: caches that are exact, one that is lossy (its own reference), all passes."""
    plain = captured(0 if kind in ("lossy", "plain") else 4)
    if kind == "plain":
        return plain, with_probe(plain)
    if kind == "lossy":
        fast = make("dual-cache").run(plain)
        return fast, with_probe(make("merge-linears").run(fast))
    if kind == "optimized":
        return plain, with_probe(run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))[0])
    return plain, with_probe(make(kind).run(plain))


def changed(
    program: Program, where: str, by: Any = lambda new, n: new.call_function(aten.mul.Tensor, (n, 1.01))
) -> Program:
    """The program with the last value of a module changed, in each graph that has it."""
    graphs = dict(program.graphs)
    for name, graph in program.graphs.items():
        new, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
        new.output(new.graph_copy(graph.fx, nodes))
        found = [n for n in new.nodes if n.meta.get("where") == where and "origin" in n.meta]
        if not found:
            continue
        with new.inserting_before(found[-1].next):
            made = by(new, found[-1])
        made.meta = dict(found[-1].meta)
        found[-1].replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        graphs[name] = replace(graph, fx=new)
    assert graphs != program.graphs
    return program.replace(graphs=graphs)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=SLOW.get(k, ())) for k in KINDS])
def test_in_any_batch_the_op_is_named_or_nothing(kind: str) -> None:
    reference, candidate = pair(kind)
    oracle, wrong = Oracle(reference), changed(candidate, "layers.1.attention_norm")
    for case in (c for c in cases(reference, quick=True) if c.kind == "ragged"):  # infilled and sampled too
        for row in range(len(case.prompts)):
            assert first_in_rounds(oracle, candidate, case, row) is None
            found = first_in_rounds(oracle, wrong, case, row)
            assert found is not None and (found["module"], found["round"]) == ("layers.1.attention_norm", 0)
            assert found["error"] > 16 * found["floor"]


@pytest.mark.parametrize("module", ["layers.0.query", "layers.0", "layers.1.down", "head"])
def test_validation_reports_it(module: str) -> None:
    reference, candidate = pair("block-cache")
    verdict = validate(reference, changed(candidate, module), chosen=cases(reference, quick=True))
    assert verdict.diverges is not None and verdict.diverges["module"] == module
    assert f"first to differ: {module}, aten::mul" in describe(verdict)


def test_the_round_is_that_of_the_change() -> None:
    """Wrong in the rows of the second block alone: nothing differs before that block begins."""
    reference, candidate = pair("block-cache")

    def later(new: fx.Graph, node: fx.Node) -> fx.Node:
        positions = next(n for n in new.nodes if n.op == "placeholder" and n.name == "positions")
        far = new.call_function(aten.ge.Scalar, (new.call_function(aten.unsqueeze.default, (positions, -1)), 8))
        return new.call_function(aten.add.Tensor, (node, far))

    case = Case(((1, 2, 3, 4), (5, 6)), 8, params=(("threshold", 2.0),))
    wrong = changed(candidate, "layers.0.up", later)
    found = [first_in_rounds(Oracle(reference), wrong, case, row) for row in (0, 1)]
    assert [f and (f["module"], f["round"]) for f in found] == [("layers.0.up", 4), ("layers.0.up", 6)]


def test_what_is_outside_the_model_is_said_so() -> None:
    reference, _ = pair("lossy")
    other = with_probe(make("dual-cache", {"refresh": "3"}).run(captured(0)))
    found = localize(Oracle(reference), other, Eager(other), Case(((1, 2),), 8), 0)
    assert found is not None and (found["node"], found["where"]) == ("", "outside the model: rule, loop or state")


def test_cases_are_shrunk_to_ones_that_a_canvas_takes() -> None:
    reference, candidate = pair("plain")
    oracle, wrong = Oracle(reference), changed(candidate, "head")
    case = next(c for c in cases(reference, quick=True) if c.fill)
    small = shrink(lambda c: fails(oracle, wrong, Eager(wrong), c), case)
    assert len(small.prompts) == 1 and small.n < case.n and len(small.fill[0]) == small.n
    assert not fails(oracle, wrong, Eager(wrong), replace(case, params=(("block", 7.0),)))


def test_a_program_that_raises_is_reported() -> None:
    reference, candidate = pair("plain")
    wrong = changed(candidate, "head", lambda new, node: new.call_function(aten.view.default, (node, [7, 11])))
    verdict = validate(reference, wrong, chosen=cases(reference, quick=True))
    assert "raises" in verdict.outcomes[-1].problem and verdict.diverges is not None
    assert verdict.diverges["where"] == "outside the model: rule, loop or state"
