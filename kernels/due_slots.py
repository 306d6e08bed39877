"""`aropt::due_slots`: the rows of a canvas that a round computes, as many columns as the fullest sequence needs.

    due_slots(Tensor due) -> Tensor

* `due` bool [B, T]: which rows of each sequence are to be computed.
* result int64 [B, N]: their indices in ascending order, then T ("nowhere") up to N, the largest count of a sequence.

N depends on the values: what follows in a graph sees a size of its own. It is the one op of aropt with such a size, so
that a cache policy can be a plain function to bool [B, T], and rounds cost what their rows cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from aropt.ir.opdef import Cost, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def _check(due: Tensor) -> None:
    torch._check(due.dim() == 2, lambda: "due must be [B, T]")
    torch._check_type(due.dtype == torch.bool, lambda: "due must be bool")


def reference(due: Tensor) -> Tensor:
    """The definition: see the module's text. Raises RuntimeError on another rank, TypeError on another dtype."""
    _check(due)
    length = due.shape[1]
    keys = torch.where(due, torch.arange(length, device=due.device), length)
    count = int(due.sum(1).max()) if due.numel() else 0
    return torch.sort(keys, dim=1).values[:, :count].clone()


def fake(due: Tensor) -> Tensor:
    """int64 [B, N] with N a size that only the values tell."""
    _check(due)
    count = library.get_ctx().new_dynamic_size()
    return due.new_empty((due.shape[0], count), dtype=torch.int64)


def onnx(due):  # type: ignore[no-untyped-def]
    """The same by TopK of the indices, smallest first."""
    from onnxscript import opset18 as op

    length = op.Shape(due, start=1, end=2)
    index = op.Range(0, op.Squeeze(length), 1)
    keys = op.Where(due, index, length)
    counts = op.ReduceSum(op.Cast(due, to=7), [1], keepdims=0)
    zero = op.Constant(value_ints=[0])
    count = op.ReduceMax(op.Concat(zero, counts, axis=0), zero, keepdims=1)  # 0 for an empty batch
    slots, _ = op.TopK(keys, count, axis=1, largest=0, sorted=1)
    return slots


def cost(due: Tensor) -> Cost:
    """One pass over the flags; results are at most as many indices."""
    return Cost(flops=2.0 * due.numel(), bytes=9.0 * due.numel())


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Flags: none, all, one sequence fuller than the others, no sequences, no rows."""
    from hypothesis import strategies as st

    def build(rows: int, length: int, seed: int, share: float) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(rows, length, generator=generator) < share,)

    return st.builds(build, st.integers(0, 4), st.integers(0, 40), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))


OP = OpDef(
    name="due_slots",
    schema="(Tensor due) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    own_size=True,
)
