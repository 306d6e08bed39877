"""`aropt::causal_conv1d`: a depthwise causal convolution along the sequence, from the inputs that came before.

    causal_conv1d(x, weight, bias, state, positions) -> (y, state)

* `x` float [B, C, R]: channels, then rows. `weight` float [C, K]; `bias` float [C] or None.
* y[:, c, t] = bias[c] + sum over i < K of weight[c, i] * x[:, c, t - (K - 1) + i]: the shapes of Dao's causal_conv1d.
* `state` float [B, C, K - 1]: the inputs before the first row, the latest last; None: zeros. The returned one holds the
  last K - 1 inputs.
* `positions` int64 [B, R] or None: rows at -1 are padding, before the others or after; they are no inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from aropt.ir.opdef import Aot, Cost, Mixer, OpDef, onnx_node, onnx_rows
from aropt.kernels.delay import BLOCK, compiled, joined, onnx_joined, padding, refused

try:
    import triton
    import triton.language as tl

    from aropt.kernels.delay import bounds, joined_rows

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TILES = {"ROWS": 32, "CHANNELS": 32}  # of a program


def reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition."""
    before = x.new_zeros(x.shape[0], x.shape[1], weight.shape[1] - 1) if state is None else state
    inputs, left = (t.transpose(1, 2) for t in joined(x.transpose(1, 2), before.transpose(1, 2), positions))
    y = functional.conv1d(inputs, weight.unsqueeze(1), bias, groups=weight.shape[0])
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (y, left))  # type: ignore[return-value]


def fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[1], weight.shape[1] - 1))


def onnx(x, weight, bias, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a sum, several are a Conv in groups."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    if state is None:
        width = op.Concat(op.Shape(x, start=0, end=2), ints(weight.shape[1] - 1), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), width)

    def one() -> tuple[Any, Any]:
        inputs, left = onnx_joined(x, state, positions, 2, single=True)
        y = op.ReduceSum(op.Mul(inputs, weight), ints(2), keepdims=1)
        return y if bias is None else op.Add(y, op.Unsqueeze(bias, ints(1))), left

    return onnx_rows(x, 2, one, lambda: onnx_convolved(x, weight, bias, state, positions))


def onnx_convolved(x: Any, weight: Any, bias: Any, state: Any, positions: Any) -> tuple[Any, Any]:
    """Several rows, on a state."""
    from onnxscript import opset20 as op

    inputs, left = onnx_joined(x, state, positions, 2, single=False)
    kernel, more = op.Unsqueeze(weight, op.Constant(value_ints=[1])), [] if bias is None else [bias]
    return op.Conv(inputs, kernel, *more, group=int(weight.shape[0])), left


def contrib(x, weight, bias, state, positions):  # type: ignore[no-untyped-def]
    """As ONNX Runtime's CausalConvWithState: one row, and rows without padding, which it can't skip."""
    from onnxscript import opset20 as op

    ones = op.Constant(value_ints=[1])

    def own() -> tuple[Any, Any]:
        y, left = onnx_node("com.microsoft", "CausalConvWithState", [x, op.Unsqueeze(weight, ones), bias, state], 2)
        return y, left

    def one() -> tuple[Any, Any]:
        y, left = own()
        padding = op.Unsqueeze(op.Less(positions, op.Constant(value_int=0)), op.Constant(value_ints=[2]))
        return y, op.Where(padding, state, left)

    if positions is None:
        return own()
    if state is None:
        return onnx(x, weight, bias, state, positions)  # type: ignore[no-untyped-call]
    return onnx_rows(x, 2, one, lambda: onnx_convolved(x, weight, bias, state, positions))


if HAS_TRITON:

    @triton.jit
    def _causal_conv1d_kernel(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, bias_ptr, state_ptr, positions_ptr, out_ptr, left_ptr, rows, channels,
        BIASED: tl.constexpr, GIVEN: tl.constexpr, PADDED: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr,
        CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """One program for some rows and channels of a sequence; the first of them gives the state."""
        batch, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        row, held, kept = tl.program_id(2) * ROWS + tl.arange(0, ROWS)[None, :], channel < channels, TAPS - 1
        first, count = 0, rows
        if PADDED:
            first, count = bounds(positions_ptr + batch * rows, rows, BLOCK)
        x_ptr += (batch * channels + channel) * rows
        state_ptr += (batch * channels + channel) * kept
        inside = held[:, None] & (row < rows)
        y = tl.zeros([CHANNELS, ROWS], tl.float32)
        for tap in tl.static_range(TAPS):
            x = joined_rows(x_ptr[:, None], state_ptr[:, None], row + tap, kept, first, 1, inside, GIVEN)
            y += tl.load(weight_ptr + channel * TAPS + tap, mask=held, other=0.0)[:, None] * x
        if BIASED:
            y += tl.load(bias_ptr + channel, mask=held, other=0.0)[:, None]
        tl.store(out_ptr + (batch * channels + channel)[:, None] * rows + row, y, mask=inside)
        if tl.program_id(2) == 0:
            for place in range(0, kept):
                at = first + count + place + 0 * channel  # the same for each channel
                left = joined_rows(x_ptr, state_ptr, at, kept, first, 1, held, GIVEN)
                tl.store(left_ptr + (batch * channels + channel) * kept + place, left, mask=held)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some rows and channels of a sequence."""
    (out, left), (batch, channels, rows) = fake(x, weight), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, weight, bias, state, positions)]
        grid = batch, triton.cdiv(channels, TILES["CHANNELS"]), triton.cdiv(rows, TILES["ROWS"])
        flags = {"BIASED": bias is not None, "GIVEN": state is not None, "PADDED": positions is not None}
        sizes = {"TAPS": weight.shape[1], **TILES, "BLOCK": BLOCK}
        _causal_conv1d_kernel[grid](*given, out, left, rows, channels, **flags, **sizes)
    return out, left


def aot() -> Sequence[Aot]:
    """Four taps, from a state, with padding."""
    types = [*["*fp32"] * 4, "*i64", "*fp32", "*fp32", "i32", "i32"]
    flags = {"BIASED": True, "GIVEN": True, "PADDED": True, "TAPS": 4, **TILES, "BLOCK": BLOCK}
    return [compiled(_causal_conv1d_kernel, types, flags)]


def cost(x: Tensor, weight: Tensor, *_: Any) -> Cost:
    """Two operations a tap; rows in and out, and the state."""
    kept = x.shape[0] * weight.numel() * x.element_size()
    return Cost(2.0 * x.numel() * weight.shape[1], 2.0 * x.nbytes + weight.nbytes + 2.0 * kept)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Widths of 2 to 4, fewer rows than taps and more, from a state or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 7))
        channels, width = like[1].shape if like else (draw(st.integers(1, 5)), draw(st.integers(2, 4)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        biased, given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (2, 3, 4))
        x, weight, bias, state = (
            torch.randn(shape, generator=generator)
            for shape in ((batch, channels, rows), (channels, width), (channels,), (batch, channels, width - 1))
        )
        positions = padding(batch, rows, generator) if padded else None
        return x, weight, bias if biased else None, state if given else None, positions

    return build()


OP = OpDef(
    name="causal_conv1d",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? positions) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    needs="CausalConvWithState",
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (1,), "weight": (0, 1), "bias": (0,), "state": (1, 2)},
    mixer=Mixer(rows={"x": -1}, state=("state",), positions="positions", tree="tree_conv1d", commit="conv1d_commit"),
    tolerance={torch.float32: (1e-4, 1e-5)},
)
