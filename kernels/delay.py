"""`aropt::delay`: each row of a sequence as it was some rows before: token shift, and the taps of causal convolutions.

    delay(x, rows, state, positions) -> (y, state)

* `x` [B, R, F]: y[:, t] = x[:, t - rows], and zeros before the first row.
* `state` [B, rows, F]: the rows before the first one, the latest last; None: zeros. The returned one holds the last.
* `positions` int64 [B, R] or None: rows at -1 are padding, before the others or after; none gets them.

What the kernels of mixers share is here too: padding, and what they can't take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, Mixer, OpDef, onnx_rows

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TILES = {"ROWS": 32, "SIZE": 64}  # of a program
BLOCK = 256  # positions that are read at once


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


if HAS_TRITON:

    @triton.jit
    def bounds(positions_ptr, rows, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """How many rows of a sequence are padding before the others, and how many are none."""
        first, count = tl.full([BLOCK], 1 << 30, tl.int32), tl.zeros([BLOCK], tl.int32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            valid = tl.load(positions_ptr + row, mask=row < rows, other=-1) >= 0
            first = tl.minimum(first, tl.where(valid, row, 1 << 30))
            count += valid.to(tl.int32)
        return tl.minimum(tl.min(first, 0), rows), tl.sum(count, 0)

    @triton.jit
    def source(place, kept, first):  # type: ignore[no-untyped-def]
        """Where the row at a place of `joined` comes from, in the state and behind it the rows."""
        return tl.where(place >= kept + first, place, tl.maximum(place - first, 0))

    @triton.jit
    def joined_rows(  # type: ignore[no-untyped-def]
        x_ptr, state_ptr, place, kept, first, stride, inside, GIVEN: tl.constexpr
    ):
        """The rows at places of `joined`, from pointers to the first row of each; a row is `stride` from the next."""
        at = source(place, kept, first)
        x = tl.load(x_ptr + (at - kept) * stride, mask=inside & (at >= kept), other=0.0)
        if GIVEN:
            x = tl.where(at >= kept, x, tl.load(state_ptr + at * stride, mask=inside & (at < kept), other=0.0))
        return x

    @triton.jit
    def _delay_kernel(  # type: ignore[no-untyped-def]
        x_ptr, state_ptr, positions_ptr, out_ptr, left_ptr, rows, kept, size,
        GIVEN: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program for some rows and features of a sequence; the first of them gives the state."""
        batch, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        row, held = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[:, None], column < size
        first, count = 0, rows
        if PADDED:
            first, count = bounds(positions_ptr + batch * rows, rows, BLOCK)
        x_ptr += batch * rows * size + column
        state_ptr += batch * kept * size + column
        inside = (row < rows) & held[None, :]
        y = joined_rows(x_ptr[None, :], state_ptr[None, :], row, kept, first, size, inside, GIVEN)
        tl.store(out_ptr + (batch * rows + row) * size + column[None, :], y, mask=inside)
        if tl.program_id(2) == 0:
            for place in range(0, kept):
                at = first + count + place + 0 * column  # the same for each feature
                left = joined_rows(x_ptr, state_ptr, at, kept, first, size, held, GIVEN)
                tl.store(left_ptr + (batch * kept + place) * size + column, left, mask=held)


def refused(given: Sequence[Any]) -> str | None:
    """Why kernels can't take these arguments, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    floats = {t.dtype for t in given if isinstance(t, Tensor) and t.is_floating_point()}
    return None if floats == {torch.float32} else "the kernels compute in float32"


def compiled(kernel: Any, types: Sequence[str], constants: dict[str, Any], num_warps: int = 4, **more: Any) -> Aot:
    """How a kernel is compiled ahead of time, from the types of what is no constexpr."""
    names = kernel.arg_names
    signature = dict(zip(names, [*types, *["constexpr"] * (len(names) - len(types))], strict=True))
    return Aot(kernel, signature, constants, num_warps, **more)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(x: Tensor, rows: int, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some rows and features of a sequence."""
    (out, left), (batch, length, size) = fake(x, rows), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, state, positions)]
        grid = batch, triton.cdiv(size, TILES["SIZE"]), triton.cdiv(length, TILES["ROWS"])
        flags = {"GIVEN": state is not None, "PADDED": positions is not None, **TILES, "BLOCK": BLOCK}
        _delay_kernel[grid](*given, out, left, length, rows, size, **flags)
    return out, left


def aot() -> Sequence[Aot]:
    """From a state, with padding."""
    types = ["*fp32", "*fp32", "*i64", "*fp32", "*fp32", *["i32"] * 3]
    return [compiled(_delay_kernel, types, {"GIVEN": True, "PADDED": True, **TILES, "BLOCK": BLOCK})]


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
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"state": (1,)},
    mixer=Mixer(rows={"x": -2}, state=("state",), positions="positions", tree="tree_delay"),
)
