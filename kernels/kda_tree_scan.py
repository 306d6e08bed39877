"""`aropt::kda_tree_scan`: `aropt::kda` on the nodes of a tree.

    kda_tree_scan(q, k, v, g, beta, state, pairs) -> o

As `aropt::gdn_tree_scan`, but `g` is float [B, R, H, K]: each row of S with its own decay. The decays between nodes are
differences of sums, one for each channel of keys: quotients would overflow. So products of nodes with nodes are no
products of matrices. A kernel makes them once for each head, and another one takes them for some of its values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, OpDef
from aropt.kernels import kda
from aropt.kernels.gdn_tree_scan import TILES, cost, fake, onnx_masked, onnx_solved
from aropt.kernels.tree_delay import on_trees, refused, shared, sized, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.gdn_tree_scan import substituted
    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition, as one triangular system."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    q, k, v, g, beta = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    sees = pairs.unsqueeze(1)
    o, _ = kda.solved(state, q, k, v, sees.to(g.dtype) @ g, beta, ~sees)
    return o.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def onnx(q, k, v, g, beta, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    q, k, v, g = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v, g))
    sees = op.Unsqueeze(pairs, ints(1))
    total = op.MatMul(op.Cast(sees, to=1), g)
    apart = op.Sub(op.Unsqueeze(total, ints(3)), op.Unsqueeze(total, ints(2)))  # [B, H, R, R, K]
    decay = op.Exp(onnx_masked(op.Unsqueeze(sees, ints(4)), apart, float("-inf")))
    decayed = op.Mul(decay, op.Unsqueeze(k, ints(2)))
    alike, wanted = (
        onnx_masked(sees, op.Squeeze(op.MatMul(decayed, op.Unsqueeze(x, ints(4))), ints(4)), 0.0) for x in (k, q)
    )
    since = op.Exp(total)
    known, before = [None, None] if state is None else [op.MatMul(op.Mul(since, x), state) for x in (k, q)]
    o = op.MatMul(wanted, onnx_solved(pairs, v, beta, alike, known))
    return op.Transpose(o if before is None else op.Add(o, before), perm=[0, 2, 1, 3])


if HAS_TRITON:

    @triton.jit
    def _kda_products_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, g_ptr, pairs_ptr, total_ptr, alike_ptr, wanted_ptr, rows, heads, size, ROWS: tl.constexpr
    ):
        """One program for a head: decays since the state, and decayed keys by keys and by queries."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row = tl.arange(0, ROWS)
        turned = seen(pairs_ptr + batch * rows * rows, rows, ROWS, True)  # [above, nodes]
        alike, wanted = tl.zeros([ROWS, ROWS], tl.float32), tl.zeros([ROWS, ROWS], tl.float32)
        first = (batch * rows * heads + head) * size
        for channel in range(0, size):
            at = first + row * (heads * size) + channel
            q, k = tl.load(q_ptr + at, mask=row < rows, other=0.0), tl.load(k_ptr + at, mask=row < rows, other=0.0)
            g = tl.load(g_ptr + at, mask=row < rows, other=0.0)
            above = tl.sum(tl.where(turned, g[:, None], 0.0), 0)
            total = tl.sum(tl.where(row[:, None] == row[None, :], above[None, :], 0.0), 1)  # along the other axis
            tl.store(total_ptr + at, total, mask=row < rows)
            decayed = tl.exp(tl.where(turned, above[None, :] - total[:, None], float("-inf"))) * k[:, None]
            alike += decayed * k[None, :]
            wanted += decayed * q[None, :]
        to = (batch * heads + head) * rows * rows + row[:, None] * rows + row[None, :]
        inside = (row < rows)[:, None] & (row < rows)[None, :]
        tl.store(alike_ptr + to, tl.where(turned, alike, 0.0), mask=inside)
        tl.store(wanted_ptr + to, tl.where(turned, wanted, 0.0), mask=inside)

    @triton.jit
    def _kda_tree_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, v_ptr, beta_ptr, state_ptr, total_ptr, alike_ptr, wanted_ptr, out_ptr, rows, heads, size, width,
        GIVEN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `WIDTH` values of V; products in three parts of tf32, as exact as fp32."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row, column = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        there, held = (row < rows)[:, None], (column < width)[None, :]
        first = batch * rows * heads + head  # offsets from here on are small
        state_ptr += (batch * heads + head) * size * width
        known, before = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        if GIVEN:
            for start in range(0, size, SIZE):
                n = start + tl.arange(0, SIZE)
                place, inside = row[:, None] * (heads * size) + n[None, :], there & (n < size)[None, :]
                since = tl.exp(tl.load(total_ptr + first * size + place, mask=inside, other=0.0))
                k = tl.load(k_ptr + first * size + place, mask=inside, other=0.0) * since
                q = tl.load(q_ptr + first * size + place, mask=inside, other=0.0) * since
                place, inside = n[:, None] * width + column[None, :], (n < size)[:, None] & held
                s = tl.load(state_ptr + place, mask=inside, other=0.0)
                known += tl.dot(k, s, input_precision="tf32x3")
                before += tl.dot(q, s, input_precision="tf32x3")
        beta = tl.load(beta_ptr + first + row * heads, mask=row < rows, other=0.0)
        at = row[:, None] * (heads * width) + column[None, :]
        v = tl.load(v_ptr + first * width + at, mask=there & held, other=0.0)
        to = (batch * heads + head) * rows * rows + row[:, None] * rows + row[None, :]
        strict = (row[:, None] < row[None, :]) & (row < rows)[None, :]
        system = tl.load(alike_ptr + to, mask=strict, other=0.0) * beta[None, :]
        learned = substituted(system, beta[:, None] * (v - known), rows, ROWS)
        wanted = tl.load(wanted_ptr + to, mask=there & (row < rows)[None, :], other=0.0)
        o = tl.dot(tl.trans(wanted), learned, input_precision="tf32x3") + before
        tl.store(out_ptr + first * width + at, o, mask=there & held)


