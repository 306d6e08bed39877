"""The restricted forward is the full forward on chosen rows, or the model is refused."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from aropt.errors import Unsupported
from tests.support import grammar, sneaky
from tests.support.equivalence import Result, Subject, check, random_splits

QUICK = 10  # one case in so many runs in the quick suite; the rest is marked "exhaustive"
SLOW = [[], [pytest.mark.exhaustive]]
SPREAD = [pytest.param(*case, id=case[0], marks=SLOW[i % QUICK > 0]) for i, case in enumerate(sneaky.CASES)]


@pytest.mark.parametrize(("name", "verdict", "changes"), SPREAD)
def test_mixing_is_refused_or_exact(name: str, verdict: str, changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = sneaky.Tiny(**changes)
    if verdict == "refused":
        with pytest.raises(Unsupported) as refusal:
            check(model, sneaky.VOCAB, sneaky.CAPACITY, rounds=1)
        assert refusal.value.why and refusal.value.where
    else:
        result, _ = check(model, sneaky.VOCAB, sneaky.CAPACITY, rounds=2)
        assert result.ok and result.reach > 100 * result.floor, result


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(model=grammar.models(), seed=st.integers(0, 2**20))
def test_restricted_equals_full(model: tuple[torch.nn.Module, int, int, str], seed: int) -> None:
    module, vocab, capacity, description = model
    note(description)
    result, _ = check(module, vocab, capacity, seed)
    assert result.ok, (description, result)


@pytest.mark.exhaustive
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(model=grammar.models(), seed=st.integers(0, 2**20))
def test_restricted_equals_full_at_length(model: tuple[torch.nn.Module, int, int, str], seed: int) -> None:
    test_restricted_equals_full.hypothesis.inner_test(model, seed)  # type: ignore[attr-defined]


def test_every_split_of_a_short_sequence() -> None:
    subject = Subject(grammar.module(grammar.Shape(window=3, kv_heads=1, layers=2)), 17, 12)
    for cut in itertools.product((False, True), repeat=4):
        result = Result()
        ends = [i + 1 for i, c in enumerate(cut) if c] + [5]
        subject.compare([5, 3], [b - a for a, b in itertools.pairwise([0, *ends])], 7, result)
        assert result.ok, (ends, result)


def test_slots_in_any_order() -> None:
    """Slots and positions are independent: keys may be stored anywhere."""
    subject = Subject(grammar.module(grammar.Shape(window=4, positions="alibi", attention="flat")), 17, 12)
    state = {n: s.create({"B": 1, "S": 20}) for n, s in subject.restricted.state.items()}
    slots, ids, found = torch.randperm(20)[:9], torch.randint(0, 17, (9,)), []
    for start, rows in ((0, 4), (4, 1), (5, 4)):
        at = torch.arange(start, start + rows)
        out = subject.module(ids[None, at], slots[at], at[None], *state.values())
        state = dict(zip(state, out[1:], strict=True))
        found.append(out[0][0])
    torch.testing.assert_close(torch.cat(found).double(), subject.full(subject.model, ids), rtol=1e-5, atol=1e-5)


def test_a_wrong_position_is_noticed() -> None:
    """The comparison itself must fail when the step is told wrong positions, or loses a row."""
    subject = Subject(grammar.module(grammar.Shape(layers=2)), 17, 12)
    right = subject.module
    for broken in (
        lambda ids, at, positions, *state: right(ids, at, positions + (positions > 3), *state),
        lambda ids, at, positions, *state: right(ids, at.clamp(max=4), positions, *state),
        lambda ids, at, positions, stored, *state: right(ids, at, positions, stored.clamp(min=0), *state),
    ):
        subject.module, result = broken, Result()  # type: ignore[assignment]
        for _ in range(3):
            subject.compare([9, 4], random_splits(9, random.Random(0)), 10, result)
        assert not result.ok
