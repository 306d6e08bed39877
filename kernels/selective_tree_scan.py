"""`aropt::selective_tree_scan`: `aropt::selective_scan` on the nodes of a tree.

    selective_tree_scan(x, dt, A, B, C, D, state, pairs) -> y

* `x` float [B, D, R]: channels, then nodes. `dt` float [B, D, R] >= 0, after its softplus. `A` float [D, N] < 0.
* `B`, `C` float [B, N, R]. `D` float [D] or None.
* h[i] = exp(dt[i] * A) * h[parent of i] + dt[i] * B[i] * x[i]  and  y[i] = sum over N of h[i] * C[i] + D * x[i].
* `state` float [B, D, N]: h above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R]: whether node j is an ancestor of node i, or i itself (see `aropt::tree_delay`).

A closed form would take an exponential for each pair of nodes, channel and state. The definition steps as
`aropt::selective_scan` does, node by node, and gives its bits; in ONNX nodes step as those of `aropt::rg_lru_tree`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import selective_scan
from aropt.kernels.rg_lru_tree import onnx_walked, walked
from aropt.kernels.tree_delay import on_trees

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, pairs: Tensor
) -> Tensor:
    """The definition, node by node."""
    state = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    y = torch.stack(walked(state, pairs, lambda h, t: selective_scan.row(h, x, dt, A, B, C, t)), 2)
    return (y if D is None else y + D.unsqueeze(1) * x).clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx(x, dt, A, B, C, D, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops, with nodes before channels: [B, R, D, N]."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def first(value: Any, axis: int) -> Any:
        """Nodes first, and an axis more."""
        return op.Unsqueeze(op.Transpose(value, perm=[0, 2, 1]), ints(axis))

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), ints(*map(int, A.shape)), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), shape)
    given = op.Mul(first(op.Mul(dt, x), 3), first(B, 2))
    h = onnx_walked(op.Exp(op.Mul(first(dt, 3), A)), given, state, pairs)
    y = op.Transpose(op.Squeeze(op.MatMul(h, first(C, 3)), ints(3)), perm=[0, 2, 1])
    return y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, ints(1)), x))


def cost(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, state: Any, pairs: Tensor) -> Cost:
    """Six operations an element of the state and node; the state is read."""
    size = x.shape[0] * A.numel()
    moved = 2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes + 4 * size + pairs.nbytes
    return Cost(6.0 * size * x.shape[2], float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One node and several, from a state or from nothing."""
    return on_trees(selective_scan.samples, 2, like)


OP = OpDef(
    name="selective_tree_scan",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    fixed={"x": (1,), "dt": (1,), "A": (0, 1), "B": (1,), "C": (1,), "D": (0,), "state": (1, 2)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
