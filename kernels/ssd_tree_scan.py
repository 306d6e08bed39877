"""`aropt::ssd_tree_scan`: `aropt::ssd_scan` on the nodes of a tree (Wu et al. 2025, STree).

    ssd_tree_scan(x, dt, A, B, C, D, state, pairs) -> y

* `x` float [B, R, H, P]; `dt` float [B, R, H] >= 0, after its softplus; `A` float [H] < 0.
* `B`, `C` float [B, R, G, N]: each group serves H / G heads in turn. `D` float [H] or None.
* S[i] = exp(dt[i] * A) * S[parent of i] + dt[i] * x[i] B[i]^T  and  y[i] = S[i] C[i] + D * x[i], for each head.
* `state` float [B, H, P, N]: S above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

It is a chunk of `aropt::ssd_scan` in which a row sees its ancestors, not all before it: with L[i] the sum of dt * A
over j = i and its ancestors, y[i] = exp(L[i]) state C[i] + sum over j of exp(L[i] - L[j]) (C[i] B[j]) dt[j] x[j].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import ssd_scan
from aropt.kernels.tree_delay import LARGEST, on_trees, refused, shared, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

WIDTH = 16  # of N in a product


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


if HAS_TRITON:

    @triton.jit
    def _ssd_tree_kernel(  # type: ignore[no-untyped-def]
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, direct_ptr, state_ptr, pairs_ptr, out_ptr, rows, heads, groups, size, width,
        DIRECT: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `SIZE` values of P; products in three parts of tf32, as exact as fp32."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row, column = tl.arange(0, ROWS), tl.program_id(1) * SIZE + tl.arange(0, SIZE)
        there, held = (row < rows)[:, None], (column < size)[None, :]
        pairs_ptr += batch * rows * rows  # offsets from here on are small
        first, group = (batch * rows * heads + head) * size, batch * rows * groups + head // (heads // groups)
        state_ptr += (batch * heads + head) * size * width
        scores, before = tl.zeros([ROWS, ROWS], tl.float32), tl.zeros([ROWS, SIZE], tl.float32)
        for start in range(0, width, WIDTH):
            n = start + tl.arange(0, WIDTH)
            at, inside = row[:, None] * (groups * width) + n[None, :], there & (n < width)[None, :]
            c = tl.load(c_ptr + group * width + at, mask=inside, other=0.0)
            b = tl.load(b_ptr + group * width + at, mask=inside, other=0.0)
            scores += tl.dot(c, tl.trans(b), input_precision="tf32x3")
            if GIVEN:
                s = tl.load(
                    state_ptr + column[None, :] * width + n[:, None], mask=held & (n < width)[:, None], other=0.0
                )
                before += tl.dot(c, s, input_precision="tf32x3")
        dt = tl.load(dt_ptr + batch * rows * heads + row * heads + head, mask=row < rows, other=0.0)
        logs = dt * tl.load(a_ptr + head)
        above = tl.sum(tl.where(seen(pairs_ptr, rows, ROWS, True), logs[:, None], 0.0), 0)  # along the other axis
        sees = seen(pairs_ptr, rows, ROWS, False)
        total = tl.sum(tl.where(sees, logs[None, :], 0.0), 1)
        decay = tl.exp(tl.where(sees, total[:, None] - above[None, :], float("-inf")))
        scores = tl.where(sees, scores * decay, 0.0)
        at = row[:, None] * (heads * size) + column[None, :]
        x = tl.load(x_ptr + first + at, mask=there & held, other=0.0)
        y = tl.dot(scores, x * dt[:, None], input_precision="tf32x3")
        if GIVEN:
            y += tl.exp(total)[:, None] * before
        if DIRECT:
            y += tl.load(direct_ptr + head) * x
        tl.store(out_ptr + first + at, y, mask=there & held)


def tiles(rows: int) -> dict[str, int]:
    """Of a program, so that it stays in registers."""
    return {"ROWS": tile(rows), "SIZE": 32 if rows <= 32 else 16, "WIDTH": WIDTH}


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(*args: Any) -> Tensor:
    """Runs the Triton kernel: a program for some of the values of each head."""
    x, B, D, state = args[0], args[3], args[5], args[6]
    out, (batch, rows, heads, size) = fake(x), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (*args[:-1], shared(args[-1], batch))]
        flags, held = {"DIRECT": D is not None, "GIVEN": state is not None}, tiles(rows)
        grid = (batch * heads, triton.cdiv(size, held["SIZE"]))
        sizes = rows, heads, B.shape[2], size, B.shape[3]
        _ssd_tree_kernel[grid](*given, out, *sizes, **flags, **held, num_warps=warps(held["ROWS"]))
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size; products on tensor cores."""
    types = [*["*fp32"] * 7, "*i1", "*fp32", *["i32"] * 5, *["constexpr"] * 5]
    signature = dict(zip(_ssd_tree_kernel.arg_names, types, strict=True))
    flags, kernel, expects = {"DIRECT": True, "GIVEN": True}, _ssd_tree_kernel, {80: ("mma.sync",)}
    return [Aot(kernel, signature, {**flags, **tiles(n)}, warps(n), expects) for n in (16, 32, LARGEST)]


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
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (2, 3), "dt": (2,), "A": (0,), "B": (2, 3), "C": (2, 3), "D": (0,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
