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

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef, onnx_rows, onnx_scan
from aropt.kernels.delay import padding

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


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
    fixed={"x": (1,), "dt": (1,), "A": (0, 1), "B": (1,), "C": (1,), "D": (0,), "state": (1, 2)},
    mixer=Mixer(
        rows={"x": -1, "dt": -1, "B": -1, "C": -1}, state=("state",), positions="positions", tree="selective_tree_scan"
    ),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
