"""`aropt::gdn_tree_scan`: `aropt::gated_delta` on the nodes of a tree.

    gdn_tree_scan(q, k, v, g, beta, state, pairs) -> o

* `q`, `k` float [B, R, H, K]: normalized and scaled as the model wants them. `v` float [B, R, H, V].
* `g` float [B, R, H] <= 0, the logarithm of the decay; `beta` float [B, R, H], how much is learned.
* S' = exp(g[i]) * S[parent of i];  S[i] = S' + k[i] (beta[i] * (v[i] - S'^T k[i]))^T;  o[i] = S[i]^T q[i]; each head.
* `state` float [B, H, K, V]: S above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

It is a chunk of `aropt::gated_delta` (Yang et al. 2024, section 3) in which a row sees its ancestors, not all before
it. A node comes after them, so that the system for what is learned stays triangular. In ONNX its inverse is made in
blocks, twice as large in each of log2 R rounds. A product of powers of the system would take as many, and loses all
digits where keys are alike: its terms then grow as binomials.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import gated_delta
from aropt.kernels.tree_delay import LARGEST, on_trees, onnx_doubled, refused, shared, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import seen

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TILES = {"SIZE": 16, "WIDTH": 16}  # of K in a product, of V in a program


def reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition, as one triangular system."""
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    hidden, total = ~pairs.unsqueeze(1), (pairs.to(g.dtype) @ g).transpose(1, 2)
    q, k, v, beta = (x.transpose(1, 2) for x in (q, k, v, beta))
    o, _ = gated_delta.solved(state, q, k, v, total, beta, hidden)
    return o.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def fake(q: Tensor, k: Any, v: Tensor, *_: Any) -> Tensor:
    return v.new_empty(v.shape)


def onnx(q, k, v, g, beta, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    k, total, decay, learned = onnx_learned(k, v, g, beta, state, pairs)
    q, sees = op.Transpose(q, perm=[0, 2, 1, 3]), op.Unsqueeze(pairs, ints(1))
    wanted = onnx_masked(sees, op.Mul(decay, op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))), 0.0)
    o = op.MatMul(wanted, learned)
    if state is not None:
        o = op.Add(o, op.Mul(op.Exp(op.Unsqueeze(total, ints(3))), op.MatMul(q, state)))
    return op.Transpose(o, perm=[0, 2, 1, 3])


