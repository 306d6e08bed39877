"""`aropt::conv1d_commit`: the state of `aropt::causal_conv1d` after one path of a tree: its last inputs.

    conv1d_commit(x, state, pairs, leaf) -> state

* `x` float [B, C, R]: channels, then nodes. `state` float [B, C, K - 1]: the inputs above the roots, the latest last.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences (see `aropt::tree_delay`); None: each node is above the next.
* `leaf` int64 [B]: the last node of the path, which begins at a root; -1: no node counts, the state stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import tree_conv1d
from aropt.kernels.tree_delay import above, leaves, onnx_above

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


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
    fixed={"x": (1,), "state": (1, 2)},
)
