"""`aropt::token_unshuffle`: the logits of each id of a window, from the one row that stands for them.

    token_unshuffle(Tensor x, Tensor weight, Tensor? bias, Tensor? head, Tensor? head_bias) -> Tensor

* `x` [..., d], `weight` [W, c, d], `bias` [W, c], `head` [V, c], `head_bias` [V]: all of one dtype, float32, float16 or
  bfloat16. A bias may be None, that of the head has to be where there is no head.
* Place j of a window reads the part `weight[j] x + bias[j]`, and the head that all places share makes logits of it.
  Without a head the parts are the logits (c = V): the expansion is folded into the head.
* result [..., W, V], or [..., W, c] without a head. Parts are rounded to the dtype.

The unshuffle of Token-Shuffle (Ma et al. 2025, arXiv 2504.17789, section 3.2). The kernel keeps a part in registers
between the two products. Without a head there is one product, which is left to the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
ROWS, DEPTH, COLUMNS = 16, 16, 32  # of the tiles that the kernel multiplies
SHARE = 256  # logits that a program writes of each place
TILES = {"SHARE": SHARE, "ROWS": ROWS, "DEPTH": DEPTH, "COLUMNS": COLUMNS}
LARGEST = 128  # features of a part that the kernel keeps in registers
WARPS = 8


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor | None, head_bias: Tensor | None) -> None:
    torch._check(x.dim() >= 1 and weight.dim() == 3, lambda: "x must be [..., d], weight [W, c, d]")
    torch._check(x.shape[-1] == weight.shape[2], lambda: "x and weight differ in d")
    if bias is not None:
        torch._check(bias.shape == weight.shape[:2], lambda: "bias must be [W, c]")
    if head is not None:
        torch._check(head.dim() == 2 and head.shape[1] == weight.shape[1], lambda: "head must be [V, c]")
    if head_bias is not None:
        torch._check(head is not None, lambda: "there is a bias of the head, and no head")
        torch._check(head is not None and head_bias.shape == head.shape[:1], lambda: "the head's bias must be [V]")
    same = all(t is None or t.dtype == x.dtype for t in (weight, bias, head, head_bias))
    torch._check_type(same and x.dtype in FLOATS, lambda: "all must be float32, float16 or bfloat16, and the same")


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor | None, head_bias: Tensor | None) -> Tensor:
    """The definition: see the module's text.

    Raises:
        RuntimeError: on other shapes.
        TypeError: on other dtypes.
    """
    _check(x, weight, bias, head, head_bias)
    parts = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    parts = parts.unflatten(-1, weight.shape[:2])
    return (parts if head is None else F.linear(parts, head, head_bias)).contiguous()


def fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    """[..., W, V], or [..., W, c] without a head; contiguous."""
    _check(x, weight, *rest)
    head = rest[1]
    return x.new_empty((*x.shape[:-1], weight.shape[0], weight.shape[1] if head is None else head.shape[0]))


def onnx(x, weight, bias, head, head_bias):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20): one or two MatMul, whose transposed weights fold into constants."""
    from onnxscript import opset20 as op

    rank = len(x.shape)
    sizes = op.Shape(weight, start=0, end=2)
    flat = op.Reshape(weight, op.Concat(op.Constant(value_ints=[-1]), op.Shape(weight, start=2), axis=0))
    parts = op.MatMul(x, op.Transpose(flat, perm=[1, 0]))
    if bias is not None:
        parts = op.Add(parts, op.Reshape(bias, op.Constant(value_ints=[-1])))
    known = weight.shape[:2]
    if all(isinstance(size, int) for size in known):
        parts = op.Reshape(parts, op.Constant(value_ints=[*[0] * (rank - 1), *known]))  # 0: the size as it is
    else:
        parts = op.Reshape(parts, op.Concat(op.Shape(x, start=0, end=rank - 1), sizes, axis=0), allowzero=1)
    if head is None:
        return parts
    logits = op.MatMul(parts, op.Transpose(head, perm=[1, 0]))
    return logits if head_bias is None else op.Add(logits, head_bias)


