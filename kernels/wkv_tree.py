"""`aropt::wkv_tree`: `aropt::wkv` on the nodes of a tree.

    wkv_tree(k, v, w, u, num, den, top, pairs) -> y

* `k`, `v` float [B, R, D]; `w` float [D] < 0, the logarithm of the decay; `u` float [D], the current node's bonus.
* `num`, `den`, `top` float [B, D]: both sums above the roots, times e^-top; None, or den 0: there is none above.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

It is a softmax over ancestors: one that lies n steps above has the score (n - 1) w + k, the node itself u + k. The sums
of the state are one more, of score top + d w for a node with d ancestors. The largest score is taken off first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import wkv
from aropt.kernels.tree_delay import on_trees, refused, shared, sized, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LOWEST = wkv.LOWEST
CHANNELS = 32  # of a program


def reference(
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    num: Tensor | None,
    den: Tensor | None,
    top: Tensor | None,
    pairs: Tensor,
) -> Tensor:
    """The definition, in closed form."""
    nothing = torch.zeros_like(k[:, 0])
    num, den, top = (nothing if kept is None else kept for kept in (num, den, top))
    depth = pairs.sum(2, keepdim=True).to(k.dtype) - 1  # [B, R, 1]
    before = torch.where(den == 0, LOWEST, top).unsqueeze(1) + depth * w
    steps = depth.unsqueeze(2) - depth.unsqueeze(1) - 1  # [B, R, R, 1]
    score = torch.where(steps < 0, u, steps * w) + k.unsqueeze(1)
    score = torch.where(pairs.unsqueeze(3), score, -torch.inf)
    largest = torch.maximum(score.amax(2), before)
    weight, before = (score - largest.unsqueeze(2)).exp(), (before - largest).exp()
    values = torch.where(pairs.unsqueeze(3), weight * v.unsqueeze(1), 0.0).sum(2)
    y = (before * num.unsqueeze(1) + values) / (before * den.unsqueeze(1) + weight.sum(2))
    return y.clone(memory_format=torch.contiguous_format)


def fake(k: Tensor, *_: Any) -> Tensor:
    return k.new_empty(k.shape)


def onnx(k, v, w, u, num, den, top, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    zero, lowest = op.Constant(value_float=0.0), op.Constant(value_float=LOWEST)
    if num is None:
        shape = op.Concat(op.Shape(k, start=0, end=1), op.Shape(k, start=2, end=3), axis=0)
        num = den = top = op.Expand(zero, shape)
    one, seen = op.Constant(value_float=1.0), op.Unsqueeze(pairs, ints(3))
    depth = op.Sub(op.ReduceSum(op.Cast(pairs, to=1), ints(2), keepdims=1), one)
    before = op.Add(op.Unsqueeze(op.Where(op.Equal(den, zero), lowest, top), ints(1)), op.Mul(depth, w))
    steps = op.Sub(op.Sub(op.Unsqueeze(depth, ints(2)), op.Unsqueeze(depth, ints(1))), one)
    score = op.Add(op.Where(op.Less(steps, zero), u, op.Mul(steps, w)), op.Unsqueeze(k, ints(1)))
    score = op.Where(seen, score, op.Constant(value_float=float("-inf")))
    largest = op.Max(op.ReduceMax(score, ints(2), keepdims=0), before)
    weight, before = op.Exp(op.Sub(score, op.Unsqueeze(largest, ints(2)))), op.Exp(op.Sub(before, largest))
    values = op.ReduceSum(op.Where(seen, op.Mul(weight, op.Unsqueeze(v, ints(1))), zero), ints(2), keepdims=0)
    over = op.Add(op.Mul(before, op.Unsqueeze(num, ints(1))), values)
    return op.Div(over, op.Add(op.Mul(before, op.Unsqueeze(den, ints(1))), op.ReduceSum(weight, ints(2), keepdims=0)))


if HAS_TRITON:

    @triton.jit
    def scored(  # type: ignore[no-untyped-def]
        k_ptr, pairs_ptr, t, depth, w, u, rows, channels, channel, ROWS: tl.constexpr
    ):
        """Which nodes [ROWS, 1] see node t, and its score [ROWS, CHANNELS] for them, -inf for others."""
        row = tl.arange(0, ROWS)
        sees = tl.load(pairs_ptr + row * rows + t, mask=row < rows, other=0)[:, None] != 0
        steps = (depth - tl.sum(tl.where(row == t, depth, 0.0), 0) - 1)[:, None]
        k = tl.load(k_ptr + t * channels + channel, mask=channel < channels, other=0.0)[None, :]
        score = tl.where(steps < 0, u[None, :], steps * w[None, :]) + k
        return sees, tl.where(sees, score, float("-inf"))

    @triton.jit
    def _wkv_tree_kernel(  # type: ignore[no-untyped-def]
        k_ptr, v_ptr, w_ptr, u_ptr, num_ptr, den_ptr, top_ptr, pairs_ptr, out_ptr, rows, channels,
        GIVEN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a tree: the largest scores, then the sums."""
        batch, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        held, at, first = channel < channels, batch * channels + channel, batch * rows * channels
        pairs_ptr += batch * rows * rows
        w, u = tl.load(w_ptr + channel, mask=held, other=0.0), tl.load(u_ptr + channel, mask=held, other=0.0)
        depth = tl.sum(seen(pairs_ptr, rows, ROWS, False).to(tl.float32), 1) - 1
        num, den = tl.zeros([CHANNELS], tl.float32), tl.zeros([CHANNELS], tl.float32)
        top = tl.full([CHANNELS], -1e38, tl.float32)
        if GIVEN:
            num, den = tl.load(num_ptr + at, mask=held, other=0.0), tl.load(den_ptr + at, mask=held, other=0.0)
            top = tl.where(den == 0, top, tl.load(top_ptr + at, mask=held, other=0.0))
        before = top[None, :] + depth[:, None] * w[None, :]
        largest = before
        for t in range(0, rows):
            sees, score = scored(k_ptr + first, pairs_ptr, t, depth, w, u, rows, channels, channel, ROWS)
            largest = tl.maximum(largest, score)
        before = tl.exp(before - largest)
        over, under = before * num[None, :], before * den[None, :]
        for t in range(0, rows):
            sees, score = scored(k_ptr + first, pairs_ptr, t, depth, w, u, rows, channels, channel, ROWS)
            v = tl.load(v_ptr + first + t * channels + channel, mask=held, other=0.0)[None, :]
            weight = tl.exp(score - largest)
            over += tl.where(sees, weight * v, 0.0)
            under += weight
        to = first + row[:, None] * channels + channel[None, :]
        tl.store(out_ptr + to, over / under, mask=(row < rows)[:, None] & held[None, :])


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(*args: Any) -> Tensor:
    """Runs the Triton kernel: a program for some channels of a tree."""
    k, num = args[0], args[4]
    out, (batch, rows, channels) = fake(k), k.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (*args[:-1], shared(args[-1], batch))]
        held, grid = {"ROWS": tile(rows), "CHANNELS": CHANNELS}, (batch, triton.cdiv(channels, CHANNELS))
        flags = {"GIVEN": num is not None, "num_warps": warps(held["ROWS"])}
        _wkv_tree_kernel[grid](*given, out, rows, channels, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size."""
    types = [*["*fp32"] * 7, "*i1", "*fp32", "i32", "i32"]
    return sized(_wkv_tree_kernel, types, {"GIVEN": True, "CHANNELS": CHANNELS})


def cost(k: Tensor, v: Any, w: Any, u: Any, num: Any, den: Any, top: Any, pairs: Tensor) -> Cost:
    """Ten operations a pair and channel."""
    return Cost(10.0 * k.numel() * k.shape[1], 3.0 * k.nbytes + 3.0 * k[:, 0].nbytes + pairs.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys small and large, from sums or from nothing."""
    return on_trees(wkv.samples, 1, like)


OP = OpDef(
    name="wkv_tree",
    schema="(Tensor k, Tensor v, Tensor w, Tensor u, Tensor? num, Tensor? den, Tensor? top, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"w": (0,), "u": (0,), "k": (2,), "v": (2,), "num": (1,), "den": (1,), "top": (1,)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
