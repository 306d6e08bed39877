"""`aropt::linear_int8`: a linear layer with weights of eight bits, whose rows are rounded to eight bits too.

    linear_int8(Tensor x, Tensor weight, Tensor scales) -> Tensor

* `x` float [..., K], `weight` uint8 [N, G, S] with 128 for zero, `scales` float [N, G]; K = G * S features in G groups
  of S = 32, 64 or 128 neighbours. Floats are float32; or float64, of which the kernel has none.
* Each group of a row of x becomes whole numbers of -127 to 127 times its largest magnitude / 127, ties to even; a group
  with none above 1e-30 becomes zeros. The result is their product with (weight - 128) * scales, float [..., N].

Weights by group as in ONNX Runtime's MatMulNBits, rows as its `accuracy_level` 4 rounds them (dynamic quantization by
group). A weight is read as one byte where float32 takes four; products of whole numbers are exact, sums over groups are
in float. The kernel multiplies whole numbers on tensor cores.
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

SIZES = (32, 64, 128)  # of a group
ZERO, MOST = 128, 127.0  # the weight that stands for zero; the largest whole number
LEAST = 1e-30  # below it 127 / most is none that float32 holds
TILES = {"ROWS": 16, "COLUMNS": 32}
EVEN = 12582912.0  # 1.5 * 2^23: added and taken off again, it rounds to even


def _check(x: Tensor, weight: Tensor, scales: Tensor) -> None:
    torch._check(x.dim() >= 1 and weight.dim() == 3, lambda: "x must be [..., K], weight [N, G, S]")
    torch._check(weight.shape[2] in SIZES, lambda: f"a group has one of {SIZES} features")
    torch._check(x.shape[-1] == weight.shape[1] * weight.shape[2], lambda: "x and weight differ in K")
    torch._check(scales.shape == weight.shape[:2], lambda: "scales must be [N, G]")
    floats = x.dtype == scales.dtype and x.dtype in (torch.float32, torch.float64)
    torch._check_type(floats and weight.dtype == torch.uint8, lambda: "x and scales must be float32, weight uint8")


def packed(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A float weight [N, K] as `weight` and `scales` of groups of `size`: the nearest of 255 evenly spaced values."""
    groups = weight.unflatten(1, (-1, size))
    scales = groups.abs().amax(2) / MOST
    whole = torch.round(groups / torch.where(scales > 0, scales, 1.0).unsqueeze(2))
    return (whole + ZERO).to(torch.uint8), scales


def unpacked(weight: Tensor, scales: Tensor) -> Tensor:
    """The float weight [N, K] that a product is taken with."""
    floats = torch.sub(weight.to(scales.dtype), ZERO)
    return (floats * scales.unsqueeze(2)).flatten(1)


def rounded(x: Tensor, size: int) -> Tensor:
    """x with each group of its rows rounded."""
    groups = x.unflatten(-1, (-1, size))
    most = groups.abs().amax(-1, keepdim=True)
    up = torch.where(most > LEAST, MOST / most, 0.0)
    whole: Tensor = torch.round(groups * up) * (most / MOST)
    return whole.flatten(-2)


