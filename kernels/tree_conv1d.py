"""`aropt::tree_conv1d`: `aropt::causal_conv1d` on the nodes of a tree, each over its ancestors.

    tree_conv1d(x, weight, bias, state, pairs) -> y

* `x` float [B, C, R]: channels, then nodes. `weight` float [C, K]; `bias` float [C] or None.
* y[:, c, t] = bias[c] + sum over i < K of weight[c, i] * x[:, c, the ancestor K - 1 - i steps above t].
* `state` float [B, C, K - 1]: the inputs above the roots, the latest last; None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import causal_conv1d
from aropt.kernels.tree_delay import LARGEST, above, on_trees, onnx_above, onnx_taken, refused, shared, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHANNELS = 32  # of a program


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition, tap by tap."""
    kept = weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], x.shape[1], kept) if state is None else state
    inputs = torch.cat([before, x], 2)
    y = x.new_zeros(x.shape)
    for i in range(kept + 1):
        place = above(pairs, kept, kept - i).unsqueeze(1).expand(x.shape[0], x.shape[1], -1)
        y = y + weight[:, i, None] * inputs.gather(2, place)
    return y if bias is None else y + bias.unsqueeze(1)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx(x, weight, bias, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: the taps of each node are gathered, then summed."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    kept = int(weight.shape[1]) - 1
    if state is None:
        state = op.Expand(op.Constant(value_float=0.0), op.Concat(op.Shape(x, start=0, end=2), ints(kept), axis=0))
    inputs = op.Transpose(op.Concat(state, x, axis=2), perm=[0, 2, 1])
    place = onnx_above(pairs, kept, range(kept, -1, -1))  # [B, R, K]
    taps = onnx_taken(inputs, place, pairs)  # [B, R, K, C]
    y = op.ReduceSum(op.Mul(taps, op.Transpose(weight, perm=[1, 0])), ints(2), keepdims=0)
    return op.Transpose(y if bias is None else op.Add(y, bias), perm=[0, 2, 1])


if HAS_TRITON:

    @triton.jit
    def _tree_conv1d_kernel(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, bias_ptr, state_ptr, pairs_ptr, out_ptr, rows, channels,
        BIASED: tl.constexpr, GIVEN: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a tree; each tap is read where the ancestor is."""
        batch, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        pairs_ptr += batch * rows * rows
        held = channel < channels
        inside = held[:, None] & (row < rows)[None, :]
        at = (batch * channels + channel) * rows
        sees = seen(pairs_ptr, rows, ROWS, True)  # [ancestors, nodes]
        depth = tl.sum(sees.to(tl.int32), 0) - 1
        higher = tl.sum(seen(pairs_ptr, rows, ROWS, False).to(tl.int32), 1) - 1  # the same along the other axis
        y = tl.zeros([CHANNELS, ROWS], tl.float32)
        for tap in tl.static_range(TAPS):
            wanted = depth - (TAPS - 1 - tap)
            found = tl.max(tl.where(sees & (higher[:, None] == wanted[None, :]), row[:, None], 0), 0)
            above = (wanted >= 0)[None, :]
            x = tl.load(x_ptr + at[:, None] + found[None, :], mask=inside & above, other=0.0)
            if GIVEN:
                before = (batch * channels + channel) * (TAPS - 1) + (TAPS - 1)
                x += tl.load(state_ptr + before[:, None] + wanted[None, :], mask=inside & (above == 0), other=0.0)
            y += tl.load(weight_ptr + channel * TAPS + tap, mask=held, other=0.0)[:, None] * x
        if BIASED:
            y += tl.load(bias_ptr + channel, mask=held, other=0.0)[:, None]
        tl.store(out_ptr + at[:, None] + row[None, :], y, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, pairs: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some channels of a tree."""
    out, (batch, channels, rows) = fake(x), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, weight, bias, state, shared(pairs, batch))]
        flags = {"BIASED": bias is not None, "GIVEN": state is not None, "TAPS": weight.shape[1]}
        tiles, grid = {"ROWS": tile(rows), "CHANNELS": CHANNELS}, (batch, triton.cdiv(channels, CHANNELS))
        _tree_conv1d_kernel[grid](*given, out, rows, channels, **flags, **tiles, num_warps=warps(tiles["ROWS"]))
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size, four taps."""
    types = [*["*fp32"] * 4, "*i1", "*fp32", "i32", "i32", *["constexpr"] * 5]
    signature = dict(zip(_tree_conv1d_kernel.arg_names, types, strict=True))
    flags = {"BIASED": True, "GIVEN": True, "TAPS": 4, "CHANNELS": CHANNELS}
    return [Aot(_tree_conv1d_kernel, signature, {**flags, "ROWS": n}, warps(n)) for n in (16, 32, LARGEST)]


def cost(x: Tensor, weight: Tensor, bias: Any, state: Any, pairs: Tensor) -> Cost:
    """Two operations a tap; nodes in and out, the state and the pairs."""
    kept = x.shape[0] * weight.numel() * x.element_size()
    return Cost(2.0 * x.numel() * weight.shape[1], 2.0 * x.nbytes + weight.nbytes + kept + pairs.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Widths of 2 to 4, trees less deep than the taps and deeper, from a state or from nothing."""
    return on_trees(causal_conv1d.samples, 2, like)


OP = OpDef(
    name="tree_conv1d",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (1,), "weight": (0, 1), "bias": (0,), "state": (1, 2)},
    tolerance={torch.float32: (1e-4, 1e-5)},
)
