"""`aropt::canvas_commit`: a round of unmasking writes the rows that are sure enough.

    canvas_commit(Tensor tokens, Tensor candidate, Tensor confidence, Tensor segment, Tensor limit, Tensor threshold,
                  bool best_of_segment) -> Tensor

* `tokens`, `candidate`, `segment` int64 [B, T], `confidence` float32 [B, T], `limit` int64 [B], `threshold` float32 []
  (a log probability). Rows with `segment` below 0 are not eligible and stay as they are.
* result int64 [B, T]: `tokens` with the candidate in each eligible row whose confidence is at least `threshold`; or
  that is among the `limit` most confident eligible rows of its batch row; or, with `best_of_segment`, that is the most
  confident of its segment (the eligible rows of a batch row with the same number, wherever they stand).
* Of equally confident rows the first counts as the more confident; a confidence of NaN counts as -inf.

`limit` 1 and a threshold are the parallel decoding of Fast-dLLM (Wu et al. 2025, arXiv 2505.22618, section 3.3); the
best of each run of masks is dInfer's hierarchical decoding (arXiv 2510.08666).
"""

from __future__ import annotations

import math
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

ROWS, COLUMNS = 32, 64  # of the comparisons that the kernel has in registers
LONGEST = 4096  # the kernel compares all pairs of rows


def _check(tokens: Tensor, candidate: Tensor, confidence: Tensor, segment: Tensor, limit: Tensor,
                  threshold: Tensor) -> None:  # fmt: skip
    torch._check(tokens.dim() == 2 and threshold.dim() == 0, lambda: "tokens must be [B, T], threshold []")
    same = all(x.shape == tokens.shape for x in (candidate, confidence, segment))
    torch._check(same, lambda: "tokens, candidate, confidence and segment differ in shape")
    torch._check(limit.shape == tokens.shape[:1], lambda: "limit must be [B]")
    whole = all(x.dtype == torch.int64 for x in (tokens, candidate, segment, limit))
    torch._check_type(whole, lambda: "tokens, candidate, segment and limit must be int64")
    floats = confidence.dtype == threshold.dtype == torch.float32
    torch._check_type(floats, lambda: "confidence and threshold must be float32")


def reference(tokens: Tensor, candidate: Tensor, confidence: Tensor, segment: Tensor, limit: Tensor, threshold: Tensor,
           best_of_segment: bool) -> Tensor:  # fmt: skip
    """The definition: see the module's text for shapes and values.

    Raises:
        RuntimeError: on other shapes.
        TypeError: on other dtypes.
    """
    _check(tokens, candidate, confidence, segment, limit, threshold)
    score = torch.where(torch.isnan(confidence), -torch.inf, confidence)
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    ahead = (segment >= 0).gather(1, order).to(torch.int64)
    rank = torch.zeros_like(order).scatter(1, order, ahead.cumsum(1) - ahead)
    write = (score >= threshold) | (rank < limit.unsqueeze(1))
    if best_of_segment:
        number, place = torch.sort(segment.gather(1, order), dim=1, stable=True)
        before = torch.cat([torch.full_like(limit, -2).unsqueeze(1), number], 1)[:, :-1]
        write = write | torch.zeros_like(write).scatter(1, order.gather(1, place), number != before)
    return torch.where(write & (segment >= 0), candidate, tokens).clone(memory_format=torch.contiguous_format)


def fake(tokens: Tensor, *rest: Any) -> Tensor:
    """int64 [B, T], contiguous."""
    _check(tokens, *rest[:-1])
    return tokens.new_empty(tokens.shape)


