"""`aropt::token_shuffle`: the ids of a window as one row, gathered from a table that holds what they contribute.

    token_shuffle(Tensor ids, Tensor table, bool add) -> Tensor

* `ids` int64 [..., W], each below V.
* `table` float32, float16 or bfloat16: [V, c], or [W, V, c] with a table for each of the W places.
* result [..., W*c]: what the table has for each id, one after the other; or, if `add`, [..., c]: their sum, taken in
  float32 and rounded once.

The shuffle of Token-Shuffle (Ma et al. 2025, arXiv 2504.17789, section 3.2) is this op once its linear layer is folded
into the embedding: `add` is false where ids are compressed and then concatenated, true where they are concatenated and
then reduced. An id that stands for a whole row (a class) is the same op: its full-width embedding in W pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BLOCK = 256  # columns of the result that a program writes


def _check(ids: Tensor, table: Tensor) -> None:
    torch._check(ids.dim() >= 1, lambda: "ids must be [..., W]")
    torch._check(table.dim() in (2, 3), lambda: "the table must be [V, c] or [W, V, c]")
    if table.dim() == 3:
        torch._check(table.shape[0] == ids.shape[-1], lambda: "there must be a table for each of the W places")
    torch._check_type(ids.dtype == torch.int64, lambda: "ids must be int64")
    torch._check_type(table.dtype in FLOATS, lambda: "the table must be float32, float16 or bfloat16")


def reference(ids: Tensor, table: Tensor, add: bool) -> Tensor:
    """The definition: see the module's text.

    Raises:
        RuntimeError: on other shapes.
        TypeError: on other dtypes.
        IndexError: for an id that no table has.
    """
    _check(ids, table)
    if table.dim() == 3:
        ids = ids + torch.arange(ids.shape[-1], device=ids.device) * table.shape[1]
        table = table.flatten(0, 1)
    parts = torch.nn.functional.embedding(ids, table)
    if add:
        return parts.sum(-2, dtype=torch.float32).to(table.dtype)
    return parts.flatten(-2)


def fake(ids: Tensor, table: Tensor, add: bool) -> Tensor:
    """[..., c] or [..., W*c] of the table's dtype, contiguous."""
    _check(ids, table)
    width = table.shape[-1] if add else ids.shape[-1] * table.shape[-1]
    return table.new_empty((*ids.shape[:-1], width))


def onnx(ids, table, add):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20): one Gather of all places."""
    from onnxscript import opset20 as op

    given, rows, rank = ids, table, len(ids.shape)
    if len(table.shape) == 3:
        place = op.Range(0, op.Squeeze(op.Shape(table, start=0, end=1)), 1)
        ids = op.Add(ids, op.Mul(place, op.Shape(table, start=1, end=2)))
        columns = op.Shape(table, start=2, end=3)
        rows = op.Reshape(table, op.Concat(op.Constant(value_ints=[-1]), columns, axis=0))
    parts = op.Gather(rows, ids, axis=0)
    half = table.dtype.numpy().itemsize == 2
    if add:
        # no negative axis: on an empty input ONNX Runtime 1.31 then sums nothing
        total = op.ReduceSum(op.Cast(parts, to=1) if half else parts, [rank - 1], keepdims=0)
        return op.CastLike(total, table) if half else total
    known = given.shape[-1], table.shape[-1]
    if all(isinstance(size, int) for size in known):
        return op.Reshape(parts, op.Constant(value_ints=[0] * (rank - 1) + [known[0] * known[1]]))  # 0: as it is
    width = op.Mul(op.Shape(given, start=rank - 1), op.Shape(table, start=len(table.shape) - 1))
    return op.Reshape(parts, op.Concat(op.Shape(given, start=0, end=rank - 1), width, axis=0), allowzero=1)


if HAS_TRITON:

    @triton.jit
    def _shuffle_kernel(  # type: ignore[no-untyped-def]
        ids_ptr, table_ptr, out_ptr, window, part, step, ADD: tl.constexpr, BLOCK: tl.constexpr
    ):
        """One program for `BLOCK` columns of a row; `step`: rows of the table from one place to the next, or 0."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        if ADD:
            width = part
            total = tl.zeros([BLOCK], tl.float32)
            for place in range(0, window):
                at = (tl.load(ids_ptr + row * window + place) + place * step) * part
                total += tl.load(table_ptr + at + column, mask=column < width, other=0.0).to(tl.float32)
        else:
            width = window * part
            place = column // part
            entry = tl.load(ids_ptr + row * window + place, mask=column < width, other=0) + place * step
            total = tl.load(table_ptr + entry * part + column % part, mask=column < width, other=0.0)
        tl.store(out_ptr + row * width + column, total.to(out_ptr.dtype.element_ty), mask=column < width)


