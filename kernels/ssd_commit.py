"""`aropt::ssd_commit`: the state of `aropt::ssd_scan` after one path of a tree (Wu et al. 2025, STree, section 4).

    ssd_commit(x, dt, A, B, state, pairs, leaf) -> state

* `x` float [B, R, H, P]; `dt` float [B, R, H] >= 0; `A` float [H] < 0; `B` float [B, R, G, N]; `state` float
  [B, H, P, N]: as `aropt::ssd_tree_scan` read them.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`); None: each node is above the next.
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.

In closed form, of what the nodes were given: with L[j] the sum of dt * A over j and its ancestors, it is
exp(L[leaf]) state + sum over j of the path of exp(L[leaf] - L[j]) dt[j] x[j] B[j]^T. In one graph with the tree's op,
L and dt * x are computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import ssd_tree_scan
from aropt.kernels.ssd_scan import onnx_heads
from aropt.kernels.tree_delay import leaves, on_path, onnx_on_path

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
    fixed={"x": (2, 3), "dt": (2,), "A": (0,), "B": (2, 3), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
