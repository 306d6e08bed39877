"""Draws by another rule than the reference's: those of another distribution are seen, those of lossy rules measured."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import UsageError
from aropt.ir.interpreter import Eager
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.validate import draws
from aropt.validate.compare import Case, cases, validate, with_probe
from aropt.validate.draws import RARE, Draws, place, shifted
from aropt.validate.oracle import Oracle
from aropt.validate.replay import otherwise
from tests.support.accept_programs import SLIPS, captured, drafted, passes, slipped

SLOW = pytest.mark.exhaustive


def some(told: str = "") -> list[Case]:
    """A few of the requests that a program is compared on, whose names tell this."""
    return [one for one in cases(captured(), quick=True) if told in one.name][:9]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=1, max_size=9))
def test_places_of_ids_part_the_interval(weights: list[float]) -> None:
    """Each id has as much of it as its chance, the likelier ones first."""
    p = torch.tensor([*weights, 1.0], dtype=torch.float64)
    p = p / p.sum()
    ends = sorted((place(p, i, 0.0), place(p, i, 1.0), float(p[i])) for i in range(len(p)))
    assert ends[0][0] == 0 and math.isclose(ends[-1][1], 1)
    for (_, end, before), (start, _, after) in itertools.pairwise(ends):
        assert math.isclose(end, start, abs_tol=1e-12) and (before >= after or not before)
    assert all(math.isclose(end - start, chance, abs_tol=1e-12) for start, end, chance in ends)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_shift_is_the_largest_distance(places: list[float]) -> None:
    """Just before and at each place, of the share of places up to there from the uniform one."""
    at = [sum(x <= y for x in places) / len(places) - y for y in places]
    before = [y - sum(x < y for x in places) / len(places) for y in places]
    assert math.isclose(shifted(torch.tensor(places, dtype=torch.float64)), max(at + before), abs_tol=1e-12)


def test_chance_bounds_how_often_uniform_places_are_as_far() -> None:
    """In 4000 tries of 50 places; the bound is within twice of what is seen."""
    found = [Draws(shifted(x), 50) for x in torch.rand(4000, 50, generator=torch.Generator().manual_seed(0)).double()]
    for chance in (0.5, 0.1, 0.01):
        often = sum(one.chance <= chance for one in found) / len(found)
        assert chance / 2 - 0.004 < often < chance + 0.004


def test_rejection_is_validated() -> None:
    """Greedy ids one by one, drawn ones by their distribution."""
    verdict = validate(captured(), with_probe(drafted("rejection", "2x2")), chosen=some())
    assert verdict.passed and verdict.outcomes[-1].case.name == "draws" and verdict.outcomes[-1].tokens > 3000
    assert verdict.metrics()["shift_chance"] > RARE and verdict.metrics()["shift"] < 0.04
    assert verdict.metrics()["redrawn"] > 1000 and verdict.metrics()["others"] <= 1


@pytest.mark.parametrize("slip", [list(SLIPS)[2], *(pytest.param(s, marks=SLOW) for s in list(SLIPS)[:2])])
def test_slips_are_seen_in_the_distribution(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = with_probe(slipped(slip, monkeypatch))
    outcome, found = draws.compared(Oracle(captured()), wrong, Eager(wrong))
    assert found is not None and found.chance < RARE and "do not have the reference's distribution" in outcome.problem


@pytest.mark.parametrize("slip", [list(SLIPS)[3], *(pytest.param(s, marks=SLOW) for s in list(SLIPS)[0:3:2])])
def test_slips_are_seen_when_rounds_are_drawn_again(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first request that draws, those too that hardly shift the distribution."""
    verdict = validate(captured(), with_probe(slipped(slip, monkeypatch)), chosen=some("temperature"), explain=False)
    assert "have other ids than their rule gives" in verdict.outcomes[-1].problem
    assert all(one.passed for one in verdict.outcomes[:-1]) and verdict.outcomes[-1].case.name != "draws"


def test_a_slip_of_the_tables_is_seen() -> None:
    """Parents that are others make drafts of other nodes; one round that rounding may have turned is none."""
    program = drafted("rejection", "2x2")
    parents = {"trees.accept_rejection.parents": torch.tensor([-1, 0, 0, 2, 2, 1, 1])}
    wrong = with_probe(program.replace(weights={**program.weights, **parents}))
    assert not validate(captured(), wrong, chosen=some("temperature"), explain=False).passed
    assert not otherwise([False] + [True] * 9) and otherwise([False] * 2 + [True] * 9)


def test_an_id_that_is_never_drawn_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """With temperature 1 alone such a program draws as it should."""
    wrong = with_probe(slipped("top-k is forgotten", monkeypatch))
    found = draws.measure(Oracle(captured()), wrong, Eager(wrong))
    assert found is not None and found.chance > RARE and not found.wrong
    failed = validate(captured(), wrong, chosen=some("top_k"), explain=False).outcomes[-1]
    assert failed.case.name != "draws" and "the reference's rule picks" in failed.problem


def test_batches_are_as_small_as_drafts_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that draws by another rule in none of the requests is no evidence."""
    program = captured()
    for one in passes("rejection", "chain:2", "few_draft", most=1):
        program = one.run(program)
    monkeypatch.setattr(draws, "IDS", 100)
    found = draws.measure(Oracle(captured()), program, Eager(program))
    assert found is not None and found.count > 50
    monkeypatch.setattr(draws, "BATCHES", (8,))
    outcome, found = draws.compared(Oracle(captured()), program, Eager(program))
    assert found is None and "no id is drawn" in outcome.problem


def test_lossy_rules_keep_to_a_budget_of_their_shift() -> None:
    """Another one says nothing of what they lose."""
    chosen = passes("typical", "chain:2", "few_draft")
    for budget in ({}, {"kl": 0.1, "top1": 0.9}):
        with pytest.raises(UsageError, match="shift"):
            run_passes(captured(), chosen, "eager", Instruments(budget=budget))
    results = run_passes(captured(), chosen, "eager", Instruments(budget={"shift": 0.02}, check=False)).results
    assert results[-1].status == "reverted" and "shift 0.1" in results[-1].reason


@pytest.mark.parametrize("rule", ["typical", pytest.param("grouped", marks=SLOW)])
def test_the_report_names_what_was_lost(rule: str) -> None:
    made = aropt.optimize(captured(), "eager", passes(rule, "chain:2", "few_draft"), budget={"shift": 0.3}, threads=1)
    (level,) = [p["level"] for p in made.report["passes"] if p["name"] == "tree-draft"]
    drift = made.report["drift"]
    assert (level, made.report["verify"]["status"], drift["top1"]) == ("lossy", "pass", 1.0)
    assert 0.02 < drift["shift"] < 0.3 and drift["drawn"] > 3000 and drift["budget"] == {"shift": 0.3}
