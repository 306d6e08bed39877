"""The n-gram that judges guided answers, and the windows that text-mdlm's tuning reads."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aropt.models.tune_canvas import BLANKS, flat
from perf.guided import DEFAULT, Measured, NGram, described, hashed, rival

TEXT = list(b"the cat sat on the mat. the dog sat on the cat. " * 3)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 15), min_size=1, max_size=9))
def test_the_judge_is_a_distribution(before: list[int]) -> None:
    judge = NGram(np.array(TEXT) % 16, 16)
    chances = [math.exp(-judge.nll([0] * 6 + before + [i], 6 + len(before))) for i in range(16)]
    assert sum(chances) == pytest.approx(1)


def test_the_judge_likes_what_it_has_read() -> None:
    judge = NGram(np.array(TEXT), 128)
    assert judge.nll(TEXT, 10) < 0.3 < math.log(128) / 2 < judge.nll(TEXT[::-1], 10)


@given(st.lists(st.integers(0, 300), min_size=3, max_size=12), st.integers(0, 3))
def test_contexts_have_keys_of_their_own(ids: list[int], order: int) -> None:
    keys = hashed(np.array(ids), order)
    contexts = [tuple(ids[i - order : i]) for i in range(order, len(ids))]
    assert len(keys) == len(contexts)
    for (a, x), (b, y) in pairwise(sorted(zip(contexts, keys.tolist(), strict=True))):
        assert (a == b) == (x == y)


@given(st.lists(st.sampled_from([32, 32, 32, 65]), min_size=1, max_size=60), st.integers(BLANKS, 20))
def test_windows_without_long_blanks(ids: list[int], length: int) -> None:
    want = [i for i in range(len(ids) - length + 1) if bytes([32] * BLANKS) not in bytes(ids[i : i + length])]
    assert flat(torch.tensor(ids), length).tolist() == want


Row = tuple[int, float]  # forwards, the judge's nats
ROWS = st.tuples(st.integers(1, 50), st.sampled_from([0.5, 1.0, 1.5]))


@given(guided=ROWS, free=st.dictionaries(st.integers().map(str), ROWS, min_size=1, max_size=5))
def test_a_rival_is_the_slowest_that_is_not_better(
    guided: tuple[int, float], free: dict[str, tuple[int, float]]
) -> None:
    free = {DEFAULT: (7, 1.5), **free}
    made = {
        n: Measured([f, f], [1.0, 1.0], [nll, nll], [[32], [1]]) for n, (f, nll) in {**free, "guide": guided}.items()
    }
    found = rival(made["guide"], {n: m for n, m in made.items() if n != "guide"})
    first, *others = described("guide", made)["against"]
    assert first["name"] == DEFAULT and first["fewer"] == pytest.approx(free[DEFAULT][0] / guided[0])
    assert first["worse_by"] == pytest.approx(guided[1] - free[DEFAULT][1])
    no_better = {n: f for n, (f, nll) in free.items() if nll >= guided[1]}
    assert (found is None) == (not no_better) == (not others)
    if found is not None:
        assert no_better[found] == max(no_better.values())
        assert others[0]["name"] == found and others[0]["worse_by"] <= 0
        assert others[0]["fewer"] == pytest.approx(no_better[found] / guided[0])