def reference(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """The definition: see the module's text.

    Raises:
        RuntimeError: on other shapes.
        TypeError: on other dtypes.
    """
    _check(x, weight, scales)
    return F.linear(rounded(x, weight.shape[2]), unpacked(weight, scales)).contiguous()


def fake(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """[..., N], contiguous."""
    _check(x, weight, scales)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def onnx(x, weight, scales):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20)."""
    from onnxscript import opset20 as op

    columns, groups, size = weight.shape
    lead = [0] * (len(x.shape) - 1)  # 0: the size as it is
    parts = op.Reshape(x, op.Constant(value_ints=[*lead, groups, size]))
    most = op.ReduceMax(op.Abs(parts), op.Constant(value_ints=[-1]), keepdims=1)
    limit, zero, least = (op.CastLike(op.Constant(value_float=v), x) for v in (MOST, 0.0, LEAST))
    up = op.Where(op.Greater(most, least), op.Div(limit, most), zero)
    whole = op.Mul(op.Round(op.Mul(parts, up)), op.Div(most, limit))
    x = op.Reshape(whole, op.Constant(value_ints=[*lead, groups * size]))
    floats = op.Sub(op.CastLike(weight, scales), op.CastLike(op.Constant(value_float=float(ZERO)), scales))
    floats = op.Mul(floats, op.Unsqueeze(scales, op.Constant(value_ints=[2])))
    floats = op.Reshape(floats, op.Constant(value_ints=[columns, groups * size]))
    return op.MatMul(x, op.Transpose(floats, perm=[1, 0]))


def contrib(x, weight, scales):  # type: ignore[no-untyped-def]
    """The same as ONNX Runtime's MatMulNBits."""
    from aropt.ir.opdef import onnx_node

    columns, groups, size = weight.shape
    given = {"K": groups * size, "N": columns, "bits": 8, "block_size": size, "accuracy_level": 4}
    return onnx_node("com.microsoft", "MatMulNBits", [x, weight, scales], 1, **given)[0]


if HAS_TRITON:

    @triton.jit
    def _linear_int8_kernel(  # type: ignore[no-untyped-def]
        x_ptr, weight_ptr, scales_ptr, out_ptr, rows, columns, groups,
        SIZE: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One program for `ROWS` rows and `COLUMNS` columns, group by group."""
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
        k = tl.arange(0, SIZE)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for group in range(0, groups):
            at = group * SIZE + k
            x = tl.load(x_ptr + row[:, None] * (groups * SIZE) + at[None, :], mask=row[:, None] < rows, other=0.0)
            most = tl.max(tl.abs(x), 1)
            up = tl.where(most > 1e-30, 127.0 / most, 0.0)
            whole = ((x * up[:, None] + EVEN) - EVEN).to(tl.int8)
            w = tl.load(
                weight_ptr + column[None, :] * (groups * SIZE) + at[:, None], mask=column[None, :] < columns, other=128
            )
            product = tl.dot(whole, (w.to(tl.int16) - 128).to(tl.int8), out_dtype=tl.int32).to(tl.float32)
            scale = tl.load(scales_ptr + column * groups + group, mask=column < columns, other=0.0)
            total += product * (most / 127.0)[:, None] * scale[None, :]
        to = out_ptr + row[:, None] * columns + column[None, :]
        tl.store(to, total, mask=(row[:, None] < rows) & (column[None, :] < columns))


def warps(size: int) -> int:
    """Of a program, so that a group's part of both operands stays in registers."""
    return 4 if size < 128 else 8


def supports(x: Tensor, weight: Tensor, scales: Tensor) -> str | None:
    """Why the kernel can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    return None if x.dtype == torch.float32 else "the kernel computes in float32"


def launch(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for `ROWS` rows and `COLUMNS` columns."""
    out = fake(x, weight, scales)
    columns, groups, size = weight.shape
    rows = out.numel() // max(columns, 1)
    if out.numel():
        given = [t.contiguous() for t in (x, weight, scales)]
        grid = (triton.cdiv(rows, TILES["ROWS"]), triton.cdiv(columns, TILES["COLUMNS"]))
        _linear_int8_kernel[grid](*given, out, rows, columns, groups, size, EVEN, **TILES, num_warps=warps(size))
    return out


def aot() -> Sequence[Aot]:
    """Each size of a group; the product on tensor cores."""
    types = ["*fp32", "*u8", "*fp32", "*fp32", *["i32"] * 3, *["constexpr"] * 4]
    signature = dict(zip(_linear_int8_kernel.arg_names, types, strict=True))
    expects = dict.fromkeys((80, 90, 100), ("mma.sync",))
    kernel = _linear_int8_kernel
    return [Aot(kernel, signature, {"SIZE": n, "EVEN": EVEN, **TILES}, warps(n), expects) for n in SIZES]


def cost(x: Tensor, weight: Tensor, scales: Tensor) -> Cost:
    """Two operations a weight and row; all is read once and the result written."""
    rows, result = x.numel() // max(x.shape[-1], 1), fake(x, weight, scales)
    return Cost(2.0 * rows * weight.numel(), float(sum(t.nbytes for t in (x, weight, scales, result))))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Argument tuples: no rows, rows of zeros, one large feature, ties in the rounding, sizes at the tiles' edges."""
    from hypothesis import strategies as st

    lead = st.sampled_from([0, 1, 2, 3, 17])
    rank = None if like is None else like[0].dim() - 1
    leads = st.lists(lead, min_size=rank or 0, max_size=2 if rank is None else rank)
    shapes = st.tuples(st.sampled_from([1, 31, 32, 33]), st.integers(1, 3), st.sampled_from(SIZES[:2]))
    shapes = shapes if like is None else st.just(tuple(like[1].shape))

    def build(lead: list[int], shape: tuple[int, int, int], kind: str, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        columns, groups, size = shape
        x = torch.randn(*lead, groups * size, generator=generator)
        if kind == "zeros":
            x[..., :size] = 0
        elif kind == "large":
            x[..., 0] = 1000.0
        elif kind == "ties":  # whole numbers and halves, the largest 127
            x = torch.randint(-253, 254, x.shape, generator=generator) / 2
            x[..., ::size] = 127.0
        x = x / 64  # the same steps; else float32 sums, in an order that differs by processor, round by the tolerance
        weights = packed(torch.randn(columns, groups * size, generator=generator) * size**-0.5, size)
        return x, *(weights if like is None else like[1:])

    kinds = st.sampled_from(["plain", "zeros", "large", "ties"])
    return st.builds(build, leads, shapes, kinds, st.integers(0, 2**31))


OP = OpDef(
    name="linear_int8",
    schema="(Tensor x, Tensor weight, Tensor scales) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    held=("weight", "scales"),
    steps="x",
    launch=launch,
    supports=supports,
    aot=aot,
    tolerance={torch.float32: (1e-5, 2e-5)},
)
