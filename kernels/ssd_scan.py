"""`aropt::ssd_scan`: Mamba-2's state-space duality, one scalar decay a head (Dao & Gu 2024, section 6).

    ssd_scan(x, dt, A, B, C, D, state, positions) -> (y, state)

* `x` float [B, R, H, P]; `dt` float [B, R, H] >= 0, after its softplus; `A` float [H] < 0.
* `B`, `C` float [B, R, G, N]: each group serves H / G heads in turn. `D` float [H] or None.
* S[t] = exp(dt[t] * A) * S[t - 1] + dt[t] * x[t] B[t]^T  and  y[t] = S[t] C[t] + D * x[t], for each head.
* `state` float [B, H, P, N]: S before the first row, None: zeros. The returned one is S of the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves S as it is.

A chunk of rows is computed at once by attention-like products, with sums of logarithms masked before they are
exponentiated (the names are those of mamba_ssm). The Triton kernel goes row by row, with S in registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, Mixer, OpDef, onnx_linear_attention, onnx_rows, onnx_valid
from aropt.kernels.delay import compiled, padding, refused

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHUNK = 64  # rows at once: products between them grow with the square
ELEMENTS = 2048  # of S in a program


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The definition, chunk by chunk."""
    batch, rows, heads, size = x.shape
    dt = dt if positions is None else dt * (positions >= 0).unsqueeze(2)
    state = x.new_zeros(batch, heads, size, B.shape[3]) if state is None else state
    found = []
    for start in range(0, rows, CHUNK):
        piece = slice(start, start + CHUNK)
        y, state = chunk(x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], state)
        found.append(y)
    y = torch.cat(found, 1)
    y = y if D is None else y + D.unsqueeze(1) * x
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (y, state))  # type: ignore[return-value]


def chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y [B, R, H, P] without D, and the state after the rows."""
    total = (dt * A).cumsum(1).transpose(1, 2)  # [B, H, R]: the logarithm of the decay since the state
    later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=x.device).triu(1)
    given = x.transpose(1, 2) * dt.transpose(1, 2).unsqueeze(3)  # [B, H, R, P]
    y = read(given, total, later, B, C, state)
    b = B.transpose(1, 2).repeat_interleave(x.shape[2] // B.shape[2], 1)
    left = (total[..., -1:] - total).exp().unsqueeze(3)
    state = total[..., -1, None, None].exp() * state + (left * given).transpose(2, 3) @ b
    return y.transpose(1, 2), state


def read(given: Tensor, total: Tensor, hidden: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y [B, H, R, P] from what rows give, the decays since the state, and which rows [.., R, R] a row doesn't see."""
    served = given.shape[1] // B.shape[2]
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(hidden, -torch.inf).exp()
    b, c = B.transpose(1, 2), C.transpose(1, 2)  # [B, G, R, N]
    scores = (c @ b.transpose(2, 3)).repeat_interleave(served, 1) * decay
    before = c.repeat_interleave(served, 1) @ state.transpose(2, 3)
    return scores.masked_fill(hidden, 0.0) @ given + total.exp().unsqueeze(3) * before


def fake(x: Tensor, dt: Any, A: Any, B: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], x.shape[2], x.shape[3], B.shape[3]))


