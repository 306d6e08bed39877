"""No guidance: weights that were trained to need none run one branch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.passes.cfg_eliminate import CfgEliminate
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Skips, planned
from aropt.validate.compare import validate, with_probe
from tests.conftest import CAPACITY, Tiny, make_program
from tests.support.guided import PROMPTS, RULES, Prompts, counted, passed
from tests.support.run import generate
from tests.support.targets import EAGER


class Free(Tiny):
    """Says that it was trained to need no guidance."""

    guidance_free, null, capacity = True, 0, CAPACITY


@pytest.fixture(scope="module")
def free() -> Program:
    torch.manual_seed(0)
    return aropt.capture(Free(1), rules=("guidance", *RULES))


@pytest.fixture(scope="module")
def alone(free: Program) -> Program:
    return passed(free, "cfg-eliminate")


def test_elimination_halves_the_forwards(free: Program, alone: Program) -> None:
    for before, after in ((free, alone), (passed(free, "kv-cache"), passed(alone, "kv-cache"))):
        many, few = (sum(b for b, _ in counted(p, [[1, 2], [3, 4]], 6)) for p in (before, after))
        assert many == 2 * few == 24
    assert not {"negative", "guidance"} & set(alone.inputs)
    assert not [n for n in alone.state if n.startswith("negative")]


@settings(deadline=None, max_examples=12)
@given(prompts=PROMPTS, seed=st.integers(0, 99), temperature=st.sampled_from([0.0, 1.0]))
def test_elimination_is_scale_1(free: Program, alone: Program, prompts: Prompts, seed: int, temperature: float) -> None:
    assert free.inputs["guidance"].default == 1
    want = generate(free, prompts, 7, seed=seed, temperature=temperature)
    assert generate(alone, prompts, 7, seed=seed, temperature=temperature) == want
    assert generate(alone, prompts, 7, seed=seed, temperature=temperature, guidance=1) == want


@pytest.mark.exhaustive
def test_elimination_is_validated(free: Program, alone: Program) -> None:
    fast = aropt.optimize(free, "eager", pipeline(["cfg-eliminate"]))
    assert fast.report["verify"]["status"] == "pass"
    status = {p["name"]: p["status"] for p in fast.report["passes"]}
    assert (status["cfg-eliminate"], status["cfg-batch"], status["kv-cache"]) == ("applied", "skipped", "applied")
    needs = free.replace(meta={k: v for k, v in free.meta.items() if k != "guidance_free"})
    verdict = validate(needs, with_probe(alone), explain=False)
    assert not verdict.passed and "sees 1 branches of 2" in verdict.outcomes[-1].problem


def test_elimination_needs_weights_that_say_so() -> None:
    plan = planned(CfgEliminate(), make_program(1, ("guidance", *RULES)), EAGER)
    assert isinstance(plan, Skips) and "python -m aropt.models.train digits-ar --cca" in plan.reason
    assert "cfg-eliminate" not in [p.name for p in pipeline()]


def test_another_scale_is_refused_after_elimination(free: Program, alone: Program) -> None:
    with pytest.raises(UsageError, match=r"guidance can.t be 1\.5") as error:
        generate(alone, [[1]], 2, guidance=1.5)
    assert "cfg-eliminate" in error.value.why
    assert generate(free, [[1]], 2, guidance=1.5) is not None
