"""`aropt::wkv`: RWKV-4's attention without queries (Peng et al. 2023, section 3.1 and appendix D).

    wkv(k, v, w, u, num, den, top, positions) -> (y, num, den, top)

* `k`, `v` float [B, R, D]; `w` float [D] < 0, the logarithm of the decay; `u` float [D], the current row's bonus.
* y[t] = (sum over i < t of e^((t - 1 - i) w + k[i]) v[i] + e^(u + k[t]) v[t]) / (the same sum without v).
* `num`, `den`, `top` float [B, D]: both sums before the first row, times e^-top; None, or den 0: there is none before.
  The returned ones are those after the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves the sums as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, Mixer, OpDef, onnx_rows, onnx_scan
from aropt.kernels.delay import compiled, padding, refused

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LOWEST = -1e38  # a logarithm of nothing
CHANNELS = 128  # of a program


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


if HAS_TRITON:

    @triton.jit
    def added(num, den, top, v, score):  # type: ignore[no-untyped-def]
        """Both sums and their largest exponent, with one value more."""
        largest = tl.maximum(top, score)
        before, now = tl.exp(top - largest), tl.exp(score - largest)
        return before * num + now * v, before * den + now, largest

    @triton.jit
    def _wkv_kernel(  # type: ignore[no-untyped-def]
        k_ptr, v_ptr, w_ptr, u_ptr, num_ptr, den_ptr, top_ptr, positions_ptr, out_ptr, nums_ptr, dens_ptr, tops_ptr,
        rows, channels, GIVEN: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a sequence, row by row."""
        batch, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        held, at = channel < channels, batch * channels + channel
        w, u = tl.load(w_ptr + channel, mask=held, other=0.0), tl.load(u_ptr + channel, mask=held, other=0.0)
        num, den = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
        top = tl.full([CHANNELS], -1e38, tl.float32)
        if GIVEN:
            num, den = tl.load(num_ptr + at, mask=held, other=0.0), tl.load(den_ptr + at, mask=held, other=0.0)
            top = tl.where(den == 0, top, tl.load(top_ptr + at, mask=held, other=0.0))
        for t in range(0, rows):
            place = (batch * rows + t) * channels + channel
            k, v = tl.load(k_ptr + place, mask=held, other=0.0), tl.load(v_ptr + place, mask=held, other=0.0)
            over, under, _ = added(num, den, top, v, k + u)
            tl.store(out_ptr + place, over / under, mask=held)
            over, under, largest = added(num, den, top + w, v, k)
            if PADDED:
                there = tl.load(positions_ptr + batch * rows + t) >= 0
                over, under = tl.where(there, over, num), tl.where(there, under, den)
                largest = tl.where(there, largest, top)
            num, den, top = over, under, largest
        tl.store(nums_ptr + at, num, mask=held)
        tl.store(dens_ptr + at, den, mask=held)
        tl.store(tops_ptr + at, top, mask=held)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs the Triton kernel: a program for some channels of a sequence."""
    k, num, positions = args[0], args[4], args[7]
    made, (batch, rows, channels) = fake(k), k.shape
    if k.numel():
        given = [k if t is None else t.contiguous() for t in args]
        flags = {"GIVEN": num is not None, "PADDED": positions is not None, "CHANNELS": CHANNELS}
        _wkv_kernel[batch, triton.cdiv(channels, CHANNELS)](*given, *made, rows, channels, **flags)
    return made


def aot() -> Sequence[Aot]:
    """From a state, with padding."""
    types = [*["*fp32"] * 7, "*i64", *["*fp32"] * 4, "i32", "i32"]
    return [compiled(_wkv_kernel, types, {"GIVEN": True, "PADDED": True, "CHANNELS": CHANNELS})]


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
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"w": (0,), "u": (0,), "k": (2,), "v": (2,), "num": (1,), "den": (1,), "top": (1,)},
    mixer=Mixer(rows={"k": -2, "v": -2}, state=("num", "den", "top"), positions="positions", tree="wkv_tree"),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
