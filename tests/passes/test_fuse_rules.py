"""The pass fuse-rules: one op gives the ids that the rules give, and what is not aropt's own rules is left alone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.frontend.trace import capture_function
from aropt.ir.control import calls, loops
from aropt.ir.interpreter import Eager
from aropt.ir.program import Graph, Program
from aropt.loops import rules
from aropt.models.shuffle import Shape, ShuffleAR
from aropt.passes.fuse_rules import FuseRules, reason
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Applies, Skips
from aropt.validate.compare import cases, validate, with_probe
from tests.conftest import make_program
from tests.support.run import generate
from tests.support.targets import EAGER

ALL = ("guidance", "repetition-penalty", "bias", "temperature", "top-k", "top-p", "min-p")
LEVELS = 5


@cache
def windows(chosen: tuple[str, ...]) -> Program:
    torch.manual_seed(0)
    shape = Shape(side=4, levels=LEVELS, classes=3, width=16, layers=1, heads=2, hidden=16, blocks=0)
    return aropt.capture(ShuffleAR(shape), rules=chosen)


@cache
def plainly(kind: str) -> Program:
    if kind == "windows":
        return windows(ALL)
    return make_program(1, ALL if kind == "ids" else ("temperature", "top-k"))


@cache
def fused(kind: str) -> Program:
    return FuseRules().run(plainly(kind))


def called(graph: Graph) -> list[str]:
    return [n.target.__name__ for n in graph.fx.nodes if n.op == "call_function" and "squeeze" not in str(n.target)]


@pytest.mark.parametrize(
    "kind", [*(pytest.param(k, marks=pytest.mark.exhaustive) for k in ("ids", "ids, plain")), "windows"]
)
def test_a_rule_is_one_op(kind: str) -> None:
    plain, made = plainly(kind), fused(kind)
    plan = FuseRules().plan(plain, EAGER)
    assert isinstance(plan, Applies) and [m.partition(":")[0] for m in plan.matches] == ["greedy", "sample"]
    assert all(called(made.graphs[name]) == ["fused_sample.default"] for name in ("greedy", "sample"))
    again = FuseRules().plan(made, EAGER)
    assert isinstance(again, Skips) and "something else" in again.reason
    assert validate(plain, with_probe(made), chosen=cases(plain, quick=True)).passed


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Program, Program]]:
    return [(plainly(kind), fused(kind)) for kind in ("ids", "windows")]


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
    plan = FuseRules().plan(make_program(1, ("guidance-interval", "temperature")), EAGER)
    assert isinstance(plan, Skips) and "the rule guidance-interval" in plan.reason


def test_a_registered_rule_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without parameters, so that nothing but its name tells."""
    halved = rules.Processor({}, lambda logits: logits * 0.5, draws=False)
    monkeypatch.setitem(rules.PROCESSORS, "half", halved)
    plan = FuseRules().plan(make_program(1, ("half", "temperature")), EAGER)
    assert isinstance(plan, Skips) and plan.reason == "fused_sample has no place for the rule half"


def halved(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return logits / (temperature * 2).clamp(min=1e-6)


NUMBER = {"bias": rules.scalar(torch.float32, 0.0, "added to all logits")}


@pytest.mark.parametrize(
    ("rule", "change", "left"),
    [
        ("bias", {"apply": lambda logits, bias: logits - bias}, {"greedy", "sample"}),
        ("bias", {"params": NUMBER}, {"greedy", "sample"}), ("temperature", {"apply": halved}, {"sample"}),
    ],
    ids=["subtracted", "a number", "halved"],
)  # fmt: skip
def test_a_redefined_rule_is_left_alone(
    rule: str, change: dict[str, Any], left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of aropt's names and places that does something else, or reads something else in the same nodes."""
    monkeypatch.setitem(rules.PROCESSORS, rule, replace(rules.PROCESSORS[rule], **change))
    program = make_program(1, (rule, "temperature"))
    reasons = {name: reason(program, program.graphs[name]) for name in ("greedy", "sample")}
    assert {name for name, why in reasons.items() if "something else" in why} == left
    assert all(not why for name, why in reasons.items() if name not in left)


def test_another_order_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bias before the penalty, as the program was captured; what is registered later doesn't matter."""
    first = {n: rules.PROCESSORS[n] for n in ("bias", *rules.PROCESSORS)}
    with monkeypatch.context() as patch:
        patch.setattr(rules, "PROCESSORS", first)
        program = make_program(1, ("repetition-penalty", "bias", "temperature"))
    plan = FuseRules().plan(program, EAGER)
    assert isinstance(plan, Skips) and plan.reason == "fused_sample applies repetition-penalty before bias"


@pytest.mark.parametrize("of", ["two branches", pytest.param("windows", marks=pytest.mark.exhaustive)])
def test_in_the_pipeline(of: str) -> None:
    """With one batch of both branches, caches and one call a round: tokens of two prompts, greedy and drawn."""
    plain = plainly("ids" if of == "two branches" else of)
    fast, results, _ = run_passes(plain, pipeline(["fuse-rules"]), "eager", Instruments(check=False))
    statuses = {r.name: r.status for r in results}
    assert {statuses[n] for n in ("cfg-batch", "kv-cache", "fuse-rules", "fuse-sampler")} == {"applied"}
    rounds = {c.graph for loop in loops(fast.control) for c in calls(loop.body)}
    assert all("fused_sample.default" in called(fast.graphs[g]) for g in rounds)
    vocab = int(plain.meta["vocab"])
    prompts = [[vocab], [vocab + 1]] if of == "windows" else [[1, 2], [3, 4]]
    given = {"guidance": 2.0, "repetition_penalty": 1.5, "bias": torch.linspace(-1, 1, vocab)}
    drawn = {"temperature": 0.9, "top_k": 4, "top_p": 0.8, "min_p": 0.05, "seed": 3}
    for params in (given, given | drawn):
        assert generate(fast, prompts, 8, **params) == generate(plain, prompts, 8, **params)


def test_another_computation_is_left_alone() -> None:
    program = make_program(1, ("temperature",))
    least = capture_function(
        "greedy", lambda logits: torch.argmin(logits, -1), program.graphs["greedy"].inputs, ["token"], "rule"
    )
    plan = FuseRules().plan(program.replace(graphs={**program.graphs, "greedy": least}), EAGER)
    assert isinstance(plan, Applies) and plan.rejected == (
        ("greedy", "it computes something else than aropt's own rules"),
    )
    assert [m.partition(":")[0] for m in plan.matches] == ["sample"]