def supports(*given: Any) -> str | None:
    """Why the kernels can't run, or None."""
    return refused(given)


def launch(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """Runs the Triton kernels: a program for each head, then one for some of its values."""
    out, (batch, rows, heads, size), width = fake(q, None, v), q.shape, v.shape[3]
    if out.numel():
        q, k, v, g, beta, pairs = (t.contiguous() for t in (q, k, v, g, beta, shared(pairs, batch)))
        total, products = torch.empty_like(g), q.new_empty(2, batch, heads, rows, rows).unbind()
        held = {"ROWS": tile(rows), "num_warps": warps(tile(rows))}
        _kda_products_kernel[(batch * heads,)](q, k, g, pairs, total, *products, rows, heads, size, **held)
        given = (q, k, v, beta, out if state is None else state.contiguous(), total, *products)
        grid, flags = (batch * heads, triton.cdiv(width, TILES["WIDTH"])), {"GIVEN": state is not None, **TILES}
        _kda_tree_kernel[grid](*given, out, rows, heads, size, width, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size; products with the state on tensor cores."""
    products = sized(_kda_products_kernel, [*["*fp32"] * 3, "*i1", *["*fp32"] * 3, *["i32"] * 3], {})
    types, flags = [*["*fp32"] * 9, *["i32"] * 4], {"GIVEN": True, **TILES}
    return [*products, *sized(_kda_tree_kernel, types, flags, expects={80: ("mma.sync",)})]


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys that differ and keys alike, from a state or from nothing."""
    return on_trees(kda.samples, 1, like)


OP = OpDef(
    name="kda_tree_scan",
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"q": (2, 3), "k": (2, 3), "v": (2, 3), "g": (2, 3), "beta": (2,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
