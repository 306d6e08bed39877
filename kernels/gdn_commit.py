"""`aropt::gdn_commit`: the state of `aropt::gated_delta` after one path of a tree.

    gdn_commit(k, v, g, beta, state, pairs, leaf) -> state

* `k` float [B, R, H, K]; `v` float [B, R, H, V]; `g` float [B, R, H] <= 0; `beta` float [B, R, H]; `state` float
  [B, H, K, V]: as `aropt::gdn_tree_scan` read them.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`).
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.

In closed form: with L[j] the sum of g over j and its ancestors and u[j] what node j learns, it is exp(L[leaf]) state +
sum over j of the path of exp(L[leaf] - L[j]) k[j] u[j]^T. In one graph with the tree's op, u is computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import gated_delta, gdn_tree_scan
from aropt.kernels.tree_delay import leaves, on_path, onnx_on_path

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
    fixed={"k": (2, 3), "v": (2, 3), "g": (2,), "beta": (2,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
