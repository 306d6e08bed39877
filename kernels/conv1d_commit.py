"""`aropt::conv1d_commit`: the state of `aropt::causal_conv1d` after one path of a tree: its last inputs.

    conv1d_commit(x, state, pairs, leaf) -> state

* `x` float [B, C, R]: channels, then nodes. `state` float [B, C, K - 1]: the inputs above the roots, the latest last.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`); None: each node is above the next.
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import tree_conv1d
from aropt.kernels.tree_delay import LARGEST, above, leaves, onnx_above, refused, shared, tile

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import climbed

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHANNELS = 64  # of a program


def reference(x: Tensor, state: Tensor, pairs: Tensor | None, leaf: Tensor) -> Tensor:
    """The definition."""
    kept, last = state.shape[2], leaf.unsqueeze(1)
    place = last + 1 + torch.arange(kept, device=x.device)
    if pairs is not None:
        steps = range(kept - 1, -1, -1)
        table = torch.stack([above(pairs, kept, i) for i in steps], 2).expand(x.shape[0], -1, -1)
        found = table.gather(1, last.clamp(min=0).unsqueeze(2).expand(-1, 1, kept)).squeeze(1)
        place = torch.where(last >= 0, found, place)
    return torch.cat([state, x], 2).gather(2, place.unsqueeze(1).expand(-1, x.shape[1], -1))


def fake(x: Any, state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape)


def onnx(x, state, pairs, leaf):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops; what `aropt::tree_conv1d` computes as well stands as it does there."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    kept, last = int(state.shape[2]), op.Unsqueeze(leaf, ints(1))
    place = op.Add(last, ints(*range(1, kept + 1)))
    inputs = op.Transpose(op.Concat(state, x, axis=2), perm=[0, 2, 1])
    if pairs is not None:
        table = op.Slice(onnx_above(pairs, kept, range(kept, -1, -1)), ints(1), ints(2**62), ints(2))
        node = op.Max(last, ints(0))
        if pairs.shape[0] == 1:
            found = op.Squeeze(op.Gather(op.Squeeze(table, ints(0)), node, axis=0), ints(1))
        else:
            found = op.GatherND(table, node, batch_dims=1)
        place = op.Where(op.GreaterOrEqual(last, ints(0)), found, place)
    return op.Transpose(op.GatherND(inputs, op.Unsqueeze(place, ints(2)), batch_dims=1), perm=[0, 2, 1])


if HAS_TRITON:

    @triton.jit
    def _conv1d_commit_kernel(  # type: ignore[no-untyped-def]
        x_ptr, state_ptr, pairs_ptr, leaf_ptr, out_ptr, rows, channels, kept,
        TREE: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr, CHANNELS: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a sequence: the last inputs of the state with the path behind it."""
        batch, row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, SLOTS)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        first, inside = batch * channels + channel, (channel < channels)[:, None] & (slot < kept)[None, :]
        path = climbed(pairs_ptr + batch * rows * rows, tl.load(leaf_ptr + batch), rows, ROWS, TREE)
        order, place = tl.cumsum(path.to(tl.int32), 0) - 1, slot + tl.sum(path.to(tl.int32), 0)
        wanted = path[:, None] & (order[:, None] == (place - kept)[None, :])
        found, old = tl.max(tl.where(wanted, row[:, None], 0), 0), (place < kept)[None, :]
        at = first[:, None] * kept
        before = tl.load(state_ptr + at + place[None, :], mask=inside & old, other=0.0)
        x = tl.load(x_ptr + first[:, None] * rows + found[None, :], mask=inside & (old == 0), other=0.0)
        tl.store(out_ptr + at + slot[None, :], tl.where(old, before, x), mask=inside)


def supports(x: Tensor, *rest: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused((x, *rest), x.shape[2])


def launch(x: Tensor, state: Tensor, pairs: Tensor | None, leaf: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some channels of a sequence."""
    out, (batch, channels, rows) = fake(x, state), x.shape
    if out.numel():
        trees = out if pairs is None else shared(pairs, batch)
        given = [t.contiguous() for t in (x, state, trees, leaf)]
        sizes, grid = (rows, channels, state.shape[2]), (batch, triton.cdiv(channels, CHANNELS))
        tiles = {"ROWS": tile(rows), "SLOTS": triton.next_power_of_2(sizes[2]), "CHANNELS": CHANNELS}
        _conv1d_commit_kernel[grid](*given, out, *sizes, TREE=pairs is not None, **tiles)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size and a chain, four taps."""
    types = ["*fp32", "*fp32", "*i1", "*i64", "*fp32", *["i32"] * 3, *["constexpr"] * 4]
    signature = dict(zip(_conv1d_commit_kernel.arg_names, types, strict=True))
    cases, flags = [(True, 16), (True, 32), (True, LARGEST), (False, 16)], {"SLOTS": 4, "CHANNELS": CHANNELS}
    return [Aot(_conv1d_commit_kernel, signature, {**flags, "TREE": tree, "ROWS": n}) for tree, n in cases]


def cost(x: Tensor, state: Tensor, *_: Any) -> Cost:
    """The state in and out."""
    return Cost(0.0, 2.0 * state.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Paths shorter than the taps and longer, of trees and chains, and none."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        known = None
        if like is not None:  # a convolution of as many channels and taps
            weight = torch.zeros(like[1].shape[1], like[1].shape[2] + 1)
            known = like[0], weight, None, like[1], like[2]
        x, weight, _, state, pairs = draw(tree_conv1d.samples(known))
        chain = draw(st.booleans()) if like is None else like[2] is None
        state = torch.zeros(*x.shape[:2], weight.shape[1] - 1) if state is None else state
        return x, state, None if chain else pairs, leaves(draw, x.shape[0], x.shape[2])

    return build()


OP = OpDef(
    name="conv1d_commit",
    schema="(Tensor x, Tensor state, Tensor? pairs, Tensor leaf) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (1,), "state": (1, 2)},
)
