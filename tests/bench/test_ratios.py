"""Ratios of figures of several rows: of their sums, with bounds that belong to them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aropt.bench.ratios import over

FIGURES = st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=12)


@given(FIGURES, st.integers(1, 9))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_a_ratio_is_that_of_the_sums(figures: list[tuple[float, float]], times: int) -> None:
    found, each = over(figures), [a / b for a, b in figures]
    assert found["all"] == pytest.approx(sum(a for a, _ in figures) / sum(b for _, b in figures))
    assert min(each) <= found["low"] * (1 + 1e-9) and found["low"] <= found["high"] <= max(each) * (1 + 1e-9)
    assert min(each) <= found["p10"] <= found["median"] * (1 + 1e-9) and found["n"] == len(figures)
    more = over([(times * a, b) for a, b in figures])
    assert more["all"] == pytest.approx(times * found["all"]) and more["low"] == pytest.approx(times * found["low"])


def test_bounds_get_narrower_with_more_rows() -> None:
    few, many = over([(1, 1), (3, 1)] * 3), over([(1, 1), (3, 1)] * 50)
    assert few["all"] == many["all"] == 2 and many["high"] - many["low"] < few["high"] - few["low"]
    alike = over([(6, 3)] * 5)
    assert alike["low"] == alike["high"] == 2
