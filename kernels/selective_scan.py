"""`aropt::selective_scan`: Mamba's selective state space, a decay for each channel and state (Gu & Dao 2023, 3).

    selective_scan(x, dt, A, B, C, D, state, positions) -> (y, state)

* `x` float [B, D, R]: channels, then rows. `dt` float [B, D, R] >= 0, after its softplus. `A` float [D, N] < 0.
* `B`, `C` float [B, N, R]. `D` float [D] or None.
* h[t] = exp(dt[t] * A) * h[t - 1] + dt[t] * B[t] * x[t]  and  y[t] = sum over N of h[t] * C[t] + D * x[t].
* `state` float [B, D, N]: h before the first row, None: zeros. The returned one is h of the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves h as it is.

Decays differ in each channel and state, so that no product of matrices gives all rows: they are computed in turn (the
names are those of mamba_ssm).
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

ELEMENTS = 1024  # of h in a program


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, row by row."""
    dt = dt if positions is None else dt * (positions >= 0).unsqueeze(1)
    h = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    found = []
    for t in range(x.shape[2]):
        h, y = row(h, x, dt, A, B, C, t)
        found.append(y)
    y = torch.stack(found, 2)
    y = y if D is None else y + D.unsqueeze(1) * x
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (y, h))  # type: ignore[return-value]


def row(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """h after row t and its y [B, D] without D."""
    size = dt[..., t, None]
    h = (size * A).exp() * h + size * B[:, None, :, t] * x[..., t, None]
    return h, (h * C[:, None, :, t]).sum(2)


def fake(x: Tensor, dt: Any, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], *A.shape))


def onnx(x, dt, A, B, C, D, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are a Scan of it."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    if positions is not None:
        valid = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
        dt = op.Mul(dt, op.Unsqueeze(valid, ints(1)))
    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), ints(*map(int, A.shape)), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), shape)

    def step(h: Any, x: Any, dt: Any, b: Any, c: Any) -> tuple[Any, Any]:
        """[B, D, N], [B, D, 1] twice, [B, 1, N] twice -> h, y [B, D]."""
        h = op.Add(op.Mul(op.Exp(op.Mul(dt, A)), h), op.Mul(op.Mul(dt, b), x))
        return h, op.ReduceSum(op.Mul(h, c), ints(2), keepdims=0)

    def one() -> tuple[Any, Any]:
        h, y = step(state, x, dt, op.Transpose(B, perm=[0, 2, 1]), op.Transpose(C, perm=[0, 2, 1]))
        return h, op.Unsqueeze(y, ints(2))

    def several() -> Any:
        rows = [op.Unsqueeze(value, ints(axis)) for value, axis in ((x, 2), (dt, 2), (B, 1), (C, 1))]
        return onnx_scan(step, [state], rows, 3, 2)

    h, y = onnx_rows(x, 2, one, several)
    return y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, ints(1)), x)), h


if HAS_TRITON:

    @triton.jit
    def _selective_kernel(  # type: ignore[no-untyped-def]
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, direct_ptr, state_ptr, positions_ptr, out_ptr, left_ptr,
        rows, channels, width, DIRECT: tl.constexpr, GIVEN: tl.constexpr, PADDED: tl.constexpr,
        CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a sequence, row by row."""
        batch, n = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        held, wide = channel < channels, n < width
        inside, cell = held[:, None] & wide[None, :], channel[:, None] * width + n[None, :]
        first, kept = (batch * channels + channel) * rows, batch * channels * width + cell
        a, h = tl.load(a_ptr + cell, mask=inside, other=0.0), tl.zeros([CHANNELS, WIDTH], tl.float32)
        if GIVEN:
            h = tl.load(state_ptr + kept, mask=inside, other=0.0)
        if DIRECT:
            direct = tl.load(direct_ptr + channel, mask=held, other=0.0)
        for t in range(0, rows):
            dt = tl.load(dt_ptr + first + t, mask=held, other=0.0)
            x = tl.load(x_ptr + first + t, mask=held, other=0.0)
            b = tl.load(b_ptr + (batch * width + n) * rows + t, mask=wide, other=0.0)
            c = tl.load(c_ptr + (batch * width + n) * rows + t, mask=wide, other=0.0)
            if PADDED:
                dt = tl.where(tl.load(positions_ptr + batch * rows + t) >= 0, dt, 0.0)
            h = tl.exp(dt[:, None] * a) * h + dt[:, None] * b[None, :] * x[:, None]
            y = tl.sum(h * c[None, :], 1)
            if DIRECT:
                y += direct * x
            tl.store(out_ptr + first + t, y, mask=held)
        tl.store(left_ptr + kept, h, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given) or ("a program holds all states of a channel" if given[2].shape[1] > ELEMENTS // 4 else None)


def tiles(width: int) -> dict[str, int]:
    """Of a program, so that it stays in registers."""
    states = 1 << (width - 1).bit_length()
    return {"CHANNELS": ELEMENTS // states, "WIDTH": states}


def launch(*args: Any) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some channels of a sequence."""
    x, A, D, state, positions = args[0], args[2], *args[5:]
    (out, left), (batch, channels, rows), width = fake(x, None, A), x.shape, A.shape[1]
    if out.numel():
        given, held = [out if t is None else t.contiguous() for t in args], tiles(width)
        flags = {"DIRECT": D is not None, "GIVEN": state is not None, "PADDED": positions is not None}
        grid = batch, triton.cdiv(channels, held["CHANNELS"])
        _selective_kernel[grid](*given, out, left, rows, channels, width, **flags, **held)
    return out, left


def aot() -> Sequence[Aot]:
    """Mamba's 16 states and more, from a state, with padding."""
    types, flags = (
        [*["*fp32"] * 7, "*i64", "*fp32", "*fp32", *["i32"] * 3],
        dict.fromkeys(("DIRECT", "GIVEN", "PADDED"), True),
    )
    return [compiled(_selective_kernel, types, {**flags, **tiles(n)}) for n in (16, 256)]


def cost(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any) -> Cost:
    """Six operations an element of the state and row; the state in and out."""
    state = x.shape[0] * A.numel()
    return Cost(6.0 * state * x.shape[2], float(2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes + 8 * state))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One row and several, from a state or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 7))
        channels, width = like[2].shape if like else (draw(st.integers(1, 5)), draw(st.integers(1, 4)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        skip, given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (5, 6, 7))
        shapes = ((batch, channels, rows), (batch, channels, rows), (channels, width), (batch, width, rows),
                  (batch, width, rows), (channels,), (batch, channels, width))  # fmt: skip
        x, dt, decay, b, c, direct, state = (torch.randn(shape, generator=generator) for shape in shapes)
        positions = padding(batch, rows, generator) if padded else None
        dt = torch.nn.functional.softplus(dt)
        return x, dt, -decay.exp(), b, c, direct if skip else None, state if given else None, positions

    return build()


OP = OpDef(
    name="selective_scan",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? positions) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (1,), "dt": (1,), "A": (0, 1), "B": (1,), "C": (1,), "D": (0,), "state": (1, 2)},
    mixer=Mixer(
        rows={"x": -1, "dt": -1, "B": -1, "C": -1}, state=("state",), positions="positions", tree="selective_tree_scan"
    ),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
