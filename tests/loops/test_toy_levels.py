"""A new kind of loop is one file: two toys, built, optimized, verified and exported like any other."""

from __future__ import annotations

import pytest

from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.loops.requests.cases import cases
from aropt.validate.compare import validate, with_probe
from tests.loops.toys import flow, scales

TOYS = {"scales": scales.program, "flow": flow.program}


@pytest.fixture(scope="module", params=TOYS)
def toy(request: pytest.FixtureRequest) -> Program:
    return TOYS[request.param]()


def test_it_is_well_formed_and_equals_itself(toy: Program) -> None:
    verify(toy)
    verdict = validate(toy, with_probe(toy), Eager(toy), cases(toy, quick=True), explain=False)
    assert verdict.passed and sum(o.tokens for o in verdict.outcomes) > 20, verdict.outcomes[-1].problem
