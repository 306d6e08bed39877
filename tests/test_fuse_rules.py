"""The pass fuse-rules: one op gives the ids that the rules give, and what is not aropt's own rules is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt import rules
from aropt.interpreter import Eager
from aropt.models.shuffle import Shape, ShuffleAR
from aropt.passbase import Applies, Skips
from aropt.passes.fuse_rules import FuseRules
from aropt.program import Graph, Program
from aropt.trace import capture_function
from aropt.validate import cases, validate, with_probe
from tests.conftest import make_program

ALL = ("guidance", "repetition-penalty", "bias", "temperature", "top-k", "top-p", "min-p")
LEVELS = 5


def windows(chosen: tuple[str, ...]) -> Program:
    torch.manual_seed(0)
    shape = Shape(side=4, levels=LEVELS, classes=3, width=16, layers=1, heads=2, hidden=16, blocks=0)
    return aropt.capture(ShuffleAR(shape), rules=chosen)


@pytest.fixture(scope="module", params=["ids", "ids, plain", "windows"])
def plain(request: pytest.FixtureRequest) -> Program:
    if request.param == "windows":
        return windows(ALL)
    return make_program(1, ALL if request.param == "ids" else ("temperature", "top-k"))


def called(graph: Graph) -> list[str]:
    return [n.target.__name__ for n in graph.fx.nodes if n.op == "call_function" and "squeeze" not in str(n.target)]


def test_a_rule_is_one_op(plain: Program) -> None:
    plan = FuseRules().plan(plain, "eager")
    assert isinstance(plan, Applies) and [m.partition(":")[0] for m in plan.matches] == ["greedy", "sample"]
    fused = FuseRules().run(plain)
    assert all(called(fused.graphs[name]) == ["fused_sample.default"] for name in ("greedy", "sample"))
    again = FuseRules().plan(fused, "eager")
    assert isinstance(again, Skips) and "something else" in again.reason
    assert validate(plain, with_probe(fused), chosen=cases(plain, quick=True)).passed


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Program, Program]]:
    return [(p, FuseRules().run(p)) for p in (make_program(1, ALL), windows(ALL))]


@settings(deadline=None, max_examples=40)
@given(st.data(), st.sampled_from([0, 1]), st.sampled_from(["greedy", "sample"]), st.integers(0, 2**31))
def test_ids_are_the_same(pairs: list[tuple[Program, Program]], data: Any, kind: int, name: str, seed: int) -> None:
    """Of any logits, for two sequences."""
    plain, fused = pairs[kind]
    generator, vocab = torch.Generator().manual_seed(seed), int(plain.meta["vocab"])
    dims = {"B": 2, "2*B": 4}
    values = {
        n: torch.randn([dims.get(str(d), d) for d in spec.dims], generator=generator) * 2  # type: ignore[misc]
        for n, spec in plain.graphs[name].inputs.items() if spec.dtype == torch.float32
    } | {"seen": torch.rand(2, vocab, generator=generator) < 0.5, "streams": torch.tensor([5, 2**40])}  # fmt: skip
    choices = {"temperature": [0.0, 0.3, 1.0], "top_p": [0.0, 0.4, 1.0], "min_p": [0.0, 0.2], "guidance": [1.0, 2.5],
               "repetition_penalty": [0.7, 1.0, 1.7], "top_k": [0, 1, 3, vocab], "seed": [0, seed]}  # fmt: skip
    values |= {n: torch.tensor(data.draw(st.sampled_from(given))) for n, given in choices.items()}
    values["position"] = torch.tensor([0, data.draw(st.integers(0, 2**40))])
    assert torch.equal(Eager(fused).call(name, values)["token"], Eager(plain).call(name, values)["token"])


def test_a_rule_that_the_op_does_not_know_is_named() -> None:
    plan = FuseRules().plan(make_program(1, ("guidance-interval", "temperature")), "eager")
    assert isinstance(plan, Skips) and "the rule guidance-interval" in plan.reason


def test_a_registered_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without parameters, so that nothing but its name tells."""
    halved = rules.Processor({}, lambda logits: logits * 0.5, draws=False)
    monkeypatch.setitem(rules.PROCESSORS, "half", halved)
    plan = FuseRules().plan(make_program(1, ("half", "temperature")), "eager")
    assert isinstance(plan, Skips) and plan.reason == "fused_sample has no place for the rule half"


def test_another_computation_is_left_alone() -> None:
    program = make_program(1, ("temperature",))
    least = capture_function(
        "greedy", lambda logits: torch.argmin(logits, -1), program.graphs["greedy"].inputs, ["token"]
    )
    plan = FuseRules().plan(program.replace(graphs={**program.graphs, "greedy": least}), "eager")
    assert isinstance(plan, Applies) and plan.rejected == (
        ("greedy", "it computes something else than the program's rules"),
    )
    assert [m.partition(":")[0] for m in plan.matches] == ["sample"]
