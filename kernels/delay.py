"""`aropt::delay`: each row of a sequence as it was some rows before: token shift, and the taps of causal convolutions.

    delay(x, rows, state, positions) -> (y, state)

* `x` [B, R, F]: y[:, t] = x[:, t - rows], and zeros before the first row.
* `state` [B, rows, F]: the rows before the first one, the latest last; None: zeros. The returned one holds the last.
* `positions` int64 [B, R] or None: rows at -1 are padding, before the others or after; none gets them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef, onnx_rows

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def joined(x: Tensor, state: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """State and rows in a row [B, S + R, F], padding at rows that nothing reads; and the last S of them but padding."""
    inputs, kept, rows = torch.cat([state, x], 1), state.shape[1], x.shape[1]
    if positions is None:
        return inputs, inputs[:, rows:]

    def taken(inputs: Tensor, place: Tensor) -> Tensor:
        return inputs.gather(1, place.unsqueeze(2).expand(-1, -1, inputs.shape[2]))

    valid, place = positions >= 0, torch.arange(kept + rows, device=x.device)
    first = torch.where(valid, place[:rows], rows).amin(1, keepdim=True)  # [B, 1]: how much padding comes before
    inputs = taken(inputs, torch.where(place >= kept + first, place, (place - first).clamp(min=0)))
    return inputs, taken(inputs, first + valid.sum(1, keepdim=True) + place[:kept])


def reference(x: Tensor, rows: int, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition."""
    inputs, left = joined(x, x.new_zeros(x.shape[0], rows, x.shape[2]) if state is None else state, positions)
    y = inputs[:, : x.shape[1]]
    return y.clone(memory_format=torch.contiguous_format), left.clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, rows: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], rows, x.shape[2]))


def onnx_joined(x: Any, state: Any, positions: Any, axis: int, single: bool) -> tuple[Any, Any]:
    """`joined` in standard ONNX ops, rows at an axis of three; `single`: there is one row."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    inputs, rows = op.Concat(state, x, axis=axis), ints(1) if single else op.Shape(x, start=axis, end=axis + 1)
    if positions is not None and single:
        first = op.Slice(state, ints(0), ints(1), ints(axis))
        padding = op.Unsqueeze(op.Less(positions, ints(0)), ints(3 - axis))
        inputs = op.Where(padding, op.Concat(first, state, axis=axis), inputs)
    if positions is None or single:
        return inputs, op.Slice(inputs, rows, ints(2**62), ints(axis))

    def taken(inputs: Any, place: Any, like: Any) -> Any:
        place = op.Expand(op.Unsqueeze(place, ints(3 - axis)), op.Shape(like))
        return op.GatherElements(inputs, place, axis=axis)

    def counted(size: Any) -> Any:
        return op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))

    valid, kept = op.GreaterOrEqual(positions, ints(0)), op.Shape(state, start=axis, end=axis + 1)
    first = op.ReduceMin(op.Where(valid, counted(rows), rows), ints(1), keepdims=1)
    place = counted(op.Add(kept, rows))
    place = op.Where(op.GreaterOrEqual(place, op.Add(first, kept)), place, op.Max(op.Sub(place, first), ints(0)))
    inputs = taken(inputs, place, inputs)
    last = op.Add(first, op.ReduceSum(op.Cast(valid, to=7), ints(1), keepdims=1))
    return inputs, taken(inputs, op.Add(last, counted(kept)), state)


def onnx(x, rows, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), ints(rows), op.Shape(x, start=2), axis=0)
        state = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)

    def write(single: bool) -> tuple[Any, Any]:
        inputs, left = onnx_joined(x, state, positions, 1, single)
        return op.Slice(inputs, ints(0), ints(1) if single else op.Shape(x, start=1, end=2), ints(1)), left

    return onnx_rows(x, 1, lambda: write(True), lambda: write(False))


def cost(x: Tensor, rows: int, *_: Any) -> Cost:
    """Rows in and out, and the state."""
    return Cost(0.0, 2.0 * x.nbytes + 2.0 * rows * x[:, 0].nbytes)


def padding(batch: int, rows: int, generator: torch.Generator) -> Tensor:
    """Positions int64 [B, R] for samples: some padding before the rows, some after, or nothing else."""
    first, end = torch.randint(0, rows + 1, (2, batch, 1), generator=generator).sort(0).values
    place = torch.arange(rows).expand(batch, -1)
    return torch.where((place >= first) & (place < end), place - first, -1)


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
        x, state = (torch.randn(batch, n, size, generator=generator) for n in (length, rows))
        return x, rows, state if given else None, padding(batch, length, generator) if padded else None

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
    mixer=Mixer(rows={"x": -2}, state=("state",), positions="positions", tree="tree_delay"),
)
