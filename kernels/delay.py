"""`aropt::delay`: each row of a sequence as it was some rows before: token shift, and the taps of causal convolutions.

    delay(x, rows, state, positions) -> (y, state)

* `x` [B, R, F]: y[:, t] = x[:, t - rows], and zeros before the first row.
* `state` [B, rows, F]: the rows before the first one, the latest last; None: zeros. The returned one holds the last.
* `positions` int64 [B, R] or None: rows at -1 are padding and come first; no later row gets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef, onnx_rows

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def joined(x: Tensor, state: Tensor, positions: Tensor | None) -> Tensor:
    """The state and the rows [B, S + R, F] in a row, padding before both, at rows that nothing reads."""
    inputs = torch.cat([state, x], 1)
    if positions is None:
        return inputs
    place, pads = torch.arange(inputs.shape[1], device=x.device), (positions < 0).sum(1, keepdim=True)
    place = torch.where(place >= state.shape[1] + pads, place, (place - pads).clamp(min=0))  # [B, S + R]
    return inputs.gather(1, place.unsqueeze(2).expand_as(inputs))


def reference(x: Tensor, rows: int, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition."""
    before = x.new_zeros(x.shape[0], rows, x.shape[2]) if state is None else state
    inputs = joined(x, before, positions)
    y, state = inputs[:, : x.shape[1]], inputs[:, x.shape[1] :]
    return y.clone(memory_format=torch.contiguous_format), state.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, rows: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], rows, x.shape[2]))


def onnx_joined(x: Any, state: Any, positions: Any, axis: int, single: bool) -> Any:
    """`joined` in standard ONNX ops, rows at an axis of three; `single`: there is one row."""
    from onnxscript import opset20 as op

    inputs = op.Concat(state, x, axis=axis)
    if positions is None:
        return inputs
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    if single:
        first = op.Slice(
            state, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]), op.Constant(value_ints=[axis])
        )
        padding = op.Unsqueeze(op.Less(positions, zero), op.Constant(value_ints=[3 - axis]))
        return op.Where(padding, op.Concat(first, state, axis=axis), inputs)
    pads = op.ReduceSum(op.Cast(op.Less(positions, zero), to=7), op.Constant(value_ints=[1]), keepdims=1)
    kept = op.Squeeze(op.Shape(state, start=axis, end=axis + 1))
    place = op.Range(zero, op.Squeeze(op.Shape(inputs, start=axis, end=axis + 1)), one)
    place = op.Where(op.GreaterOrEqual(place, op.Add(pads, kept)), place, op.Max(op.Sub(place, pads), zero))
    place = op.Expand(op.Unsqueeze(place, op.Constant(value_ints=[3 - axis])), op.Shape(inputs))
    return op.GatherElements(inputs, place, axis=axis)


def onnx(x, rows, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), ints(rows), op.Shape(x, start=2), axis=0)
        state = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)

    def several() -> tuple[Any, Any]:
        inputs, length = onnx_joined(x, state, positions, 1, single=False), op.Shape(x, start=1, end=2)
        return op.Slice(inputs, ints(0), length, ints(1)), op.Slice(inputs, length, ints(2**62), ints(1))

    def one() -> tuple[Any, Any]:
        inputs = onnx_joined(x, state, positions, 1, single=True)
        return op.Slice(inputs, ints(0), ints(1), ints(1)), op.Slice(inputs, ints(1), ints(2**62), ints(1))

    return onnx_rows(x, 1, one, several)


def cost(x: Tensor, rows: int, *_: Any) -> Cost:
    """Rows in and out, and the state."""
    return Cost(0.0, 2.0 * x.nbytes + 2.0 * rows * x[:, 0].nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Fewer rows than the delay and more, from a state or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
        rows = like[1] if like else draw(st.integers(1, 3))
        size = draw(st.integers(1, 4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (2, 3))
        pads = torch.randint(0, length + 1, (batch, 1), generator=generator)
        x, state = (torch.randn(batch, n, size, generator=generator) for n in (length, rows))
        return x, rows, state if given else None, (torch.arange(length) - pads).clamp(min=-1) if padded else None

    return build()


OP = OpDef(
    name="delay",
    schema="(Tensor x, int rows, Tensor? state, Tensor? positions) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    fixed={"state": (1,)},
    mixer=Mixer(rows={"x": -2}, state=("state",), positions="positions"),
)