def onnx(x, dt, A, B, C, D, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are one chunk."""
    from onnxscript import opset20 as op

    if positions is not None:
        valid = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
        dt = op.Mul(dt, op.Unsqueeze(valid, op.Constant(value_ints=[2])))
    if state is None:
        y, after = onnx_chunk(x, dt, A, B, C, None)
    else:
        given = (x, dt, A, B, C, state)
        y, after = onnx_rows(x, 1, lambda: onnx_step(*given), lambda: onnx_chunk(*given))
    return y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, op.Constant(value_ints=[1])), x)), after


def contrib(x, dt, A, B, C, D, state, positions):  # type: ignore[no-untyped-def]
    """As ONNX Runtime's LinearAttention: h^T is its state, C its queries, B its keys, dt * x its values."""
    from onnxscript import opset20 as op

    heads, groups, size = int(x.shape[2]), int(B.shape[2]), int(B.shape[3])
    dt = dt if positions is None else op.Mul(dt, onnx_valid(positions))

    def every(value: Any) -> Any:
        """[B, R, G, N] of each head, [B, R, G, H / G, N]."""
        if groups == heads:
            return value
        wide = op.Constant(value_ints=[1, 1, groups, heads // groups, size])
        return op.Expand(op.Unsqueeze(value, op.Constant(value_ints=[3])), wide)

    kept = None if state is None else op.Transpose(state, perm=[0, 1, 3, 2])
    given = op.Mul(x, op.Unsqueeze(dt, op.Constant(value_ints=[3])))
    y, kept = onnx_linear_attention(
        every(C), every(B), given, kept, op.Mul(dt, A), None, "gated", heads, int(x.shape[3])
    )
    y = y if D is None else op.Add(y, op.Mul(op.Unsqueeze(D, op.Constant(value_ints=[1])), x))
    return y, op.Transpose(kept, perm=[0, 1, 3, 2])


def onnx_chunk(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any) -> tuple[Any, Any]:
    """`chunk` in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    heads = int(x.shape[2])
    total = op.Transpose(op.CumSum(op.Mul(dt, A), op.Constant(value_int=1)), perm=[0, 2, 1])
    size = op.Shape(x, start=1, end=2)
    one = op.Expand(op.Constant(value_float=1.0), op.Concat(size, size, axis=0))
    given = op.Transpose(op.Mul(x, op.Unsqueeze(dt, ints(3))), perm=[0, 2, 1, 3])
    y = onnx_read(given, total, op.Cast(op.Trilu(one, upper=0), to=9), B, C, state, heads)
    last = op.Slice(total, ints(-1), ints(2**62), ints(2))
    left = op.Mul(op.Exp(op.Unsqueeze(op.Sub(last, total), ints(3))), given)
    after = op.MatMul(op.Transpose(left, perm=[0, 1, 3, 2]), onnx_heads(B, heads))
    if state is not None:
        after = op.Add(after, op.Mul(op.Exp(op.Unsqueeze(last, ints(3))), state))
    return op.Transpose(y, perm=[0, 2, 1, 3]), after


def onnx_read(given: Any, total: Any, sees: Any, B: Any, C: Any, state: Any, heads: int) -> Any:
    """`read` in standard ONNX ops, with the rows that a row sees."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    b, c = onnx_heads(B, heads), onnx_heads(C, heads)
    apart = op.Sub(op.Unsqueeze(total, ints(3)), op.Unsqueeze(total, ints(2)))
    decay = op.Exp(op.Where(sees, apart, op.Constant(value_float=float("-inf"))))
    scores = op.Mul(op.MatMul(c, op.Transpose(b, perm=[0, 1, 3, 2])), decay)
    y = op.MatMul(op.Where(sees, scores, op.Constant(value_float=0.0)), given)
    if state is None:
        return y
    before = op.MatMul(c, op.Transpose(state, perm=[0, 1, 3, 2]))
    return op.Add(y, op.Mul(op.Exp(op.Unsqueeze(total, ints(3))), before))


def onnx_heads(value: Any, heads: int) -> Any:
    """B or C [B, R, G, N] as [B, H, R, N], or [B, 1, R, N]."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    groups, size = int(value.shape[2]), int(value.shape[3])
    batch, rows = op.Shape(value, start=0, end=1), op.Shape(value, start=1, end=2)
    value = op.Transpose(value, perm=[0, 2, 1, 3])
    if groups in (1, heads):
        return value
    shape = op.Concat(batch, ints(groups, heads // groups), rows, ints(size), axis=0)
    whole = op.Concat(batch, ints(heads), rows, ints(size), axis=0)
    return op.Reshape(op.Expand(op.Unsqueeze(value, ints(2)), shape), whole)


def onnx_step(x: Any, dt: Any, A: Any, B: Any, C: Any, state: Any) -> tuple[Any, Any]:
    """y [B, 1, H, P] without D, and the state, of one row: heads of a group side by side, [B, G, H / G, P, N]."""
    from onnxscript import opset20 as op

    def shaped(value: Any, *sizes: int) -> Any:
        return op.Reshape(value, op.Constant(value_ints=[0, *sizes]))

    heads, size, groups, width = (int(n) for n in (*x.shape[2:], *B.shape[2:]))
    served = heads // groups
    decay = shaped(op.Exp(op.Mul(dt, A)), groups, served, 1, 1)
    given = shaped(op.Mul(x, op.Unsqueeze(dt, op.Constant(value_ints=[3]))), groups, served, size, 1)
    kept = op.Mul(decay, shaped(state, groups, served, size, width))
    kept = op.Add(kept, op.Mul(given, shaped(B, groups, 1, 1, width)))
    y = op.MatMul(kept, shaped(C, groups, 1, width, 1))
    return shaped(y, 1, heads, size), shaped(kept, heads, size, width)


if HAS_TRITON:

    @triton.jit
    def _ssd_kernel(  # type: ignore[no-untyped-def]
        x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, direct_ptr, state_ptr, positions_ptr, out_ptr, left_ptr,
        rows, heads, groups, size, width, DIRECT: tl.constexpr, GIVEN: tl.constexpr, PADDED: tl.constexpr,
        SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `SIZE` values of P, row by row."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        column, n = tl.program_id(1) * SIZE + tl.arange(0, SIZE), tl.arange(0, WIDTH)
        held, wide = column < size, n < width
        inside, group = held[:, None] & wide[None, :], head // (heads // groups)
        kept = ((batch * heads + head) * size + column[:, None]) * width + n[None, :]
        a, s = tl.load(a_ptr + head), tl.zeros([SIZE, WIDTH], tl.float32)
        if GIVEN:
            s = tl.load(state_ptr + kept, mask=inside, other=0.0)
        for t in range(0, rows):
            row = batch * rows + t
            dt, at = tl.load(dt_ptr + row * heads + head), (row * heads + head) * size + column
            x = tl.load(x_ptr + at, mask=held, other=0.0)
            b = tl.load(b_ptr + (row * groups + group) * width + n, mask=wide, other=0.0)
            c = tl.load(c_ptr + (row * groups + group) * width + n, mask=wide, other=0.0)
            if PADDED:
                dt = tl.where(tl.load(positions_ptr + row) >= 0, dt, 0.0)
            s = tl.exp(dt * a) * s + (dt * x)[:, None] * b[None, :]
            y = tl.sum(s * c[None, :], 1)
            if DIRECT:
                y += tl.load(direct_ptr + head) * x
            tl.store(out_ptr + at, y, mask=held)
        tl.store(left_ptr + kept, s, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given) or ("a program holds all of N" if given[3].shape[3] > ELEMENTS // 8 else None)


def tiles(width: int) -> dict[str, int]:
    """Of a program, so that it stays in registers."""
    columns = 1 << (width - 1).bit_length()
    return {"SIZE": min(64, ELEMENTS // columns), "WIDTH": columns}


def launch(*args: Any) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some of the values of each head."""
    x, B, D, state, positions = args[0], args[3], *args[5:]
    (out, left), (batch, rows, heads, size), (groups, width) = fake(x, None, None, B), x.shape, B.shape[2:]
    if out.numel():
        given, held = [out if t is None else t.contiguous() for t in args], tiles(width)
        flags = {"DIRECT": D is not None, "GIVEN": state is not None, "PADDED": positions is not None}
        grid = batch * heads, triton.cdiv(size, held["SIZE"])
        _ssd_kernel[grid](*given, out, left, rows, heads, groups, size, width, **flags, **held)
    return out, left


def aot() -> Sequence[Aot]:
    """States of 16, 128 and 256, from a state, with padding."""
    types, flags = (
        [*["*fp32"] * 7, "*i64", "*fp32", "*fp32", *["i32"] * 5],
        dict.fromkeys(("DIRECT", "GIVEN", "PADDED"), True),
    )
    return [compiled(_ssd_kernel, types, {**flags, **tiles(n)}) for n in (16, 128, 256)]


def cost(x: Tensor, dt: Tensor, A: Any, B: Tensor, C: Tensor, *_: Any) -> Cost:
    """Three operations an element of the state and row for each of update and reading; the state in and out."""
    state = x.shape[0] * x.shape[2] * x.shape[3] * B.shape[3]
    moved = 2 * x.nbytes + dt.nbytes + B.nbytes + C.nbytes + 2 * state * x.element_size()
    return Cost(6.0 * state * x.shape[1], float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Groups, more rows than a chunk, strong decays, from a state or from nothing, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 9, CHUNK + 3]))
        groups, served, size, width = (draw(st.integers(1, n)) for n in (2, 3, 5, 6))
        heads = groups * served
        if like:
            heads, size, groups, width = (like[i].shape[axis] for i, axis in ((0, 2), (0, 3), (3, 2), (3, 3)))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        skip, given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (5, 6, 7))
        shapes = ((batch, rows, heads, size), (batch, rows, heads), (heads,), (batch, rows, groups, width),
                  (batch, rows, groups, width), (heads,), (batch, heads, size, width))  # fmt: skip
        x, dt, decay, b, c, direct, state = (torch.randn(shape, generator=generator) for shape in shapes)
        decay = -(decay * draw(st.sampled_from([1.0, 3.0]))).exp()
        positions = padding(batch, rows, generator) if padded else None
        dt = torch.nn.functional.softplus(dt)
        return x, dt, decay, b, c, direct if skip else None, state if given else None, positions

    return build()


OP = OpDef(
    name="ssd_scan",
    schema="(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? state, Tensor? positions) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    needs="LinearAttention",
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"x": (2, 3), "dt": (2,), "A": (0,), "B": (2, 3), "C": (2, 3), "D": (0,), "state": (1, 2, 3)},
    mixer=Mixer(
        rows={"x": -3, "dt": -2, "B": -3, "C": -3},
        state=("state",),
        positions="positions",
        tree="ssd_tree_scan",
        commit="ssd_commit",
    ),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
