"""`aropt::gdn_commit`: the state of `aropt::gated_delta` after one path of a tree.

    gdn_commit(k, v, g, beta, state, pairs, leaf) -> state

* `k` float [B, R, H, K]; `v` float [B, R, H, V]; `g` float [B, R, H] <= 0; `beta` float [B, R, H]; `state` float
  [B, H, K, V]: as `aropt::gdn_tree_scan` read them.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`).
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.

In closed form: with L[j] the sum of g over j and its ancestors and u[j] what node j learns, it is exp(L[leaf]) state +
sum over j of the path of exp(L[leaf] - L[j]) k[j] u[j]^T. In one graph with the tree's op, u is computed once. The
Triton kernel reads the path alone, on which each node is above all that come after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import gated_delta, gdn_tree_scan
from aropt.kernels.gdn_tree_scan import TILES
from aropt.kernels.tree_delay import LARGEST, leaves, on_path, onnx_on_path, refused, shared, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.gdn_tree_scan import solved_nodes
    from aropt.kernels.tree_delay import climbed

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, pairs: Tensor, leaf: Tensor) -> Tensor:
    """The definition."""
    path, total = on_path(pairs, leaf, k.shape[1]), (pairs.to(g.dtype) @ g).transpose(1, 2)
    k, v, beta = (x.transpose(1, 2) for x in (k, v, beta))
    _, learned = gated_delta.solved(state, k, k, v, total, beta, ~pairs.unsqueeze(1))
    there = leaf.reshape(-1, 1, 1)
    last = total.gather(2, there.clamp(min=0).expand(-1, total.shape[1], 1))
    last = torch.where(there >= 0, last, 0.0)
    left = (last - total).masked_fill(~path.unsqueeze(1), -torch.inf).exp().unsqueeze(3)
    return last.exp().unsqueeze(3) * state + (left * k).transpose(2, 3) @ learned


def fake(k: Any, v: Any, g: Any, beta: Any, state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape)


def onnx(k, v, g, beta, state, pairs, leaf):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops; what `aropt::gdn_tree_scan` computes as well stands as it does there."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    path, alone = onnx_on_path(pairs, leaf, k)
    k, total, _, learned = gdn_tree_scan.onnx_learned(k, v, g, beta, state, pairs)
    last = op.MatMul(total, alone)  # [B, H, 1]; 0 without a leaf
    apart = op.Where(op.Unsqueeze(path, ints(1)), op.Sub(last, total), op.Constant(value_float=float("-inf")))
    left = op.Mul(op.Unsqueeze(op.Exp(apart), ints(3)), k)
    after = op.MatMul(op.Transpose(left, perm=[0, 1, 3, 2]), learned)
    return op.Add(after, op.Mul(op.Unsqueeze(op.Exp(last), ints(3)), state))


if HAS_TRITON:

    @triton.jit
    def _gdn_commit_kernel(  # type: ignore[no-untyped-def]
        k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, pairs_ptr, leaf_ptr, out_ptr, rows, heads, size, width,
        ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `WIDTH` values of V; products in three parts of tf32, as exact as fp32."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row, column = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        held, leaf = (column < width)[None, :], tl.load(leaf_ptr + batch).to(tl.int32)
        path = climbed(pairs_ptr + batch * rows * rows, leaf, rows, ROWS, True)  # other nodes aren't read
        first, kept = batch * rows * heads + head, (batch * heads + head) * size * width
        STAGES: tl.constexpr = 3 if ROWS < 64 else 1  # loads ahead take registers
        alike, known = tl.zeros([ROWS, ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for start in tl.range(0, size, SIZE, num_stages=STAGES):
            n = start + tl.arange(0, SIZE)
            place, inside = row[:, None] * (heads * size) + n[None, :], path[:, None] & (n < size)[None, :]
            k = tl.load(k_ptr + first * size + place, mask=inside, other=0.0)
            place, inside = n[:, None] * width + column[None, :], (n < size)[:, None] & held
            state = tl.load(state_ptr + kept + place, mask=inside, other=0.0)
            alike += tl.dot(k, tl.trans(k), input_precision="tf32x3")
            known += tl.dot(k, state, input_precision="tf32x3")
        g = tl.load(g_ptr + first + row * heads, mask=path, other=0.0)
        beta = tl.load(beta_ptr + first + row * heads, mask=path, other=0.0)
        at = row[:, None] * (heads * width) + column[None, :]
        v = tl.load(v_ptr + first * width + at, mask=path[:, None] & held, other=0.0)
        turned = path[:, None] & path[None, :] & (row[:, None] <= row[None, :])
        learned, _, decay = solved_nodes(turned, g, beta, alike, v, known, leaf + 1, ROWS)
        left, since = tl.sum(tl.where(row[None, :] == leaf, decay, 0.0), 1), tl.exp(tl.sum(g, 0))
        for start in tl.range(0, size, SIZE, num_stages=STAGES):
            n = start + tl.arange(0, SIZE)
            place, inside = row[:, None] * (heads * size) + n[None, :], path[:, None] & (n < size)[None, :]
            k = tl.load(k_ptr + first * size + place, mask=inside, other=0.0) * left[:, None]
            place, inside = n[:, None] * width + column[None, :], (n < size)[:, None] & held
            state = tl.load(state_ptr + kept + place, mask=inside, other=0.0)
            y = tl.dot(tl.trans(k), learned, input_precision="tf32x3") + since * state
            tl.store(out_ptr + kept + place, tl.where(leaf >= 0, y, state), mask=inside)


def supports(k: Tensor, *rest: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused((k, *rest), k.shape[1])


def launch(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, pairs: Tensor, leaf: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some of the values of each head."""
    out, (batch, rows, heads, size), width = fake(k, v, g, beta, state), k.shape, v.shape[3]
    if out.numel():
        given = [t.contiguous() for t in (k, v, g, beta, state, shared(pairs, batch), leaf)]
        held, grid = {"ROWS": tile(rows), **TILES}, (batch * heads, triton.cdiv(width, TILES["WIDTH"]))
        _gdn_commit_kernel[grid](*given, out, rows, heads, size, width, **held, num_warps=warps(held["ROWS"]))
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size; products on tensor cores."""
    types = [*["*fp32"] * 5, "*i1", "*i64", "*fp32", *["i32"] * 4, *["constexpr"] * 3]
    kernel, expects = _gdn_commit_kernel, {80: ("mma.sync",)}
    signature = dict(zip(kernel.arg_names, types, strict=True))
    return [Aot(kernel, signature, {"ROWS": n, **TILES}, warps(n), expects) for n in (16, 32, LARGEST)]


def cost(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, *_: Any) -> Cost:
    """A product of nodes with nodes; the state in and out."""
    moved = k.nbytes + v.nbytes + g.nbytes + beta.nbytes + 2 * state.nbytes
    return Cost(4.0 * state.numel() * k.shape[1], float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys that differ and keys alike; paths of trees, and none."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        _, k, v, g, beta, state, pairs = draw(gdn_tree_scan.samples(None if like is None else (like[0], *like)[:7]))
        state = torch.zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3]) if state is None else state
        return k, v, g, beta, state, pairs, leaves(draw, k.shape[0], k.shape[1])

    return build()


OP = OpDef(
    name="gdn_commit",
    schema="(Tensor k, Tensor v, Tensor g, Tensor beta, Tensor state, Tensor pairs, Tensor leaf) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"k": (2, 3), "v": (2, 3), "g": (2,), "beta": (2,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
