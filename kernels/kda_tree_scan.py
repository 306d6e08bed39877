"""`aropt::kda_tree_scan`: `aropt::kda` on the nodes of a tree.

    kda_tree_scan(q, k, v, g, beta, state, pairs) -> o

As `aropt::gdn_tree_scan`, but `g` is float [B, R, H, K]: each row of S with its own decay. The decays between nodes are
differences of sums, one for each channel of keys: quotients would overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import OpDef
from aropt.kernels import kda
from aropt.kernels.gdn_tree_scan import cost, fake, onnx_masked, onnx_solved
from aropt.kernels.tree_delay import on_trees

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition, as one triangular system."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    sees = pairs.unsqueeze(1)
    o, _ = kda.solved(state, q, k, v, sees.to(g.dtype) @ g, beta, ~sees)
    return o.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def onnx(q, k, v, g, beta, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    q, k, v, g = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v, g))
    sees = op.Unsqueeze(pairs, ints(1))
    total = op.MatMul(op.Cast(sees, to=1), g)
    apart = op.Sub(op.Unsqueeze(total, ints(3)), op.Unsqueeze(total, ints(2)))  # [B, H, R, R, K]
    decay = op.Exp(onnx_masked(op.Unsqueeze(sees, ints(4)), apart, float("-inf")))
    decayed = op.Mul(decay, op.Unsqueeze(k, ints(2)))
    alike, wanted = (
        onnx_masked(sees, op.Squeeze(op.MatMul(decayed, op.Unsqueeze(x, ints(4))), ints(4)), 0.0) for x in (k, q)
    )
    since = op.Exp(total)
    known, before = [None, None] if state is None else [op.MatMul(op.Mul(since, x), state) for x in (k, q)]
    o = op.MatMul(wanted, onnx_solved(pairs, v, beta, alike, known))
    return op.Transpose(o if before is None else op.Add(o, before), perm=[0, 2, 1, 3])


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys that differ and keys alike, from a state or from nothing."""
    return on_trees(kda.samples, 1, like)


OP = OpDef(
    name="kda_tree_scan",
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    fixed={"q": (2, 3), "k": (2, 3), "v": (2, 3), "g": (2, 3), "beta": (2,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
