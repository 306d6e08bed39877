"""`aropt::selective_tree_scan`: `aropt::selective_scan` on the nodes of a tree.

    selective_tree_scan(x, dt, A, B, C, D, state, pairs) -> y

* `x` float [B, D, R]: channels, then nodes. `dt` float [B, D, R] >= 0, after its softplus. `A` float [D, N] < 0.
* `B`, `C` float [B, N, R]. `D` float [D] or None.
* h[i] = exp(dt[i] * A) * h[parent of i] + dt[i] * B[i] * x[i]  and  y[i] = sum over N of h[i] * C[i] + D * x[i].
* `state` float [B, D, N]: h above the nodes without a parent, None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

A closed form would take an exponential for each pair of nodes, channel and state. The definition steps as
`aropt::selective_scan` does, node by node, and gives its bits; in ONNX nodes step as those of `aropt::rg_lru_tree`. The
kernel keeps h in registers down a chain, and puts it aside where a tree branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels import selective_scan
from aropt.kernels.rg_lru_tree import onnx_walked, walked
from aropt.kernels.tree_delay import LARGEST, on_trees, refused, shared, tile, warps

try:
    import triton
    import triton.language as tl

    from aropt.kernels.tree_delay import parents_in

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, pairs: Tensor
) -> Tensor:
    """The definition, node by node."""
    state = x.new_zeros(x.shape[0], *A.shape) if state is None else state
    y = torch.stack(walked(state, pairs, lambda h, t: selective_scan.row(h, x, dt, A, B, C, t)), 2)
    return (y if D is None else y + D.unsqueeze(1) * x).clone(memory_format=torch.contiguous_format)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx(x, dt, A, B, C, D, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops, with nodes before channels: [B, R, D, N]."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    def first(value: Any, axis: int) -> Any:
        """Nodes first, and an axis more."""
        return op.Unsqueeze(op.Transpose(value, perm=[0, 2, 1]), ints(axis))

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), ints(*map(int, A.shape)), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), shape)
    given = op.Mul(first(op.Mul(dt, x), 3), first(B, 2))
    h = onnx_walked(op.Exp(op.Mul(first(dt, 3), A)), given, state, pairs)
    y = op.Transpose(op.Squeeze(op.MatMul(h, first(C, 3)), ints(3)), perm=[0, 2, 1])
    return y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, ints(1)), x))


if HAS_TRITON:

    @triton.jit
    def _selective_tree_kernel(  # type: ignore[no-untyped-def]
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, direct_ptr, state_ptr, pairs_ptr, kept_ptr, out_ptr, rows, channels, width,
        DIRECT: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for `CHANNELS` channels of a tree, node by node."""
        batch, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
        channel, n = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS), tl.arange(0, WIDTH)
        held, wide = channel < channels, n < width
        inside, cell = held[:, None] & wide[None, :], channel[:, None] * width + n[None, :]
        parents = parents_in(pairs_ptr + batch * rows * rows, rows, ROWS)
        first, size = batch * channels * rows, channels * width
        a = tl.load(a_ptr + cell, mask=inside, other=0.0)
        state = tl.zeros([CHANNELS, WIDTH], tl.float32)
        if GIVEN:
            state = tl.load(state_ptr + batch * size + cell, mask=inside, other=0.0)
        if DIRECT:
            direct = tl.load(direct_ptr + channel, mask=held, other=0.0)
        h = state
        for t in range(0, rows):
            parent = tl.sum(tl.where(row == t, parents, 0), 0)
            if parent < 0:
                h = state
            elif parent < t - 1:
                tl.debug_barrier()  # what other threads put aside is there
                h = tl.load(kept_ptr + (batch * rows + parent) * size + cell, mask=inside, other=0.0)
            at = channel * rows + t
            dt = tl.load(dt_ptr + first + at, mask=held, other=0.0)
            x = tl.load(x_ptr + first + at, mask=held, other=0.0)
            b = tl.load(b_ptr + (batch * width + n) * rows + t, mask=wide, other=0.0)
            c = tl.load(c_ptr + (batch * width + n) * rows + t, mask=wide, other=0.0)
            h = tl.exp(dt[:, None] * a) * h + dt[:, None] * b[None, :] * x[:, None]
            y = tl.sum(h * c[None, :], 1)
            if DIRECT:
                y += direct * x
            tl.store(out_ptr + first + at, y, mask=held)
            if tl.max(tl.where((row > t + 1) & (parents == t), 1, 0), 0) > 0:
                tl.store(kept_ptr + (batch * rows + t) * size + cell, h, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given) or selective_scan.supports(*given[:-1])


def tiles(rows: int, width: int) -> dict[str, int]:
    """Of a program, so that it stays in registers."""
    return {"ROWS": tile(rows), **selective_scan.tiles(width)}


def launch(*args: Any) -> Tensor:
    """Runs the Triton kernel: a program for some channels of a tree."""
    x, A, D, state = args[0], args[2], args[5], args[6]
    out, (batch, channels, rows), width = fake(x), x.shape, A.shape[1]
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (*args[:-1], shared(args[-1], batch))]
        held, kept = tiles(rows, width), x.new_empty(batch, rows, channels, width)
        flags = {"DIRECT": D is not None, "GIVEN": state is not None, "num_warps": warps(held["ROWS"])}
        grid = (batch, triton.cdiv(channels, held["CHANNELS"]))
        _selective_tree_kernel[grid](*given, kept, out, rows, channels, width, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size, Mamba's 16 states and more."""
    types = [*["*fp32"] * 7, "*i1", "*fp32", "*fp32", *["i32"] * 3, *["constexpr"] * 5]
    kernel, flags = _selective_tree_kernel, {"DIRECT": True, "GIVEN": True}
    signature, sizes = dict(zip(kernel.arg_names, types, strict=True)), [(16, 16), (32, 16), (LARGEST, 16), (16, 256)]
    return [Aot(kernel, signature, {**flags, **tiles(n, width)}, warps(n)) for n, width in sizes]


def cost(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any, state: Any, pairs: Tensor) -> Cost:
    """Six operations an element of the state and node; the state is read."""
    size = x.shape[0] * A.numel()
    moved = 2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes + 4 * size + pairs.nbytes
    return Cost(6.0 * size * x.shape[2], float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One node and several, from a state or from nothing."""
    return on_trees(selective_scan.samples, 2, like)


OP = OpDef(
    name="selective_tree_scan",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (1,), "dt": (1,), "A": (0, 1), "B": (1,), "C": (1,), "D": (0,), "state": (1, 2)},
    tolerance={torch.float32: (1e-3, 1e-4)},
)
