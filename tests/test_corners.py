"""Slips that show in a corner: each one's request shows it."""

from __future__ import annotations

from collections import Counter

import pytest

from aropt.validate import validate
from tests.mutants.corners import SLIPS, answers
from tests.mutants.corners.bases import base

QUICK = {"rows_traded_beyond_three", "third_stop_id_unused", "top_k_beyond_8_is_8"}  # of one base, which is soon made
EVERY = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.exhaustive]) for name in SLIPS]


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


def test_there_are_enough_kinds() -> None:
    assert len(SLIPS) >= 150
    assert len({one.base for one in SLIPS.values()}) >= 10
    assert min(Counter(one.family for one in SLIPS.values()).values()) >= 5
