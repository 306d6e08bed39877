"""The theory of `aropt/recipes/mesa.py` on random weights: both forms, both modules, and what a step of descent is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aropt.recipes.mesa import (
    SIZE,
    Turns,
    beside_step,
    continued,
    gradient_step,
    ones,
    parallel,
    recurrent,
    sequences,
    signs,
    single,
)

DRAWS = st.sampled_from([signs, ones, single])


def drawn(draw: object, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = sequences(draw(4, generator), generator)  # type: ignore[operator]
    PV, KQ = (torch.randn(n, 2 * SIZE, generator=generator).double() for n in (SIZE, 2 * SIZE))
    return x, PV, KQ


@given(DRAWS, st.integers(0, 999))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_products_of_rows_are_a_recurrence(draw: object, seed: int) -> None:
    x, PV, KQ = drawn(draw, seed)
    assert torch.allclose(parallel(x, PV, KQ), recurrent(x, PV, KQ), rtol=0, atol=1e-11)


@given(DRAWS, st.integers(0, 999))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_the_step_is_that_of_the_gradient(draw: object, seed: int) -> None:
    """By autograd, of the squared errors of W x[i] beside x[i + 1] for all pairs before t, from W = 0."""
    x, *_ = drawn(draw, seed)
    for t in (1, 5):
        W = torch.zeros(SIZE, SIZE, dtype=x.dtype, requires_grad=True)
        errors = (x[0, :t] @ W.T - x[0, 1 : t + 1]).abs().square().sum()
        (gradient,) = torch.autograd.grad(errors, W)
        assert torch.allclose(gradient_step(x)[0, t - 1], -gradient / 2 / t @ x[0, t], rtol=0, atol=1e-12)


def test_a_layer_that_is_a_step_has_cosine_one_and_another_has_not() -> None:
    x, PV, KQ = drawn(signs, 0)
    PV, KQ = torch.zeros_like(PV), torch.zeros_like(KQ)
    PV[:, :SIZE], KQ[SIZE:, :SIZE] = torch.eye(SIZE), 0.5 * torch.eye(SIZE)
    cosine, size, _ = beside_step(x, parallel(x, PV, KQ))
    assert cosine == pytest.approx(1) and size == pytest.approx(0.5)
    PV[0, 1] = 0.3
    assert beside_step(x, parallel(x, PV, KQ))[0] < 0.99


@given(st.integers(0, 999))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_both_modules_are_the_layer(seed: int) -> None:
    """On ids, in fp32, with real numbers alone: by the op, by products, and as the complex form says."""
    _, PV, KQ = drawn(signs, seed)
    ids = torch.randint(8 * SIZE, (2, 9), generator=torch.Generator().manual_seed(seed))
    by_op, by_products = (Turns(PV, KQ, scan)(ids) for scan in (True, False))
    assert torch.allclose(by_op, by_products, atol=1e-4)
    codes = torch.complex(*Turns(PV, KQ, True).codes.double().chunk(2, 1))
    want = (parallel(codes[ids], PV, KQ).conj() @ codes.T).real
    assert torch.allclose(by_op.double(), want, atol=1e-4)


def test_what_follows() -> None:
    assert continued(0, 3)[:4] == [6, 1, 4, 7] and continued(17, 16)[:2] == [23, 22]
