"""`aropt::accept_scan`: which drafts of a tree the target writes itself, and what comes after (Miao et al. 2024, 4.3).

    accept_scan(tokens, picks, parents, pairs, depth, stop, room, deepest) -> (leaf, path, emitted, taken, ended)

* `tokens` int64 [B, n]: the root, which is the newest known id, and drafts; `picks` int64 [B, n]: what the target
  writes after each node.
* `parents`, `depth` int64 [B, n], `pairs` bool [B, n, n] as of `aropt::tree_delay`, or [1, ..] of all sequences; a node
  but the first whose parent is -1 is padding. No depth is above `deepest`.
* `stop` int64 [K]: ids that end a text, -1 is none. `room` int64 [B]: how many ids may still come.
* A draft counts if it is what is picked after its parent, is no stop id, is less deep than there is room, and what is
  above it counts. `leaf` int64 [B] is the first of the deepest nodes that count.
* `path` int64 [B, deepest + 1]: the nodes from the root to the leaf; `emitted` what is picked after each of them, the
  drafts that count and the id after the leaf; -1 after them. `taken` int64 [B] says how many ids are emitted, none
  where there is no room; `ended` bool [B] whether the last of them is a stop id.

It is the rule "match" of rounds that check drafts (`aropt/loops/accept.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels.tree_delay import LARGEST, drawn, pairs_of, shared, sized, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def reference(
    tokens: Tensor, picks: Tensor, parents: Tensor, pairs: Tensor, depth: Tensor, stop: Tensor, room: Tensor,
    deepest: int,
) -> Results:  # fmt: skip
    """The definition, without a loop over nodes."""
    parents, depth = parents.expand_as(tokens), depth.expand_as(tokens)
    hits = (tokens.unsqueeze(2) == stop).any(2)
    counts = (picks.gather(1, parents.clamp(min=0)) == tokens) & ~hits & (depth < room.unsqueeze(1)) & (parents >= 0)
    counts = counts | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
    good = ~(pairs & ~counts.unsqueeze(1)).any(2)
    leaf = torch.where(good, depth, -1).to(torch.float32).argmax(1)
    level = torch.arange(deepest + 1, device=tokens.device).reshape(-1, 1)
    above = pairs.expand(tokens.shape[0], -1, -1).gather(1, leaf.reshape(-1, 1, 1).expand(-1, 1, tokens.shape[1]))
    there = above & (depth.unsqueeze(1) == level)  # [B, deepest + 1, n]
    path = torch.where(there.any(2), there.to(torch.float32).argmax(2), -1)
    free, last = room > 0, leaf.unsqueeze(1)
    emitted = torch.where((path >= 0) & free.unsqueeze(1), picks.gather(1, path.clamp(min=0)), -1)
    taken = torch.where(free, depth.gather(1, last).squeeze(1) + 1, 0)
    return leaf, path, emitted, taken, (picks.gather(1, last) == stop).any(1) & free


def fake(
    tokens: Tensor, picks: Any, parents: Any, pairs: Any, depth: Any, stop: Any, room: Any, deepest: int
) -> Results:
    batch = tokens.shape[0]
    path, emitted = (tokens.new_empty((batch, deepest + 1)) for _ in range(2))
    leaf, taken = (tokens.new_empty((batch,)) for _ in range(2))
    return leaf, path, emitted, taken, tokens.new_empty((batch,), dtype=torch.bool)


def onnx(tokens, picks, parents, pairs, depth, stop, room, deepest):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops; of a tree that is always the same, paths are a table of constants."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    zero, nothing = op.Constant(value_int=0), op.Constant(value_int=-1)
    place = op.Range(zero, op.Squeeze(op.Shape(tokens, start=1, end=2)), op.Constant(value_int=1))
    open_ = op.And(op.GreaterOrEqual(parents, zero), op.Less(depth, op.Unsqueeze(room, ints(1))))

    def among(ids: Any, axis: int) -> Any:
        """Whether one along the axis is a stop id; as numbers, since TensorRT reduces no booleans."""
        found = op.Cast(op.Equal(ids, stop), to=1)
        return op.Greater(op.ReduceMax(found, ints(axis), keepdims=0), op.Constant(value_float=0.0))

    hits = among(op.Unsqueeze(tokens, ints(2)), 2)
    before = onnx_within(picks, op.Max(parents, zero), parents)
    wrong = op.Or(op.Not(op.And(op.Equal(before, tokens), open_)), hits)
    wrong = op.And(wrong, op.Greater(place, zero))  # the root counts
    sees = op.Transpose(op.Cast(pairs, to=1), perm=[0, 2, 1])
    blocked = op.Squeeze(op.MatMul(op.Unsqueeze(op.Cast(wrong, to=1), ints(1)), sees), ints(1))
    score = op.Where(op.Greater(blocked, op.Constant(value_float=0.0)), nothing, depth)
    leaf = op.ArgMax(op.Cast(score, to=1), axis=1, keepdims=0)
    last, free = op.Unsqueeze(leaf, ints(1)), op.Greater(room, zero)
    level = op.Constant(value_ints=list(range(deepest + 1)))
    there = op.And(
        op.Unsqueeze(pairs, ints(2)), op.Equal(op.Unsqueeze(level, ints(1)), op.Unsqueeze(depth, ints(1, 2)))
    )
    paths = op.ReduceMax(op.Where(there, place, nothing), ints(3), keepdims=0)  # [B, n, deepest + 1]
    path = onnx_of_node(paths, leaf, pairs)
    found = op.And(op.GreaterOrEqual(path, zero), op.Unsqueeze(free, ints(1)))
    emitted = op.Where(found, op.GatherElements(picks, op.Max(path, zero), axis=1), nothing)
    count = op.Unsqueeze(op.Add(depth, op.Constant(value_int=1)), ints(2))
    count = op.Squeeze(onnx_of_node(count, leaf, depth), ints(1))
    after = among(op.GatherElements(picks, last, axis=1), 1)
    return leaf, path, emitted, op.Where(free, count, zero), op.And(after, free)


def onnx_within(values: Any, places: Any, tree: Any) -> Any:
    """values[b, places[b, i]]; places may be of all sequences, as the tree is."""
    from onnxscript import opset20 as op

    if tree.shape[0] == 1:
        return op.Gather(values, op.Squeeze(places, op.Constant(value_ints=[0])), axis=1)
    return op.GatherElements(values, places, axis=1)


def onnx_of_node(values: Any, node: Any, tree: Any) -> Any:
    """values[b, node[b], :]; values may be of all sequences, as the tree is."""
    from onnxscript import opset20 as op

    if tree.shape[0] == 1:
        return op.Gather(op.Squeeze(values, op.Constant(value_ints=[0])), node, axis=0)
    return op.GatherND(values, op.Unsqueeze(node, op.Constant(value_ints=[1])), batch_dims=1)


if HAS_TRITON:

    @triton.jit
    def stops(ids, stop_ptr, count):  # type: ignore[no-untyped-def]
        """Whether ids are among those that end a text."""
        found = ids != ids
        for i in range(0, count):
            found = found | (ids == tl.load(stop_ptr + i))
        return found

    @triton.jit
    def _accept_scan_kernel(  # type: ignore[no-untyped-def]
        tokens_ptr, picks_ptr, parents_ptr, pairs_ptr, depth_ptr, stop_ptr, room_ptr,
        leaf_ptr, path_ptr, emitted_ptr, taken_ptr, ended_ptr, rows, count, levels,
        ROWS: tl.constexpr, LEVELS: tl.constexpr,
    ):  # fmt: skip
        """One program for a sequence; all nodes at once."""
        batch, row, level = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS), tl.arange(0, LEVELS)
        there, room = row < rows, tl.load(room_ptr + batch)
        picks_ptr += batch * rows
        tokens = tl.load(tokens_ptr + batch * rows + row, mask=there, other=-1)
        parents = tl.load(parents_ptr + batch * rows + row, mask=there, other=-1)
        depth = tl.load(depth_ptr + batch * rows + row, mask=there, other=-1)
        same = tl.load(picks_ptr + tl.maximum(parents, 0), mask=there, other=-1) == tokens
        counts = (same & (stops(tokens, stop_ptr, count) == 0) & (depth < room) & (parents >= 0)) | (row == 0)
        sees = seen(pairs_ptr + batch * rows * rows, rows, ROWS, False)
        blocked = tl.max((sees & (counts == 0)[None, :]).to(tl.int32), 1)
        score = tl.where(there & (blocked == 0), depth, -1)
        leaf = tl.min(tl.where(score == tl.max(score, 0), row, ROWS), 0)
        above = tl.load(pairs_ptr + (batch * rows + leaf) * rows + row, mask=there, other=0) != 0
        path = tl.max(tl.where(above[None, :] & (depth[None, :] == level[:, None]), row[None, :], -1), 1)
        emitted = tl.load(picks_ptr + tl.maximum(path, 0), mask=path >= 0, other=-1)
        to = batch * levels + level
        tl.store(path_ptr + to, path.to(tl.int64), mask=level < levels)
        tl.store(emitted_ptr + to, tl.where(room > 0, emitted, -1), mask=level < levels)
        tl.store(leaf_ptr + batch, leaf.to(tl.int64))
        tl.store(taken_ptr + batch, tl.where(room > 0, tl.max(score, 0) + 1, 0))
        after = tl.load(picks_ptr + leaf + row * 0)  # the same for all nodes
        ended = tl.max(stops(after, stop_ptr, count).to(tl.int32), 0)
        tl.store(ended_ptr + batch, tl.where(room > 0, ended, 0) != 0)


def supports(tokens: Tensor, *rest: Any) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return f"a kernel holds {LARGEST} nodes" if tokens.shape[1] > LARGEST else None


def launch(
    tokens: Tensor, picks: Tensor, parents: Tensor, pairs: Tensor, depth: Tensor, stop: Tensor, room: Tensor,
    deepest: int,
) -> Results:  # fmt: skip
    """Runs the Triton kernel: a program for a sequence."""
    made, (batch, rows) = fake(tokens, picks, parents, pairs, depth, stop, room, deepest), tokens.shape
    if tokens.numel():
        trees = parents.expand(batch, -1), shared(pairs, batch), depth.expand(batch, -1)
        given = [t.contiguous() for t in (tokens, picks, *trees, stop, room)]
        held = {"ROWS": tile(rows), "LEVELS": tile(deepest + 1), "num_warps": warps(tile(rows))}
        _accept_scan_kernel[(batch,)](*given, *made, rows, stop.shape[0], deepest + 1, **held)
    return made


def aot() -> Sequence[Aot]:
    """Trees of each size."""
    types = [*["*i64"] * 3, "*i1", *["*i64"] * 7, "*i1", *["i32"] * 3]
    return sized(_accept_scan_kernel, types, {"LEVELS": 16})


def cost(tokens: Tensor, picks: Tensor, parents: Any, pairs: Tensor, *rest: Any) -> Cost:
    """Nodes and pairs are read once, paths are written."""
    return Cost(0.0, float(4 * tokens.nbytes + pairs.nbytes + tokens.shape[0] * (17 + 16 * (rest[-1] + 1))))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Few ids, so that drafts are right and siblings alike; stop ids; padding; room for all, for few, for none."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        same = like[2].shape[0] < like[0].shape[0] if like else draw(st.booleans())  # one tree of all sequences
        batch, rows = draw(st.integers(2 if like and same else 1, 3)), draw(st.integers(2, 17))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        parents, most = drawn(draw, batch, rows), like[7] if like else rows
        depth = pairs_of(parents).sum(2) - 1
        parents = torch.where((depth > most) | (torch.rand(batch, rows, generator=generator) < 0.05), -1, parents)
        if same:
            parents = parents[:1]
        pairs = pairs_of(parents)
        depth = pairs.sum(2) - 1
        deepest = int(depth.max()) + draw(st.integers(0, 1)) if like is None else like[7]
        ids = draw(st.integers(1, 3))
        tokens, picks = torch.randint(0, ids, (2, batch, rows), generator=generator).unbind()
        stop = torch.randint(-1, 4, (draw(st.integers(1, 3)),), generator=generator)
        room = torch.randint(0, deepest + 3, (batch,), generator=generator)
        return tokens, picks, parents, pairs, depth, stop, room, deepest

    return build()


OP = OpDef(
    name="accept_scan",
    schema="(Tensor tokens, Tensor picks, Tensor parents, Tensor pairs, Tensor depth, Tensor stop, Tensor room, "
    "int deepest) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
)
