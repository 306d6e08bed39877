"""A new kind of loop is one file: two toys, built, optimized, verified and exported like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from aropt.exporters.whole_loop import export_program
from aropt.ir.edit import copied
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.loops.requests.cases import cases
from aropt.loops.scheme import add
from aropt.pipeline.api import optimize
from aropt.targets.ort import run_loop
from aropt.validate.compare import compare, validate, with_probe
from aropt.validate.oracle import Oracle
from tests.loops.toys import flow, scales

aten = torch.ops.aten
TOYS = {"scales": scales.program, "flow": flow.program}
add(scales.SCHEME)
add(flow.SCHEME)


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest) -> Program:
    return TOYS[request.param]()


def test_it_is_well_formed_and_equals_itself(toy: Program) -> None:
    verify(toy)
    verdict = validate(toy, with_probe(toy), Eager(toy), cases(toy, quick=True), explain=False)
    assert verdict.passed and sum(o.tokens for o in verdict.outcomes) > 20, verdict.outcomes[-1].problem


def swapped(program: Program, graph: str, target: Any, other: Any) -> Program:
    """The program with another op in the place of one in a graph."""
    part = program.graphs[graph]
    changed = copied(part.fx)
    next(n for n in changed.nodes if n.target is target).target = other
    return program.replace(graphs={**program.graphs, graph: replace(part, fx=changed)})


SLIPS = {  # of each toy: what is changed where
    "scales": [("last", aten.add.Tensor, aten.sub.Tensor), ("model", aten.ge.Tensor, aten.gt.Tensor),
               ("write", aten.ge.Scalar, aten.gt.Scalar)],
    "flow": [("euler", aten.add.Tensor, aten.sub.Tensor), ("model", aten.tanh.default, aten.sigmoid.default)],
}  # fmt: skip


@pytest.mark.parametrize("name", TOYS)
def test_slips_are_caught(name: str) -> None:
    """A miscompile of a round, of the forward, or of the end."""
    plain = TOYS[name]()
    for graph, target, other in SLIPS[name]:
        wrong = with_probe(swapped(plain, graph, target, other))
        verdict = validate(plain, wrong, Eager(wrong), cases(plain, quick=True), explain=False)
        assert not verdict.passed, (graph, target)


@pytest.mark.parametrize("name", TOYS)
def test_default_passes_and_targets(name: str) -> None:
    for target in ("eager", "onnxruntime"):
        made = optimize(TOYS[name](), target)
        assert made.report["verify"]["status"] == "pass"
        assert {p["name"] for p in made.report["passes"] if p["status"] == "applied"} >= {"fuse-sampler"}


@pytest.mark.parametrize("name", TOYS)
def test_one_file(name: str, tmp_path: Path) -> None:
    """All of the loop as one ONNX model."""
    plain = TOYS[name]()
    case = cases(plain, quick=True)[0]
    inputs = case.inputs(plain, list(range(len(case.prompts))))
    export_program(plain, tmp_path / "whole.onnx")
    session = run_loop.session(tmp_path / "whole.onnx", 1)
    known = {i.name for i in session.get_inputs()}
    found = session.run(None, {n: v.numpy() for n, v in inputs.items() if n in known})[0]
    want = run(plain, inputs, 0)[plain.outputs[0]]
    assert torch.allclose(torch.from_numpy(found).double(), want.double(), rtol=0, atol=1e-5)


def test_a_decision_that_is_no_number_is_wrong() -> None:
    """Not only where the next round's evidence shows it."""
    plain = flow.program()
    case = next(c for c in cases(plain, quick=True) if c.n == 1)

    class Last(Eager):
        def call(self, graph: str, inputs: Any) -> Any:
            results = super().call(graph, inputs)
            return {**results, "x": results["x"] * torch.nan} if graph == "euler" else results

    outcome = compare(Oracle(plain), plain, Last(plain), case)
    assert "decides" in outcome.problem
