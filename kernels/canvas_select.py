"""`aropt::canvas_select`: what each row of a canvas predicts, and how sure it is, without a softmax in memory.

    canvas_select(Tensor logits, int mask_id) -> (Tensor candidate, Tensor confidence)

* `logits` float32, float16 or bfloat16 [N, V], V >= 1; arithmetic is float32. `mask_id`: the token that is never
  chosen; no token if it isn't one of 0..V-1 (say, -1).
* `candidate` int64 [N]: the token with the largest logit but the mask, the lowest of equal ones.
* `confidence` float32 [N]: log of its probability under softmax over all tokens but the mask, computed as
  -log1p(sum over the others of exp(x - max)), so that it keeps its relative accuracy near probability 1.
* Where all logits but the mask's are -inf, the confidence is -inf and the candidate the lowest token but the mask.
  Logits of +inf share the probability equally. A NaN makes the confidence NaN and the candidate any token.

The running maximum and sum of the kernel are those of Milakov and Gimelshein, "Online normalizer calculation for
softmax" (2018). `canvas_commit` writes what is sure enough.
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

FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
BLOCK = 1024  # lanes, each with a maximum and a sum of its own


def log1p_series(x):  # type: (Any) -> Any  # a comment, as Triton would look up annotations
    """log(1 + x) to float32 accuracy for 0 <= x < 0.5, as 2 atanh(x / (x + 2)): torch, ONNX and Triton values alike."""
    z = x / (x + 2.0)
    s = z * z
    return z * 2.0 * ((((s * (1.0 / 9.0) + 1.0 / 7.0) * s + 0.2) * s + 1.0 / 3.0) * s + 1.0)


def _check(logits: Tensor, mask_id: int) -> None:
    torch._check(logits.dim() == 2, lambda: "logits must be [N, V]")
    torch._check_type(logits.dtype in FLOATS, lambda: "logits must be float32, float16 or bfloat16")
    torch._check(logits.shape[1] > int(mask_id == 0), lambda: "there is no token but the mask")


def reference(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """The definition: see the module's text for shapes and values.

    Raises:
        RuntimeError: on another rank, and where V leaves no token to choose.
        TypeError: on other dtypes.
    """
    _check(logits, mask_id)
    index = torch.arange(logits.shape[1], device=logits.device)
    x = torch.where(index == mask_id, -torch.inf, logits.to(torch.float32))
    best, candidate = x.max(1, keepdim=True)
    impossible = best == -torch.inf
    candidate = torch.where(impossible, int(mask_id == 0), candidate)
    # equal logits have a ratio of 1 also where their difference is inf - inf
    ratio = torch.exp(torch.where(x == best, 0.0, x - best))
    others = torch.where(index == candidate, 0.0, ratio).sum(1, keepdim=True)
    confidence = torch.where(impossible, -torch.inf, -torch.log1p(others))
    return candidate.squeeze(1), confidence.squeeze(1)


def fake(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """int64 [N] and float32 [N]."""
    _check(logits, mask_id)
    rows = logits.shape[0]
    return logits.new_empty((rows,), dtype=torch.int64), logits.new_empty((rows,), dtype=torch.float32)


def onnx(logits, mask_id):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20); ONNX has no Log1p, and Log(1 + x) would saturate."""
    from onnxscript import opset20 as op

    low, zero = op.Constant(value_float=-math.inf), op.Constant(value_float=0.0)
    x = op.Cast(logits, to=1)
    index = op.Range(0, op.Squeeze(op.Shape(logits, start=1, end=2)), 1)
    if mask_id >= 0:
        x = op.Where(op.Equal(index, op.Constant(value_int=mask_id)), low, x)
    best = op.ReduceMax(x, [1], keepdims=1)
    impossible = op.Equal(best, low)
    chosen = op.ArgMax(x, axis=1, keepdims=1, select_last_index=0)
    candidate = op.Where(impossible, op.Constant(value_int=int(mask_id == 0)), chosen)
    ratio = op.Exp(op.Where(op.Equal(x, best), zero, op.Sub(x, best)))
    best_one = op.And(op.Equal(index, candidate), op.Equal(x, best))  # not a NaN that ReduceMax passed over
    others = op.ReduceSum(op.Where(best_one, zero, ratio), [1], keepdims=1)
    logs = op.Where(op.Less(others, op.Constant(value_float=0.5)), log1p_series(others), op.Log(others + 1.0))
    confidence = op.Where(op.And(impossible, op.Not(op.IsNaN(others))), low, op.Neg(logs))
    return op.Squeeze(candidate, [1]), op.Squeeze(confidence, [1])


