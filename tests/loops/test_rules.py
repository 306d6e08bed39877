"""Rules against transformers' logits processors, and properties of the draw."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from aropt.errors import UsageError
from aropt.ir import ops
from aropt.loops import rules

ops.load_all()
FINITE = st.floats(-8, 8, width=32)


def logits(rows: int = 3, size: int = 11) -> st.SearchStrategy[torch.Tensor]:
    """float32 [rows, size] without ties: what ties keep is a choice, and ours differs from transformers'."""
    unique = st.lists(FINITE, min_size=rows * size, max_size=rows * size, unique=True)
    return unique.map(lambda x: torch.tensor(x).reshape(rows, size))


@settings(max_examples=60, deadline=None)
@given(logits(), st.integers(1, 15))
def test_top_k_is_transformers(x: torch.Tensor, k: int) -> None:
    assert torch.equal(rules.top_k(x, torch.tensor(k)), TopKLogitsWarper(k)(None, x.clone()))


@settings(max_examples=60, deadline=None)
@given(logits(), st.floats(0.05, 0.99))
def test_top_p_is_transformers(x: torch.Tensor, p: float) -> None:
    ours, theirs = rules.top_p(x, torch.tensor(p)), TopPLogitsWarper(p)(None, x.clone())
    differ = torch.isinf(ours) != torch.isinf(theirs)
    ordered = torch.softmax(x, -1).sort(-1, descending=True).values.cumsum(-1)
    near = ((ordered - p).abs() < 1e-5).any(-1)  # the two sum in opposite directions
    assert not differ[~near].any()


@pytest.mark.parametrize("p", [0.0, 0.2, 0.25, 0.5, 0.6, 0.99])
def test_top_p_of_equal_logits_keeps_as_many_as_transformers(p: float) -> None:
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0, 1.0, -torch.inf]])
    ours, theirs = rules.top_p(x, torch.tensor(p)), TopPLogitsWarper(p)(None, x.clone())
    assert torch.isfinite(ours).sum() == torch.isfinite(theirs).sum()
    assert torch.equal(ours[0].sort().values, theirs[0].sort().values)


@settings(max_examples=60, deadline=None)
@given(logits(), st.floats(0.01, 0.9))
def test_min_p_is_transformers(x: torch.Tensor, p: float) -> None:
    ours, theirs = rules.min_p(x, torch.tensor(p)), MinPLogitsWarper(p)(None, x.clone())
    ratio = torch.softmax(x, -1) / torch.softmax(x, -1).amax(-1, keepdim=True)
    clear = (ratio - p).abs() > 1e-5
    assert torch.equal(torch.isinf(ours)[clear], torch.isinf(theirs)[clear])


@settings(max_examples=40, deadline=None)
@given(logits(), st.floats(0.5, 2), st.lists(st.integers(0, 10), min_size=1, max_size=6))
def test_repetition_penalty_is_transformers(x: torch.Tensor, penalty: float, ids: list[int]) -> None:
    seen = torch.zeros(3, 11, dtype=torch.bool)
    seen[:, ids] = True
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids] * 3), x.clone())
    torch.testing.assert_close(rules.repetition_penalty(x, torch.tensor(penalty), seen), theirs)


def test_suppressed_ids_are_transformers() -> None:
    x, ids, ends = torch.randn(2, 9), torch.tensor([4, 0, 8]), torch.tensor([3, 7])
    for length in (5, 6, 7):  # the prompt has five tokens
        text, count = torch.zeros(2, length, dtype=torch.int64), torch.tensor(length - 5)
        for theirs, ours in (
            (SuppressTokensLogitsProcessor(ids.tolist()), rules.suppress_tokens(x, ids)),
            (SuppressTokensAtBeginLogitsProcessor(ids.tolist(), 5), rules.begin_suppress_tokens(x, ids, count)),
            (
                MinNewTokensLengthLogitsProcessor(5, 2, ends.tolist()),
                rules.min_new_tokens(x, torch.tensor(2), count, ends),
            ),
        ):
            assert torch.equal(theirs(text, x.clone()), ours)
    assert torch.equal(rules.suppress_tokens(x, torch.tensor([-1])), x)


def test_off_means_off() -> None:
    x = torch.randn(2, 9)
    assert torch.equal(rules.top_k(x, torch.tensor(0)), x)
    assert torch.equal(rules.top_p(x, torch.tensor(1.0)), x)
    assert torch.equal(rules.min_p(x, torch.tensor(0.0)), x)


def test_guidance() -> None:
    x = torch.randn(4, 5)
    torch.testing.assert_close(rules.guidance(x, torch.tensor(1.0)), x[:2])
    torch.testing.assert_close(rules.guidance(x, torch.tensor(0.0)), x[2:])
    torch.testing.assert_close(rules.guidance(x, torch.tensor(2.0)), 2 * x[:2] - x[2:])


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_draw_samples_the_distribution() -> None:
    """Chi-square over 40,000 draws; the 99.9 % point with 6 degrees of freedom is 22.46. A wrong one must fail."""
    x = torch.tensor([0.5, -1.0, 2.0, 0.0, 1.0, -0.5, 1.5])
    n = 40_000
    tokens = rules.draw(x.expand(n, -1), torch.tensor(5), torch.arange(n), torch.full((n,), 3))
    counts = torch.bincount(tokens, minlength=7).numpy()
    assert chi_square(counts, torch.softmax(x, -1).numpy()) < 22.46
    assert chi_square(counts, torch.softmax(x / 1.1, -1).numpy()) > 22.46


def test_unknown_rule_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown rule 'top-q'"):
        rules.chosen(("top-q",))