if HAS_TRITON:

    @triton.jit
    def _unshuffle_kernel(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, bias_ptr, head_ptr, head_bias_ptr, out_ptr, rows, depth, part, vocab,
        BIASED: tl.constexpr, HEAD_BIASED: tl.constexpr, PART: tl.constexpr, SHARE: tl.constexpr,
        ROWS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One program for `ROWS` rows, a place of the window and `SHARE` of its logits."""
        place, window = tl.program_id(1), tl.num_programs(1)
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        feature, k = tl.arange(0, PART), tl.arange(0, DEPTH)
        weight_ptr += place.to(tl.int64) * part * depth
        total = tl.zeros([ROWS, PART], tl.float32)
        for start in range(0, depth, DEPTH):
            at = start + k
            x = tl.load(
                x_ptr + row[:, None] * depth + at[None, :],
                mask=(row[:, None] < rows) & (at[None, :] < depth), other=0.0,
            )  # fmt: skip
            w = tl.load(
                weight_ptr + feature[None, :] * depth + at[:, None],
                mask=(feature[None, :] < part) & (at[:, None] < depth), other=0.0,
            )  # fmt: skip
            total = tl.dot(x, w, total, input_precision="ieee")
        if BIASED:
            total += tl.load(bias_ptr + place * part + feature, mask=feature < part, other=0.0).to(tl.float32)[None, :]
        parts = total.to(out_ptr.dtype.element_ty)
        first = tl.program_id(2) * SHARE
        for start in range(first, min(first + SHARE, vocab), COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            head = tl.load(
                head_ptr + column[None, :].to(tl.int64) * part + feature[:, None],
                mask=(column[None, :] < vocab) & (feature[:, None] < part), other=0.0,
            )  # fmt: skip
            logits = tl.dot(parts, head, input_precision="ieee")
            if HEAD_BIASED:
                logits += tl.load(head_bias_ptr + column, mask=column < vocab, other=0.0).to(tl.float32)[None, :]
            to = out_ptr + (row[:, None] * window + place) * vocab + column[None, :]
            mask = (row[:, None] < rows) & (column[None, :] < vocab)
            tl.store(to, logits.to(out_ptr.dtype.element_ty), mask=mask)


def supports(
    x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor | None, head_bias: Tensor | None
) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    if head is None:
        return "without a head there is one product, and the library's is as good"
    return f"a part has at most {LARGEST} features" if weight.shape[1] > LARGEST else None


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor | None, head_bias: Tensor | None) -> Tensor:
    """Runs the Triton kernel: a program for `ROWS` rows, a place and `SHARE` logits."""
    out = fake(x, weight, bias, head, head_bias)
    if head is None:
        raise ValueError("the kernel needs a head")
    window, part, depth = weight.shape
    vocab, rows = head.shape[0], out.numel() // (window * head.shape[0])
    if rows:
        given = [(out if t is None else t).contiguous() for t in (x, weight, bias, head, head_bias)]
        flags = {"BIASED": bias is not None, "HEAD_BIASED": head_bias is not None}
        tiles = {"PART": max(16, triton.next_power_of_2(part)), **TILES}
        grid = (triton.cdiv(rows, ROWS), window, triton.cdiv(vocab, SHARE))
        _unshuffle_kernel[grid](*given, out, rows, depth, part, vocab, **flags, **tiles, num_warps=WARPS)
    return out


def aot() -> Sequence[Aot]:
    """The largest part for each dtype, with and without biases; 16-bit products on tensor cores."""
    found = []
    for dtype in FLOATS.values():
        types = [*[f"*{dtype}"] * 6, *["i32"] * 4, *["constexpr"] * 7]
        signature = dict(zip(_unshuffle_kernel.arg_names, types, strict=True))
        expects = {} if dtype == "fp32" else dict.fromkeys((80, 90, 100), ("mma.sync",))
        for biased in (0, 1):
            constants = {"BIASED": biased, "HEAD_BIASED": biased, "PART": LARGEST, **TILES}
            found.append(Aot(_unshuffle_kernel, signature, constants, WARPS, expects))
    return found


def cost(x: Tensor, weight: Tensor, bias: Tensor | None, head: Tensor | None, head_bias: Tensor | None) -> Cost:
    """Two operations a weight and row, the head's once a place; all is read once and the result written."""
    rows, result = x.numel() // max(x.shape[-1], 1), fake(x, weight, bias, head, head_bias)
    flops = 2.0 * rows * (weight.numel() + (0 if head is None else weight.shape[0] * head.numel()))
    return Cost(flops, float(sum(t.nbytes for t in (x, weight, bias, head, head_bias, result) if t is not None)))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: with and without head and biases, sizes at the tiles' edges, no rows."""
    from hypothesis import strategies as st

    def held(index: int) -> Any:
        return st.booleans() if like is None else st.just(like[index] is not None)

    small = st.sampled_from([0, 1, 2, 3])
    rank = None if like is None else like[0].dim() - 1
    leads = st.lists(small, min_size=rank or 0, max_size=2 if rank is None else rank)
    rows = st.sampled_from([1, 2, ROWS, ROWS + 1]) if rank != 0 else st.none()
    edges = st.sampled_from([1, DEPTH - 1, DEPTH, DEPTH + 1, 2 * DEPTH]) | st.integers(1, 40)
    vocabularies = st.sampled_from([1, COLUMNS, COLUMNS + 1, SHARE, SHARE + 1]) | st.integers(1, 40)
    dtypes = st.sampled_from([torch.float32, torch.float16]) if like is None else st.just(like[0].dtype)

    def build(lead: list[int], count: int | None, window: int, part: int, depth: int, vocab: int, biased: bool,
              headed: bool, head_biased: bool, dtype: torch.dtype, turned: bool, seed: int) -> Any:  # fmt: skip
        generator = torch.Generator().manual_seed(seed)

        def made(*shape: int) -> Tensor:
            value: Tensor = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            return value.to(dtype)

        lead = [*lead[:-1], count] if lead and count and lead[-1] else lead
        x, weight = made(*lead, depth), made(window, part, depth)
        x = x.mT.contiguous().mT if turned and lead else x
        bias = made(window, part) if biased else None
        head = made(vocab, part) if headed else None
        return x, weight, bias, head, made(vocab) if headed and head_biased else None

    flags, seeds, windows = st.booleans(), st.integers(0, 2**31), st.integers(1, 5)
    given = (held(2), held(3), held(4), dtypes, flags, seeds)
    return st.builds(build, leads, rows, windows, edges, edges, vocabularies, *given)


OP = OpDef(
    name="token_unshuffle",
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor? head, Tensor? head_bias) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    tolerance={torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3)},
)
