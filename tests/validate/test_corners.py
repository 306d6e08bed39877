"""Slips that show in a corner: each one's request shows it, and validation catches them but for what is known."""

from __future__ import annotations

from collections import Counter

import pytest

from aropt.validate.compare import validate
from tests.mutants.corners import SLIPS, answers, problem
from tests.mutants.corners.bases import base
from tests.mutants.corners.misses import MISSED

QUICK = {"rows_traded_beyond_three", "third_stop_id_unused", "top_k_beyond_8_is_8"}  # of one base, which is soon made
EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.exhaustive]) for name in SLIPS]


WHY = {name: why for why, names in MISSED.items() for name in names}
MISSES = {name: [pytest.mark.xfail(reason=why, strict=True)] for name, why in WHY.items()}
KNOWN = [pytest.param(name, marks=MISSES.get(name, [])) for name in SLIPS]


@pytest.mark.parametrize("name", EVERY)
def test_its_request_shows_a_slip(name: str) -> None:
    right, wrong = answers(name)
    assert right != wrong


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted({one.base for one in SLIPS.values()}))
def test_right_programs_pass(name: str) -> None:
    found = base(name)
    verdict = validate(found.reference, found.program)
    assert verdict.passed, verdict.outcomes[-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KNOWN)
def test_validation_catches_it(name: str) -> None:
    assert problem(name)


def test_there_are_enough_kinds() -> None:
    assert len(SLIPS) >= 150 and set(WHY) <= set(SLIPS)
    assert len({one.base for one in SLIPS.values()}) >= 10
    assert min(Counter(one.family for one in SLIPS.values()).values()) >= 5
