"""TiDAR and NBDiff: what is trained is what is asked for in generation, and the loops of blocks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.ir.program import Program
from aropt.models.canvas import MASK, CausalLM
from aropt.recipes import ptg_survey
from aropt.recipes.nbdiff import Both, NBDiff, Stored, generate, whole

CAPACITY, NEW = 48, 14
PROMPT = [5, 6, 7, 5, 6]


@cache
def small() -> NBDiff:
    torch.manual_seed(1)
    model = NBDiff.__new__(NBDiff)
    CausalLM.__init__(model, width=32, layers=2, heads=2, hidden=32)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.mul_(6)
    return model.eval()


@cache
def captured() -> Program:
    return aropt.capture(small(), capacity=CAPACITY)


@given(st.integers(0, 999), st.sampled_from([2, 4, 8]))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_block_is_trained_as_it_is_written(seed: int, block: int) -> None:
    """Each block of the second half is the active one after the text before it; the first half is the causal model."""
    ids = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(seed))
    noisy = torch.where(torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < 0.5, MASK, ids)
    following, other = small().beside(ids, noisy, block)
    assert torch.allclose(following, small()(ids), atol=1e-4)
    for start in range(0, 16, block):
        rows = torch.cat([ids[:, :start], noisy[:, start : start + block]], 1)
        assert torch.allclose(other[:, start : start + block], small().active(rows, start)[:, start:], atol=1e-4)


@pytest.mark.parametrize("threshold", [0.3, 2.0])
@pytest.mark.parametrize("block", [1, 3])
def test_the_cache_is_exact_after_a_causal_pass_alone(block: int, threshold: float) -> None:
    apart = {}
    for clean in (True, False):
        stored = Stored.of(captured(), clean)
        both = Both((stored.active, stored.causal), whole(small()))
        found = generate(both.active, both.causal, PROMPT, NEW, block, threshold)
        apart[clean] = both.apart
        if clean:
            assert found == generate(*whole(small()), PROMPT, NEW, block, threshold)
    assert apart[True] < 1e-3
    assert block == 1 or apart[False] > 1e-2


def test_blocks_of_one_id_are_plain_decoding_and_forwards_are_counted() -> None:
    found = generate(*whole(small()), PROMPT, NEW, 1, 2.0)
    assert found.ids == aropt.generate(captured(), [PROMPT], NEW, plain=True)[0]
    assert (found.rounds, found.passes) == (0, NEW + 1)
    by_one = generate(*whole(small()), PROMPT, NEW, 4, 2.0)
    at_once = generate(*whole(small()), PROMPT, NEW, 4, -1.0)
    blocks = -(-NEW // 4)
    assert (by_one.rounds, by_one.passes) == (3 * blocks, blocks + 1)
    assert (at_once.rounds, at_once.passes) == (blocks, blocks + 1)


def test_what_the_survey_names_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ptg_survey.coverage().holds
    monkeypatch.setattr(ptg_survey, "FAMILIES", (ptg_survey.Family("all", ("no-pass",)),))
    assert not ptg_survey.coverage().holds
    monkeypatch.setattr(ptg_survey, "FAMILIES", (ptg_survey.Family("all", (), ("no-loop",)),))
    assert not ptg_survey.coverage().holds