def onnx(tokens, candidate, confidence, segment, limit, threshold, best_of_segment):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20): TopK of all rows is a sort whose ties go to the lowest index."""
    from onnxscript import opset20 as op

    score = op.Where(op.IsNaN(confidence), op.Constant(value_float=-math.inf), confidence)
    length = op.Shape(tokens, start=1, end=2)
    _, order = op.TopK(score, length, axis=1, largest=1, sorted=1)
    eligible = op.GreaterOrEqual(segment, op.Constant(value_int=0))
    ahead = op.GatherElements(op.Cast(eligible, to=7), order, axis=1)
    # `order` holds each index once, so nothing of the tokens is left
    rank = op.ScatterElements(tokens, order, op.Sub(op.CumSum(ahead, 1), ahead), axis=1)
    write = op.Or(op.GreaterOrEqual(score, threshold), op.Less(rank, op.Unsqueeze(limit, [1])))
    if best_of_segment:
        number, place = op.TopK(op.GatherElements(segment, order, axis=1), length, axis=1, largest=0, sorted=1)
        edge = op.Expand(op.Constant(value_int=-2), op.Shape(op.Unsqueeze(limit, [1])))
        before = op.Slice(op.Concat(edge, number, axis=1), [0], [-1], [1])
        first = op.Cast(op.Not(op.Equal(number, before)), to=7)
        best = op.ScatterElements(tokens, op.GatherElements(order, place, axis=1), first, axis=1)
        write = op.Or(write, op.Cast(best, to=9))
    return op.Where(op.And(write, eligible), candidate, tokens)


if HAS_TRITON:

    @triton.jit
    def _scores(confidence_ptr, at, inside):  # type: ignore[no-untyped-def]
        x = tl.load(confidence_ptr + at, mask=inside, other=0.0)
        return tl.where(x == x, x, float("-inf"))

    @triton.jit
    def _commit_kernel(  # type: ignore[no-untyped-def]
        tokens_ptr, candidate_ptr, confidence_ptr, segment_ptr, limit_ptr, threshold_ptr, out_ptr, length,
        BEST: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One program for `ROWS` rows of a canvas: a row's rank is the number of eligible rows that come before it."""
        batch = tl.program_id(0).to(tl.int64)
        row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = row < length
        at = batch * length + row
        score = _scores(confidence_ptr, at, inside)
        segment = tl.load(segment_ptr + at, mask=inside, other=-1)
        rank = tl.zeros([ROWS], tl.int32)
        better = tl.zeros([ROWS], tl.int32)  # rows of the same segment that come before
        for start in range(0, length, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            there = batch * length + column
            theirs = tl.load(segment_ptr + there, mask=column < length, other=-1)[None, :]
            rival = _scores(confidence_ptr, there, column < length)[None, :]
            tie = (rival == score[:, None]) & (column[None, :] < row[:, None])
            before = ((rival > score[:, None]) | tie) & (theirs >= 0)
            rank += tl.sum(before.to(tl.int32), 1)
            if BEST:
                better += tl.sum((before & (theirs == segment[:, None])).to(tl.int32), 1)
        write = (score >= tl.load(threshold_ptr)) | (rank < tl.load(limit_ptr + batch))
        if BEST:
            write = write | (better == 0)
        token = tl.load(tokens_ptr + at, mask=inside)
        candidate = tl.load(candidate_ptr + at, mask=inside)
        tl.store(out_ptr + at, tl.where(write & (segment >= 0), candidate, token), mask=inside)


def supports(tokens: Tensor, *_: Any) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return f"a canvas has at most {LONGEST} rows" if tokens.shape[1] > LONGEST else None


def launch(*args: Any) -> Tensor:
    """Runs the Triton kernel: a program for `ROWS` rows of a canvas."""
    *given, best = args
    out = fake(*args)
    if out.numel():
        grid = (out.shape[0], triton.cdiv(out.shape[1], ROWS))
        rest = {"BEST": best, "ROWS": ROWS, "COLUMNS": COLUMNS}
        _commit_kernel[grid](*(x.contiguous() for x in given), out, out.shape[1], **rest)
    return out


def aot() -> Sequence[Aot]:
    """With and without the best of each segment."""
    types = ["*i64", "*i64", "*fp32", "*i64", "*i64", "*fp32", "*i64", "i32", *["constexpr"] * 3]
    signature = dict(zip(_commit_kernel.arg_names, types, strict=True))
    return [Aot(_commit_kernel, signature, {"BEST": best, "ROWS": ROWS, "COLUMNS": COLUMNS}) for best in (False, True)]


def cost(tokens: Tensor, *rest: Any) -> Cost:
    """The comparisons of a sort, or of two; all arguments are read once."""
    flops = (1 + rest[-1]) * tokens.numel() * math.log2(max(tokens.shape[1], 2))
    return Cost(flops=flops, bytes=float(sum(x.nbytes for x in rest[:-1]) + 2 * tokens.nbytes))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: ties, NaN, signed zeros, rows that aren't eligible, lengths at the tiles' edges, no rows."""
    from hypothesis import strategies as st

    levels = torch.tensor([0.0, -0.0, -0.1, -0.5, -2.0, -torch.inf, torch.nan])
    lengths = st.sampled_from([0, 1, 2, ROWS, ROWS + 1, COLUMNS - 1, COLUMNS, COLUMNS + 1]) | st.integers(0, 20)
    thresholds = st.sampled_from([-torch.inf, -0.5, -0.1, 0.0, torch.inf])
    flags = st.booleans() if like is None else st.just(like[6])

    def build(batch: int, length: int, threshold: float, best: bool, tied: bool, turned: bool, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=generator)

        shape = (batch, length)
        confidence = levels[draw(0, len(levels), *shape)] if tied else -torch.rand(shape, generator=generator)
        grid = [draw(0, 9, *shape), draw(10, 99, *shape), confidence, draw(-2, 5, *shape)]
        grid = [x.t().contiguous().t() for x in grid] if turned else grid
        return (*grid, draw(-1, 5, batch), torch.tensor(threshold), best)

    seeds = st.integers(0, 2**31)
    return st.builds(build, st.integers(0, 3), lengths, thresholds, flags, st.booleans(), st.booleans(), seeds)


OP = OpDef(
    name="canvas_commit",
    schema="(Tensor tokens, Tensor candidate, Tensor confidence, Tensor segment, Tensor limit, Tensor threshold, "
    "bool best_of_segment) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
)