if HAS_TRITON:
    _kernel_series = triton.jit(log1p_series)

    @triton.jit
    def _select_kernel(  # type: ignore[no-untyped-def]
        logits_ptr, candidate_ptr, confidence_ptr, width, mask_id, fallback, BLOCK: tl.constexpr
    ):
        """One program a row, one pass. `others` sums exp(x - best) over a lane's tokens but the one at `best`."""
        row = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, BLOCK)
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        others = tl.zeros([BLOCK], tl.float32)
        at = lane
        for start in range(0, width, BLOCK):
            index = start + lane
            x = tl.load(logits_ptr + row * width + index, mask=index < width, other=float("-inf")).to(tl.float32)
            # not a part of the load's mask, which would keep loads from being vectors
            x = tl.where(index == mask_id, float("-inf"), x)
            # one exponential scales the sum if the maximum moves, and is the new summand if not
            ratio = tl.where(x == best, 1.0, tl.exp(-tl.abs(x - best)))
            higher = x > best
            others = tl.where(higher, (others + 1.0) * ratio, others + ratio)
            at = tl.where(higher, index, at)
            best = tl.where(higher, x, best)
        top = tl.max(best, 0)
        candidate = tl.min(tl.where(best == top, at, width + BLOCK), 0)
        ratio = tl.where(best == top, 1.0, tl.exp(best - top))
        # no two lanes hold the same index, so one lane is the candidate's
        total = tl.sum(tl.where((best == top) & (at == candidate), others, (others + 1.0) * ratio), 0)
        logs = tl.where(total < 0.5, _kernel_series(total), tl.log(1.0 + total))
        impossible = top == float("-inf")
        # a row of -inf and NaN has a NaN in the sum
        confidence = tl.where(impossible & (total == total), float("-inf"), -logs)
        tl.store(candidate_ptr + row, tl.where(impossible, fallback, candidate).to(tl.int64))
        tl.store(confidence_ptr + row, confidence)


def supports(logits: Tensor, mask_id: int) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return "index arithmetic is 32-bit" if logits.shape[1] > 2**31 - 2 * BLOCK else None


def launch(logits: Tensor, mask_id: int) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: one program a row."""
    candidate, confidence = fake(logits, mask_id)
    rows, width = logits.shape
    if rows:
        mask = mask_id if 0 <= mask_id < width else -1
        given = (logits.contiguous(), candidate, confidence, width, mask, int(mask == 0))
        _select_kernel[(rows,)](*given, BLOCK=BLOCK)
    return candidate, confidence


def aot() -> Sequence[Aot]:
    """One variant for each dtype."""
    sizes = {"width": "i32", "mask_id": "i32", "fallback": "i32", "BLOCK": "constexpr"}
    results = {"candidate_ptr": "*i64", "confidence_ptr": "*fp32"}
    return [Aot(_select_kernel, {"logits_ptr": f"*{t}", **results, **sizes}, {"BLOCK": BLOCK}) for t in FLOATS.values()]


def cost(logits: Tensor, mask_id: int) -> Cost:
    """A comparison, a difference, an exponential and a sum for each logit, which is read once."""
    return Cost(flops=4.0 * logits.numel(), bytes=float(logits.nbytes) + 12.0 * logits.shape[0])


def _logits(kind: str, width: int, mask_id: int, generator: torch.Generator) -> Tensor:
    """A row of samples, float32 [width]."""
    x = torch.randn(width, generator=generator) * 4
    where = int(torch.randint(width, (), generator=generator))
    if kind == "ties":
        x = torch.randint(2, (width,), generator=generator).float()
    elif kind == "sure":  # the others' share is far below float32's resolution near 1
        x[where] = 40.0
    elif kind == "mask" and 0 <= mask_id < width:
        x[mask_id] = 60.0
    elif kind in ("one", "none"):
        x[:] = -torch.inf
        x[where] = 3.0 if kind == "one" else -torch.inf
    return x


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: ties, certainty, rows of -inf, a mask that would win, widths at the block's edges, no rows."""
    from hypothesis import strategies as st

    kinds = st.lists(st.sampled_from(["plain", "ties", "sure", "mask", "one", "none"]), max_size=5)
    widths = st.sampled_from([1, 2, BLOCK - 1, BLOCK, BLOCK + 1]) | st.integers(1, 3 * BLOCK)
    masks = st.sampled_from([-1, 0, 1, 10**10]) | st.integers(0, BLOCK + 1) if like is None else st.just(like[1])
    dtypes = st.sampled_from([torch.float32, torch.float16]) if like is None else st.just(like[0].dtype)

    def build(rows: list[str], width: int, mask_id: int, dtype: torch.dtype, turned: bool, seed: int) -> Any:
        generator, width = torch.Generator().manual_seed(seed), max(width, 1 + (mask_id == 0))
        made = [_logits(kind, width, mask_id, generator).to(dtype) for kind in rows]
        logits = torch.stack(made) if made else torch.empty((0, width), dtype=dtype)
        return (logits.t().contiguous().t() if turned else logits), mask_id

    return st.builds(build, kinds, widths, masks, dtypes, st.booleans(), st.integers(0, 2**31))


OP = OpDef(
    name="canvas_select",
    schema="(Tensor logits, int mask_id) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    tolerance={torch.float32: (1e-5, 1e-37)},  # the second for sums that are denormal
)
