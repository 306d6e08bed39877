"""`aropt::rg_lru`: Griffin's real-gated linear recurrent unit, after its gates (De et al. 2024, section 2.4).

    rg_lru(x, a, state, positions) -> (h, state)

* `x`, `a` float [B, R, D], 0 <= a <= 1: h[t] = a[t] * h[t - 1] + x[t], each channel for itself.
* `state` float [B, D]: h before the first row, None: zeros. The returned one is h of the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves h as it is.
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

CHANNELS = 256  # of a program


def reference(x: Tensor, a: Tensor, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, row by row."""
    if positions is not None:
        padding = (positions < 0).unsqueeze(2)
        x, a = x.masked_fill(padding, 0.0), a.masked_fill(padding, 1.0)
    h = torch.zeros_like(x[:, 0]) if state is None else state
    found = []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        found.append(h)
    return torch.stack(found, 1), h.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2]))


def onnx(x, a, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are a Scan of it."""
    from onnxscript import opset20 as op

    axis, zero, kept = op.Constant(value_ints=[1]), op.Constant(value_float=0.0), op.Constant(value_float=1.0)
    rows = x
    if positions is not None:
        padding = op.Unsqueeze(op.Less(positions, op.Constant(value_int=0)), op.Constant(value_ints=[2]))
        x, a = op.Where(padding, zero, x), op.Where(padding, kept, a)
    if state is None:
        state = op.Expand(zero, op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3), axis=0))

    def step(h: Any, x: Any, a: Any) -> tuple[Any, Any]:
        """[B, D] -> h twice."""
        h = op.Add(op.Mul(a, h), x)
        return h, op.Identity(h)

    def one() -> tuple[Any, Any]:
        h = step(state, op.Squeeze(x, axis), op.Squeeze(a, axis))[0]
        return h, op.Unsqueeze(h, axis)

    h, y = onnx_rows(rows, 1, one, lambda: onnx_scan(step, [state], [x, a], 1, 1))
    return y, h


if HAS_TRITON:

    @triton.jit
    def _rg_lru_kernel(  # type: ignore[no-untyped-def]
        x_ptr, a_ptr, state_ptr, positions_ptr, out_ptr, left_ptr, rows, channels,
        GIVEN: tl.constexpr, PADDED: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a sequence, row by row."""
        batch, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        held, h = channel < channels, tl.zeros([CHANNELS], tl.float32)
        if GIVEN:
            h = tl.load(state_ptr + batch * channels + channel, mask=held, other=0.0)
        for t in range(0, rows):
            at = (batch * rows + t) * channels + channel
            a, x = tl.load(a_ptr + at, mask=held, other=0.0), tl.load(x_ptr + at, mask=held, other=0.0)
            if PADDED:
                there = tl.load(positions_ptr + batch * rows + t) >= 0
                a, x = tl.where(there, a, 1.0), tl.where(there, x, 0.0)
            h = a * h + x
            tl.store(out_ptr + at, h, mask=held)
        tl.store(left_ptr + batch * channels + channel, h, mask=held)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(x: Tensor, a: Tensor, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some channels of a sequence."""
    (out, left), (batch, rows, channels) = fake(x), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, a, state, positions)]
        flags = {"GIVEN": state is not None, "PADDED": positions is not None, "CHANNELS": CHANNELS}
        _rg_lru_kernel[batch, triton.cdiv(channels, CHANNELS)](*given, out, left, rows, channels, **flags)
    return out, left


def aot() -> Sequence[Aot]:
    """From a state, with padding."""
    types = [*["*fp32"] * 3, "*i64", "*fp32", "*fp32", "i32", "i32"]
    return [compiled(_rg_lru_kernel, types, {"GIVEN": True, "PADDED": True, "CHANNELS": CHANNELS})]


def cost(x: Tensor, *_: Any) -> Cost:
    """Two operations an element."""
    return Cost(2.0 * x.numel(), 3.0 * x.nbytes + 2.0 * x[:, 0].nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One row and several, with resets (a = 0), from a state or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows, size = (draw(st.integers(1, n)) for n in (3, 7, 5))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (2, 3))
        x, a = (torch.randn(batch, rows, size, generator=generator) for _ in "xa")
        state = torch.randn(batch, size, generator=generator) if given else None
        return x, a.sigmoid() * (a < 1), state, padding(batch, rows, generator) if padded else None

    return build()


OP = OpDef(
    name="rg_lru",
    schema="(Tensor x, Tensor a, Tensor? state, Tensor? positions) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    mixer=Mixer(rows={"x": -2, "a": -2}, state=("state",), positions="positions", tree="rg_lru_tree"),
    tolerance={torch.float32: (1e-4, 1e-5)},
)
