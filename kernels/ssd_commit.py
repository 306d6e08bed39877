"""`aropt::ssd_commit`: the state of `aropt::ssd_scan` after one path of a tree (Wu et al. 2025, STree, section 4).

    ssd_commit(x, dt, A, B, state, pairs, leaf) -> state

* `x` float [B, R, H, P]; `dt` float [B, R, H] >= 0; `A` float [H] < 0; `B` float [B, R, G, N]; `state` float
  [B, H, P, N]: as `aropt::ssd_tree_scan` read them.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`); None: each node is above the next.
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.

In closed form, of what the nodes were given: with L[j] the sum of dt * A over j and its ancestors, it is
exp(L[leaf]) state + sum over j of the path of exp(L[leaf] - L[j]) dt[j] x[j] B[j]^T. In one graph with the tree's op,
L and dt * x are computed once. The Triton kernel needs the path alone: L[leaf] - L[j] is the sum over its nodes after
j.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import ssd_tree_scan
from aropt.kernels.ssd_scan import onnx_heads
from aropt.kernels.ssd_tree_scan import tiles
from aropt.kernels.tree_delay import LARGEST, leaves, on_path, onnx_on_path, refused, shared, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import climbed

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, pairs: Tensor | None, leaf: Tensor) -> Tensor:
    """The definition."""
    path, logs = on_path(pairs, leaf, x.shape[1]), dt * A
    total = (logs.cumsum(1) if pairs is None else pairs.to(x.dtype) @ logs).transpose(1, 2)  # [B, H, R]
    there = leaf.reshape(-1, 1, 1)
    last = total.gather(2, there.clamp(min=0).expand(-1, total.shape[1], 1))
    last = torch.where(there >= 0, last, 0.0)
    left = (last - total).masked_fill(~path.unsqueeze(1), -torch.inf).exp()
    given = x.transpose(1, 2) * dt.transpose(1, 2).unsqueeze(3)
    b = B.transpose(1, 2).repeat_interleave(x.shape[2] // B.shape[2], 1)
    return last.exp().unsqueeze(3) * state + (left.unsqueeze(3) * given).transpose(2, 3) @ b


def fake(x: Any, dt: Any, A: Any, B: Any, state: Tensor, *_: Any) -> Tensor:
    return state.new_empty(state.shape)


def onnx(x, dt, A, B, state, pairs, leaf):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops; what `aropt::ssd_tree_scan` computes as well stands as it does there."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    logs = op.Mul(dt, A)
    total = op.CumSum(logs, op.Constant(value_int=1)) if pairs is None else op.MatMul(op.Cast(pairs, to=1), logs)
    total = op.Transpose(total, perm=[0, 2, 1])
    given = op.Transpose(op.Mul(x, op.Unsqueeze(dt, ints(3))), perm=[0, 2, 1, 3])
    path, alone = onnx_on_path(pairs, leaf, x)
    last = op.MatMul(total, alone)  # [B, H, 1]; 0 without a leaf
    apart = op.Where(op.Unsqueeze(path, ints(1)), op.Sub(last, total), op.Constant(value_float=float("-inf")))
    left = op.Mul(op.Unsqueeze(op.Exp(apart), ints(3)), given)
    after = op.MatMul(op.Transpose(left, perm=[0, 1, 3, 2]), onnx_heads(B, int(x.shape[2])))
    return op.Add(after, op.Mul(op.Unsqueeze(op.Exp(last), ints(3)), state))


if HAS_TRITON:

    @triton.jit
    def _ssd_commit_kernel(  # type: ignore[no-untyped-def]
        x_ptr, dt_ptr, a_ptr, b_ptr, state_ptr, pairs_ptr, leaf_ptr, out_ptr, rows, heads, groups, size, width,
        TREE: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `SIZE` values of P; products in three parts of tf32, as exact as fp32."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row, column = tl.arange(0, ROWS), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        held, leaf = column < size, tl.load(leaf_ptr + batch)
        path = climbed(pairs_ptr + batch * rows * rows, leaf, rows, ROWS, TREE)  # other nodes aren't read
        first, group = (batch * rows * heads + head) * size, batch * rows * groups + head // (heads // groups)
        kept = (batch * heads + head) * size * width  # offsets from here on are small
        dt = tl.load(dt_ptr + batch * rows * heads + row * heads + head, mask=path, other=0.0)
        logs = dt * tl.load(a_ptr + head)
        after = tl.sum(tl.where(row[:, None] > row[None, :], logs[:, None], 0.0), 0)  # each, of the path after it
        at, inside = row[None, :] * (heads * size) + column[:, None], held[:, None] & path[None, :]
        x = tl.load(x_ptr + first + at, mask=inside, other=0.0)
        given, since = x * (dt * tl.exp(after))[None, :], tl.exp(tl.sum(logs, 0))
        for start in range(0, width, WIDTH):
            n = start + tl.arange(0, WIDTH)
            place, whole = column[:, None] * width + n[None, :], held[:, None] & (n < width)[None, :]
            b = tl.load(
                b_ptr + group * width + row[:, None] * (groups * width) + n[None, :],
                mask=path[:, None] & (n < width)[None, :], other=0.0,
            )  # fmt: skip
            state = tl.load(state_ptr + kept + place, mask=whole, other=0.0)
            y = tl.dot(given, b, input_precision="tf32x3") + since * state
            tl.store(out_ptr + kept + place, tl.where(leaf >= 0, y, state), mask=whole)


def supports(x: Tensor, *rest: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused((x, *rest), x.shape[1])


def launch(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, state: Tensor, pairs: Tensor | None, leaf: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some of the values of each head."""
    out, (batch, rows, heads, size) = fake(x, dt, A, B, state), x.shape
    if out.numel():
        trees = out if pairs is None else shared(pairs, batch)
        given = [t.contiguous() for t in (x, dt, A, B, state, trees, leaf)]
        held, sizes = tiles(rows), (rows, heads, B.shape[2], size, B.shape[3])
        grid, flags = (batch * heads, triton.cdiv(size, held["SIZE"])), {"num_warps": warps(held["ROWS"])}
        _ssd_commit_kernel[grid](*given, out, *sizes, TREE=pairs is not None, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size, and a chain; products on tensor cores."""
    types = [*["*fp32"] * 5, "*i1", "*i64", "*fp32", *["i32"] * 5, *["constexpr"] * 4]
    signature = dict(zip(_ssd_commit_kernel.arg_names, types, strict=True))
    cases, expects = [(True, 16), (True, 32), (True, LARGEST), (False, 16)], {80: ("mma.sync",)}
    made = [({"TREE": tree, **tiles(n)}, warps(n)) for tree, n in cases]
    return [Aot(_ssd_commit_kernel, signature, held, number, expects) for held, number in made]


def cost(x: Tensor, dt: Tensor, A: Any, B: Tensor, state: Tensor, *_: Any) -> Cost:
    """A product of nodes with nodes; the state in and out."""
    moved = x.nbytes + dt.nbytes + B.nbytes + 2 * state.nbytes
    return Cost(2.0 * state.numel() * x.shape[1], float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Groups, strong decays; paths of trees and chains, and none."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        known = None if like is None else (*like[:4], like[3], like[2], like[4], like[5])
        x, dt, A, B, _, _, state, pairs = draw(ssd_tree_scan.samples(known))
        chain = draw(st.booleans()) if like is None else like[5] is None
        if state is None:
            state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
        return x, dt, A, B, state, None if chain else pairs, leaves(draw, x.shape[0], x.shape[1])

    return build()


OP = OpDef(
    name="ssd_commit",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor state, Tensor? pairs, Tensor leaf) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (2, 3), "dt": (2,), "A": (0,), "B": (2, 3), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
