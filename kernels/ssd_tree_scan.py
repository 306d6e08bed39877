"""`aropt::ssd_tree_scan`: `aropt::ssd_scan` on the nodes of a tree (Wu et al. 2025, STree).

    ssd_tree_scan(x, dt, A, B, C, D, state, pairs) -> y

* `x` float [B, R, H, P]; `dt` float [B, R, H] >= 0, after its softplus; `A` float [H] < 0.
* `B`, `C` float [B, R, G, N]: each group serves H / G heads in turn. `D` float [H] or None.
* S[i] = exp(dt[i] * A) * S[parent of i] + dt[i] * x[i] B[i]^T  and  y[i] = S[i] C[i] + D * x[i], for each head.
* `state` float [B, H, P, N]: S above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R]: whether node j is an ancestor of node i, or i itself (see `aropt::tree_delay`).

It is a chunk of `aropt::ssd_scan` in which a row sees its ancestors, not all before it: with L[i] the sum of dt * A
over j = i and its ancestors, y[i] = exp(L[i]) state C[i] + sum over j of exp(L[i] - L[j]) (C[i] B[j]) dt[j] x[j].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import ssd_scan
from aropt.kernels.tree_delay import on_trees

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, pairs: Tensor
) -> Tensor:
    """The definition, in closed form."""
    batch, _, heads, size = x.shape
    state = x.new_zeros(batch, heads, size, B.shape[3]) if state is None else state
    total = (pairs.to(x.dtype) @ (dt * A)).transpose(1, 2)
    given = x.transpose(1, 2) * dt.transpose(1, 2).unsqueeze(3)
    y = ssd_scan.read(given, total, ~pairs.unsqueeze(1), B, C, state).transpose(1, 2)
    return (y if D is None else y + D.unsqueeze(1) * x).clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx(x, dt, A, B, C, D, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    total = op.Transpose(op.MatMul(op.Cast(pairs, to=1), op.Mul(dt, A)), perm=[0, 2, 1])
    given = op.Transpose(op.Mul(x, op.Unsqueeze(dt, ints(3))), perm=[0, 2, 1, 3])
    y = ssd_scan.onnx_read(given, total, op.Unsqueeze(pairs, ints(1)), B, C, state, int(x.shape[2]))
    y = op.Transpose(y, perm=[0, 2, 1, 3])
    return y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, ints(1)), x))


def cost(x: Tensor, dt: Tensor, A: Any, B: Tensor, C: Tensor, D: Any, state: Any, pairs: Tensor) -> Cost:
    """What nodes read of the state, and products of nodes with nodes; the state is read once."""
    rows, size = x.shape[1], x.shape[0] * x.shape[2] * x.shape[3] * B.shape[3]
    moved = 2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes + size * x.element_size() + pairs.nbytes
    return Cost(2.0 * size * rows + 2.0 * rows * (x.numel() + B.numel()), float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Groups, strong decays, from a state or from nothing."""
    return on_trees(ssd_scan.samples, 1, like)


OP = OpDef(
    name="ssd_tree_scan",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    fixed={"x": (2, 3), "dt": (2,), "A": (0,), "B": (2, 3), "C": (2, 3), "D": (0,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
