"""`aropt::rg_lru_tree`: `aropt::rg_lru` on the nodes of a tree.

    rg_lru_tree(x, a, state, pairs) -> h

* `x`, `a` float [B, R, D], 0 <= a <= 1: h[i] = a[i] * h[parent of i] + x[i], each channel for itself.
* `state` float [B, D]: h above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

The definition steps as `aropt::rg_lru` does, node by node, and gives its bits. In ONNX all nodes step at once, in each
of log2 R rounds twice as far up, from the ancestor that they have come to (pointer jumping). The kernel keeps h in
registers down a chain, and reads it back where a tree branches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import rg_lru
from aropt.kernels.tree_delay import (
    on_trees,
    onnx_doubled,
    onnx_parents,
    onnx_taken,
    parents_of,
    refused,
    shared,
    sized,
    tile,
    warps,
)

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import parents_in

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHANNELS = 256  # of a program


def walked(state: Tensor, pairs: Tensor, step: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Each node's y of `step(h of its parent, node) -> (h, y)`, the state [B, ..] above the roots."""
    parents, batch = parents_of(pairs).expand(state.shape[0], -1), torch.arange(state.shape[0], device=pairs.device)
    kept, found = state.new_zeros(pairs.shape[1] + 1, *state.shape), []
    kept[0] = state
    for t in range(pairs.shape[1]):
        kept[t + 1], y = step(kept[parents[:, t] + 1, batch], t)
        found.append(y)
    return found


def reference(x: Tensor, a: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition, node by node."""

    def step(h: Tensor, t: int) -> tuple[Tensor, Tensor]:
        h = a[:, t] * h + x[:, t]
        return h, h

    return torch.stack(walked(torch.zeros_like(x[:, 0]) if state is None else state, pairs, step), 1)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx(x, a, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), op.Shape(x, start=2, end=3), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), shape)
    return onnx_walked(a, x, state, pairs)


def onnx_walked(decay: Any, given: Any, state: Any, pairs: Any) -> Any:
    """h [B, R, ..] of `h[i] = decay[i] * h[parent of i] + given[i]` from [B, R, ..] and the state [B, ..].

    The state is a node before the others, which gives what it is and forgets what is above.
    """
    from onnxscript import opset20 as op

    axis, end = op.Constant(value_ints=[1]), op.Constant(value_ints=[2**62])
    first = op.Unsqueeze(state, axis)
    given = op.Concat(first, given, axis=1)
    decay = op.Concat(op.Expand(op.Constant(value_float=0.0), op.Shape(first)), decay, axis=1)
    above = op.Cast(op.Add(onnx_parents(pairs), op.Constant(value_int=1)), to=1)
    above = op.Pad(above, op.Constant(value_ints=[0, 1, 0, 0]), op.Constant(value_float=0.0))

    def double(given: Any, decay: Any, above: Any, _: Any) -> tuple[Any, Any, Any]:
        at = op.Cast(above, to=7)
        before, earlier, higher = (onnx_taken(value, at, pairs) for value in (given, decay, above))
        return op.Add(op.Mul(decay, before), given), op.Mul(decay, earlier), higher

    return op.Slice(onnx_doubled(pairs, 1, (given, decay, above), double, 1)[0], axis, end, axis)


if HAS_TRITON:

    @triton.jit
    def _rg_lru_tree_kernel(  # type: ignore[no-untyped-def]
        x_ptr, a_ptr, state_ptr, pairs_ptr, out_ptr, rows, channels,
        GIVEN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a tree, node by node."""
        batch, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        held, first = channel < channels, batch * rows * channels
        parents = parents_in(pairs_ptr + batch * rows * rows, rows, ROWS)
        state = tl.zeros([CHANNELS], tl.float32)
        if GIVEN:
            state = tl.load(state_ptr + batch * channels + channel, mask=held, other=0.0)
        h = state
        for t in range(0, rows):
            parent = tl.sum(tl.where(row == t, parents, 0), 0)
            if parent < 0:
                h = state
            elif parent < t - 1:
                tl.debug_barrier()  # what other threads wrote is there
                h = tl.load(out_ptr + first + parent * channels + channel, mask=held, other=0.0)
            at = first + t * channels + channel
            a, x = tl.load(a_ptr + at, mask=held, other=0.0), tl.load(x_ptr + at, mask=held, other=0.0)
            h = a * h + x
            tl.store(out_ptr + at, h, mask=held)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(x: Tensor, a: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some channels of a tree."""
    out, (batch, rows, channels) = fake(x), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, a, state, shared(pairs, batch))]
        held, grid = {"ROWS": tile(rows), "CHANNELS": CHANNELS}, (batch, triton.cdiv(channels, CHANNELS))
        flags = {"GIVEN": state is not None, "num_warps": warps(held["ROWS"])}
        _rg_lru_tree_kernel[grid](*given, out, rows, channels, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size."""
    types = [*["*fp32"] * 3, "*i1", "*fp32", "i32", "i32"]
    return sized(_rg_lru_tree_kernel, types, {"GIVEN": True, "CHANNELS": CHANNELS})


def cost(x: Tensor, a: Any, state: Any, pairs: Tensor) -> Cost:
    """Two operations an element."""
    return Cost(2.0 * x.numel(), 3.0 * x.nbytes + 1.0 * x[:, 0].nbytes + pairs.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One node and several, with resets (a = 0), from a state or from nothing."""
    return on_trees(rg_lru.samples, 1, like)


OP = OpDef(
    name="rg_lru_tree",
    schema="(Tensor x, Tensor a, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    tolerance={torch.float32: (1e-4, 1e-5)},
)