def onnx_learned(k: Any, v: Any, g: Any, beta: Any, state: Any, pairs: Any) -> tuple[Any, ...]:
    """Keys [B, H, R, K], decays since the state [B, H, R] and between nodes, and what each learns [B, H, R, V]."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    total = op.Transpose(op.MatMul(op.Cast(pairs, to=1), g), perm=[0, 2, 1])
    k, v = (op.Transpose(x, perm=[0, 2, 1, 3]) for x in (k, v))
    sees = op.Unsqueeze(pairs, ints(1))
    apart = op.Sub(op.Unsqueeze(total, ints(3)), op.Unsqueeze(total, ints(2)))
    decay = op.Exp(onnx_masked(sees, apart, float("-inf")))
    alike = onnx_masked(sees, op.Mul(decay, op.MatMul(k, op.Transpose(k, perm=[0, 1, 3, 2]))), 0.0)
    known = None if state is None else op.Mul(op.Exp(op.Unsqueeze(total, ints(3))), op.MatMul(k, state))
    return k, total, decay, onnx_solved(pairs, v, beta, alike, known)


def onnx_masked(sees: Any, value: Any, other: float) -> Any:
    """The value where a node is seen."""
    from onnxscript import opset20 as op

    return op.Where(sees, value, op.Constant(value_float=other))


def onnx_solved(pairs: Any, v: Any, beta: Any, alike: Any, known: Any) -> Any:
    """What nodes learn [B, H, R, V] from v, products of keys with keys, and what the state knows of them."""
    from onnxscript import opset20 as op

    amount = op.Unsqueeze(op.Transpose(beta, perm=[0, 2, 1]), op.Constant(value_ints=[3]))
    system = op.Mul(amount, alike)
    learned = op.Mul(amount, v if known is None else op.Sub(v, known))
    return op.MatMul(onnx_inverse(pairs, system), learned)


def onnx_inverse(pairs: Any, system: Any) -> Any:
    """The inverse of [.., R, R], lower triangular with ones for its diagonal.

    Of blocks [[a, 0], [c, b]] with inverses known of a and b, what is missing is -b^-1 c a^-1.
    """
    from onnxscript import opset20 as op

    place = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(pairs, start=1, end=2)), op.Constant(value_int=1))
    row, column = (op.Unsqueeze(place, op.Constant(value_ints=[axis])) for axis in (1, 0))
    zero, one, two = (op.Constant(value_float=n) for n in (0.0, 1.0, 2.0))
    inverse = op.Expand(op.Where(op.Equal(row, column), one, zero), op.Shape(system))

    def double(inverse: Any, size: Any) -> tuple[Any]:
        """Of blocks twice the size."""
        inner, outer = (op.Floor(op.Div(op.Cast(place, to=1), n)) for n in (size, op.Mul(size, two)))
        rows, columns = ([op.Unsqueeze(x, op.Constant(value_ints=[axis])) for x in (inner, outer)] for axis in (1, 0))
        inside = op.And(op.Greater(rows[0], columns[0]), op.Equal(rows[1], columns[1]))
        missing = op.MatMul(op.MatMul(inverse, op.Where(inside, system, zero)), inverse)
        return (op.Sub(inverse, missing),)

    return onnx_doubled(pairs, 1, (inverse,), double, 0)[0]


if HAS_TRITON:

    @triton.jit
    def substituted(system, learned, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """What nodes learn, from what they would learn alone, less `system` [of the first, ROWS] of those before."""
        row = tl.arange(0, ROWS)
        for t in range(0, rows):
            share = tl.sum(tl.where(row[None, :] == t, system, 0.0), 1)
            learned -= tl.where(row[:, None] == t, tl.sum(share[:, None] * learned, 0)[None, :], 0.0)
        return learned

    @triton.jit
    def solved_nodes(turned, g, beta, alike, v, known, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """What nodes learn [ROWS, WIDTH]; decays since the state (their logarithm) and from ancestors to nodes.

        `turned` [ROWS, ROWS]: whether the first is above the second, or the second itself; `alike`: keys by keys;
        `known`: what the state knows of them; `rows`: those that are solved for.
        """
        row = tl.arange(0, ROWS)
        above = tl.sum(tl.where(turned, g[:, None], 0.0), 0)
        total = tl.sum(tl.where(row[:, None] == row[None, :], above[None, :], 0.0), 1)  # along the other axis
        learned = beta[:, None] * (v - tl.exp(total)[:, None] * known)
        decay = tl.exp(tl.where(turned, above[None, :] - total[:, None], float("-inf")))
        strict = (row[:, None] < row[None, :]) & (decay > 0)
        system = tl.where(strict, alike * decay, 0.0) * beta[None, :]
        return substituted(system, learned, rows, ROWS), total, decay

    @triton.jit
    def _gdn_tree_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, pairs_ptr, out_ptr, rows, heads, size, width,
        GIVEN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `WIDTH` values of V; products in three parts of tf32, as exact as fp32."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        row, column = tl.arange(0, ROWS), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        there, held = (row < rows)[:, None], (column < width)[None, :]
        first = batch * rows * heads + head  # offsets from here on are small
        state_ptr += (batch * heads + head) * size * width
        STAGES: tl.constexpr = 3 if ROWS < 64 else 1  # loads ahead take registers
        alike = tl.zeros([ROWS, ROWS], tl.float32)
        known, before = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for start in tl.range(0, size, SIZE, num_stages=STAGES):
            n = start + tl.arange(0, SIZE)
            place, inside = row[:, None] * (heads * size) + n[None, :], there & (n < size)[None, :]
            k = tl.load(k_ptr + first * size + place, mask=inside, other=0.0)
            alike += tl.dot(k, tl.trans(k), input_precision="tf32x3")
            if GIVEN:
                q = tl.load(q_ptr + first * size + place, mask=inside, other=0.0)
                s = tl.load(
                    state_ptr + n[:, None] * width + column[None, :], mask=held & (n < size)[:, None], other=0.0
                )
                known += tl.dot(k, s, input_precision="tf32x3")
                before += tl.dot(q, s, input_precision="tf32x3")
        turned = seen(pairs_ptr + batch * rows * rows, rows, ROWS, True)
        g = tl.load(g_ptr + first + row * heads, mask=row < rows, other=0.0)
        beta = tl.load(beta_ptr + first + row * heads, mask=row < rows, other=0.0)
        at = row[:, None] * (heads * width) + column[None, :]
        v = tl.load(v_ptr + first * width + at, mask=there & held, other=0.0)
        learned, total, decay = solved_nodes(turned, g, beta, alike, v, known, rows, ROWS)
        wanted = tl.zeros([ROWS, ROWS], tl.float32)
        for start in tl.range(0, size, SIZE, num_stages=STAGES):
            n = start + tl.arange(0, SIZE)
            place, inside = row[:, None] * (heads * size) + n[None, :], there & (n < size)[None, :]
            q = tl.load(q_ptr + first * size + place, mask=inside, other=0.0)
            k = tl.load(k_ptr + first * size + place, mask=inside, other=0.0)
            wanted += tl.dot(k, tl.trans(q), input_precision="tf32x3")
        wanted = tl.where(decay > 0, wanted * decay, 0.0)
        o = tl.dot(tl.trans(wanted), learned, input_precision="tf32x3") + tl.exp(total)[:, None] * before
        tl.store(out_ptr + first * width + at, o, mask=there & held)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(*args: Any) -> Tensor:
    """Runs the Triton kernel: a program for some of the values of each head."""
    q, _, v, _, _, state, _ = args
    out, (batch, rows, heads, size), width = fake(q, None, v), q.shape, v.shape[3]
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (*args[:-1], shared(args[-1], batch))]
        held, grid = {"ROWS": tile(rows), **TILES}, (batch * heads, triton.cdiv(width, TILES["WIDTH"]))
        flags = {"GIVEN": state is not None, "num_warps": warps(held["ROWS"])}
        _gdn_tree_kernel[grid](*given, out, rows, heads, size, width, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size; products on tensor cores."""
    types = [*["*fp32"] * 6, "*i1", "*fp32", *["i32"] * 4, *["constexpr"] * 4]
    kernel, expects = _gdn_tree_kernel, {80: ("mma.sync",)}
    signature = dict(zip(kernel.arg_names, types, strict=True))
    return [Aot(kernel, signature, {"GIVEN": True, "ROWS": n, **TILES}, warps(n), expects) for n in (16, 32, LARGEST)]


def cost(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Any, pairs: Tensor) -> Cost:
    """What keys and queries read of the state; products of nodes with nodes, and the system; the state is read once."""
    rows, size = q.shape[1], q.shape[0] * q.shape[2] * q.shape[3] * v.shape[3]
    moved = q.nbytes + k.nbytes + 2 * v.nbytes + g.nbytes + beta.nbytes + size * q.element_size() + pairs.nbytes
    return Cost(4.0 * size * rows + rows * (4.0 * q.numel() + 3.0 * v.numel()), float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Keys that differ and keys alike, from a state or from nothing."""
    return on_trees(gated_delta.samples, 1, like)


OP = OpDef(
    name="gdn_tree_scan",
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"q": (2, 3), "k": (2, 3), "v": (2, 3), "g": (2,), "beta": (2,), "state": (1, 2, 3)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
