"""`aropt::write_rows`: new rows into the slots of a cache, each sequence's into slots of its own.

    write_rows(Tensor store, Tensor slots, Tensor rows, int axis) -> Tensor

* `store` [B, ..., S, ...] with the slots along `axis` >= 1; `rows` of the same type, [B, ..., R, ...].
* `slots` int64 [B, R], each below S: where row r of sequence b goes. Of rows with the same slot any may stay.
* result: the store with these rows. ONNX Runtime and torch update it in place where it is bound to its own buffer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def _check(store: Tensor, slots: Tensor, rows: Tensor, axis: int) -> None:
    torch._check(
        1 <= axis < store.dim() == rows.dim(), lambda: "store and rows differ in rank, or axis is none of them"
    )
    torch._check(slots.dim() == 2, lambda: "slots must be [B, R]")
    torch._check_type(slots.dtype == torch.int64, lambda: "slots must be int64")
    torch._check_type(store.dtype == rows.dtype, lambda: "store and rows differ in dtype")


def _index(slots: Tensor, rows: Tensor, axis: int) -> Tensor:
    """The slot of each element of the rows."""
    for dim in (*range(1, axis), *range(axis + 1, rows.dim())):
        slots = slots.unsqueeze(dim)
    return slots.expand(rows.shape)


def reference(store: Tensor, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
    """The definition: see the module's text. Raises RuntimeError for other shapes, TypeError for other dtypes."""
    _check(store, slots, rows, axis)
    return store.scatter(axis, _index(slots, rows, axis), rows)


def overwrite(store: Tensor, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
    """The same in the store's own buffer."""
    _check(store, slots, rows, axis)
    return store.scatter_(axis, _index(slots, rows, axis), rows)


def fake(store: Tensor, slots: Tensor, rows: Tensor, axis: int) -> Tensor:
    """Shape, dtype and strides of a new store."""
    _check(store, slots, rows, axis)
    return torch.empty_like(store)


def onnx(store, slots, rows, axis, heads=None):  # type: ignore[no-untyped-def]
    """The same by ScatterND, which copies what lies after the slot's axis as a whole.

    The indices are made of the slots and of sizes alone, so that all caches of a step share them. `heads`: the size of
    axis 1, where the values don't have it yet.
    """
    from onnxscript import opset18 as op

    def size(dim: int) -> Any:
        if dim in (0, axis):
            return op.Shape(slots, start=min(dim, 1), end=min(dim, 1) + 1)
        known = heads or rows.shape[dim]
        return op.Constant(value_ints=[known]) if isinstance(known, int) else op.Shape(rows, start=dim, end=dim + 1)

    sizes = [size(dim) for dim in range(axis + 1)]
    full = op.Concat(*sizes, axis=0)
    parts = []
    for dim in range(axis):
        places = [1] * (axis + 1)
        places[dim] = -1
        parts.append(op.Reshape(op.Range(0, op.Squeeze(sizes[dim]), 1), op.Constant(value_ints=places)))
    between = list(range(1, axis))
    parts.append(op.Unsqueeze(slots, op.Constant(value_ints=between)) if between else slots)
    wide = [op.Unsqueeze(op.Expand(part, full), op.Constant(value_ints=[axis + 1])) for part in parts]
    return op.ScatterND(store, op.Concat(*wide, axis=-1), rows)


def cost(store: Tensor, slots: Tensor, rows: Tensor, axis: int) -> Cost:
    """In place, the rows alone are read and written."""
    return Cost(flops=0.0, bytes=float(store.nbytes + rows.nbytes + slots.nbytes))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Positions [B, S] and keys [B, H, S, D], slots in any order, no rows, no sequences."""
    from hypothesis import strategies as st

    axes = st.sampled_from([1, 2]) if like is None else st.just(like[3])

    def build(batch: int, heads: int, size: int, count: int, axis: int, seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        count = min(count, size)
        shape = (batch, size) if axis == 1 else (batch, heads, size, 3)
        made = (batch, count) if axis == 1 else (batch, heads, count, 3)
        orders = [torch.randperm(size, generator=generator)[:count] for _ in range(batch)]
        slots = torch.stack(orders) if batch else torch.zeros(0, count, dtype=torch.int64)
        return torch.randn(shape, generator=generator), slots, torch.randn(made, generator=generator), axis

    sizes = st.integers(1, 6)
    return st.builds(build, st.integers(0, 3), sizes, sizes, st.integers(0, 6), axes, st.integers(0, 99))


OP = OpDef(
    name="write_rows",
    schema="(Tensor store, Tensor slots, Tensor rows, int axis) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    overwrite=overwrite,
    in_place={0: "store"},
)