def supports(ids: Tensor, table: Tensor, add: bool) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return "index arithmetic is 32-bit" if ids.shape[-1] * max(table.shape[-2:]) > 2**31 - BLOCK else None


def launch(ids: Tensor, table: Tensor, add: bool) -> Tensor:
    """Runs the Triton kernel: one program for a row and `BLOCK` columns."""
    out = fake(ids, table, add)
    if out.numel():
        grid = (ids[..., 0].numel(), triton.cdiv(out.shape[-1], BLOCK))
        step = table.shape[1] if table.dim() == 3 else 0
        given = (ids.contiguous(), table.contiguous(), out, ids.shape[-1], table.shape[-1], step)
        _shuffle_kernel[grid](*given, ADD=add, BLOCK=BLOCK)
    return out


def aot() -> Sequence[Aot]:
    """Both forms, for each dtype."""
    sizes = {"window": "i32", "part": "i32", "step": "i32", "ADD": "constexpr", "BLOCK": "constexpr"}
    pointers = [{"ids_ptr": "*i64", "table_ptr": f"*{t}", "out_ptr": f"*{t}"} for t in FLOATS.values()]
    return [Aot(_shuffle_kernel, {**p, **sizes}, {"ADD": add, "BLOCK": BLOCK}) for p in pointers for add in (0, 1)]


def cost(ids: Tensor, table: Tensor, add: bool) -> Cost:
    """What is gathered is read, and the result written."""
    gathered = ids.numel() * table.shape[-1]
    result = gathered if not add else gathered // max(ids.shape[-1], 1)
    return Cost(float(gathered * add), float(ids.nbytes + (gathered + result) * table.itemsize))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: one table and one a place, parts at the block's edges, no rows, windows of one id."""
    from hypothesis import strategies as st

    sizes = st.sampled_from([0, 1, 2, 3])
    leads = st.lists(sizes, max_size=3) if like is None else st.lists(sizes, min_size=len(like[0].shape) - 1,
                                                                      max_size=len(like[0].shape) - 1)  # fmt: skip
    windows, vocabularies = st.integers(1, 9), st.integers(1, 40)
    parts = st.integers(1, 70) | st.sampled_from([BLOCK - 1, BLOCK, BLOCK + 1])
    several = st.booleans() if like is None else st.just(like[1].dim() == 3)
    adds = st.booleans() if like is None else st.just(like[2])
    dtypes = st.sampled_from([torch.float32, torch.float16]) if like is None else st.just(like[1].dtype)

    def build(lead: list[int], window: int, vocab: int, part: int, several: bool, add: bool, dtype: torch.dtype,
              turned: bool, seed: int) -> Any:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(vocab, (*lead, window), generator=generator)
        table = torch.randn((*([window] if several else []), vocab, part), generator=generator).to(dtype)
        if turned:
            ids, table = ids.mT.contiguous().mT if lead else ids, table.mT.contiguous().mT
        return ids, table, add

    flags, seeds = st.booleans(), st.integers(0, 2**31)
    return st.builds(build, leads, windows, vocabularies, parts, several, adds, dtypes, flags, seeds)


OP = OpDef(
    name="token_shuffle",
    schema="(Tensor ids, Tensor table, bool add) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 1e-3)},  # of a sum, in another order
)
