"""`aropt::wkv`: RWKV-4's attention without queries (Peng et al. 2023, section 3.1 and appendix D).

    wkv(k, v, w, u, num, den, top, positions) -> (y, num, den, top)

* `k`, `v` float [B, R, D]; `w` float [D] < 0, the logarithm of the decay; `u` float [D], the current row's bonus.
* y[t] = (sum over i < t of e^((t - 1 - i) w + k[i]) v[i] + e^(u + k[t]) v[t]) / (the same sum without v).
* `num`, `den`, `top` float [B, D]: both sums before the first row, times e^-top; None, or den 0: there is none before.
  The returned ones are those after the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves the sums as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef, onnx_rows, onnx_scan
from aropt.kernels.delay import padding

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LOWEST = -1e38  # a logarithm of nothing


def reference(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition, row by row, with sums relative to their largest exponent."""
    nothing = torch.zeros_like(k[:, 0])
    num, den, top = (nothing if kept is None else kept for kept in (num, den, top))
    top = torch.where(den == 0, LOWEST, top)
    found = []
    for t in range(k.shape[1]):
        largest = torch.maximum(top, k[:, t] + u)
        before, now = (top - largest).exp(), (k[:, t] + u - largest).exp()
        found.append((before * num + now * v[:, t]) / (before * den + now))
        largest = torch.maximum(top + w, k[:, t])
        before, now = (top + w - largest).exp(), (k[:, t] - largest).exp()
        after = before * num + now * v[:, t], before * den + now, largest
        if positions is not None:
            valid = (positions[:, t] >= 0).unsqueeze(1)
            after = tuple(torch.where(valid, x, y) for x, y in zip(after, (num, den, top), strict=True))  # type: ignore[assignment]
        num, den, top = after
    return torch.stack(found, 1), num.clone(), den.clone(), top.clone()


def fake(k: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    num, den, top = (k.new_empty((k.shape[0], k.shape[2])) for _ in range(3))
    return k.new_empty(k.shape), num, den, top


def onnx(k, v, w, u, num, den, top, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are a Scan of it."""
    from onnxscript import opset20 as op

    axis, zero, lowest = op.Constant(value_ints=[1]), op.Constant(value_float=0.0), op.Constant(value_float=LOWEST)
    rows = op.Shape(k, start=0, end=2)
    valid = op.Expand(op.Constant(value_float=1.0), rows)
    if positions is not None:
        valid = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
    if num is None:
        shape = op.Concat(op.Shape(k, start=0, end=1), op.Shape(k, start=2, end=3), axis=0)
        num = den = top = op.Expand(zero, shape)
    top = op.Where(op.Equal(den, zero), lowest, top)

    def step(num: Any, den: Any, top: Any, k: Any, v: Any, valid: Any) -> tuple[Any, ...]:
        """[B, D], and valid [B, 1] -> num, den, top, y."""
        bonus = op.Add(k, u)
        largest = op.Max(top, bonus)
        before, now = op.Exp(op.Sub(top, largest)), op.Exp(op.Sub(bonus, largest))
        y = op.Div(op.Add(op.Mul(before, num), op.Mul(now, v)), op.Add(op.Mul(before, den), now))
        decayed = op.Add(top, w)
        largest = op.Max(decayed, k)
        before, now = op.Exp(op.Sub(decayed, largest)), op.Exp(op.Sub(k, largest))
        after = op.Add(op.Mul(before, num), op.Mul(now, v)), op.Add(op.Mul(before, den), now), largest
        there = op.Cast(valid, to=9)
        return *(op.Where(there, x, old) for x, old in zip(after, (num, den, top), strict=True)), y

    valid = op.Unsqueeze(valid, op.Constant(value_ints=[2]))
    kept = [num, den, top]

    def one() -> tuple[Any, ...]:
        *after, y = step(*kept, *(op.Squeeze(x, axis) for x in (k, v, valid)))
        return *after, op.Unsqueeze(y, axis)

    num, den, top, y = onnx_rows(k, 1, one, lambda: onnx_scan(step, kept, [k, v, valid], 1, 1))
    return y, num, den, top


def cost(k: Tensor, *_: Any) -> Cost:
    """Twenty operations an element."""
    return Cost(20.0 * k.numel(), 3.0 * k.nbytes + 6.0 * k[:, 0].nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys small and large, from sums or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 7))
        size = like[2].shape[0] if like else draw(st.integers(1, 5))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (4, 7))
        k, v = (torch.randn(batch, rows, size, generator=generator) for _ in "kv")
        w, u = -torch.randn(size, generator=generator).exp(), torch.randn(size, generator=generator)
        num, den, top = (torch.randn(batch, size, generator=generator) for _ in range(3))
        kept = (num, den.exp(), top) if given else (None, None, None)
        positions = padding(batch, rows, generator) if padded else None
        return k * draw(st.sampled_from([1.0, 40.0])), v, w, u, *kept, positions

    return build()


OP = OpDef(
    name="wkv",
    schema="(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? num, Tensor? den, Tensor? top, Tensor? positions) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    fixed={"w": (0,), "u": (0,), "k": (2,), "v": (2,), "num": (1,), "den": (1,), "top": (1,)},
    mixer=Mixer(rows={"k": -2, "v": -2}, state=("num", "den", "top"), positions="positions", tree="wkv_tree"),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
