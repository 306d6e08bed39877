"""`aropt::gated_delta`: the gated delta rule, which unlearns what a key says before it learns (Yang et al. 2024).

    gated_delta(q, k, v, g, beta, state, positions) -> (o, state)

* `q`, `k` float [B, R, H, K]: normalized and scaled as the model wants them. `v` float [B, R, H, V].
* `g` float [B, R, H] <= 0, the logarithm of the decay; `beta` float [B, R, H], how much is learned.
* S' = exp(g[t]) * S[t - 1];  S[t] = S' + k[t] (beta[t] * (v[t] - S'^T k[t]))^T;  o[t] = S[t]^T q[t], for each head.
* `state` float [B, H, K, V]: S before the first row, None: zeros. The returned one is S of the last row.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves S as it is.

A chunk of rows is one triangular system for what each learns (Yang et al. 2024, section 3; the names are those of fla).
The Triton kernel goes row by row, with some columns of S in registers; it is that of `aropt::kda` too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, Mixer, OpDef, onnx_linear_attention, onnx_rows, onnx_scan, onnx_valid
from aropt.kernels.delay import compiled, padding, refused

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHUNK = 64  # rows at once
LARGEST, WIDTH = 256, 16  # of K and of V in a program


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, chunk by chunk."""
    if positions is not None:
        valid = (positions >= 0).unsqueeze(2)
        g, beta = g * valid, beta * valid
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    found = []
    for start in range(0, q.shape[1], CHUNK):
        piece = [x[:, start : start + CHUNK].transpose(1, 2) for x in (q, k, v, g, beta)]
        o, state = chunk(state, *piece)
        found.append(o)
    o = torch.cat(found, 2).transpose(1, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (o, state))  # type: ignore[return-value]


def chunk(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, R, V] and the state after the rows, from [B, H, R, ..]."""
    total = g.cumsum(2)
    later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=q.device).triu(1)
    o, learned = solved(state, q, k, v, total, beta, later)
    left = (total[..., -1:] - total).exp().unsqueeze(3)
    return o, total[..., -1, None, None].exp() * state + (left * k).transpose(2, 3) @ learned


def solved(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, beta: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """o, and what each row learns [B, H, R, V], from decays since the state and the rows that a row doesn't see."""
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(hidden, -torch.inf).exp()
    known = total.exp().unsqueeze(3) * (k @ state)
    alike, wanted = ((decay * (x @ k.transpose(2, 3))).masked_fill(hidden, 0.0) for x in (k, q))
    system = beta.unsqueeze(3) * alike  # of what is learned, its diagonal taken for ones
    learned = torch.linalg.solve_triangular(system, beta.unsqueeze(3) * (v - known), upper=False, unitriangular=True)
    return wanted @ learned + total.exp().unsqueeze(3) * (q @ state), learned


def fake(q: Tensor, k: Any, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[3], v.shape[3]))


def onnx(q, k, v, g, beta, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are a Scan of it."""
    return stepped(q, k, v, g, beta, state, positions, (3, 4))


def contrib(q, k, v, g, beta, state, positions):  # type: ignore[no-untyped-def]
    """As ONNX Runtime's LinearAttention, whose `gated_delta` is this rule; padding decays by 1 and learns nothing."""
    from onnxscript import opset20 as op

    if positions is not None:
        valid = onnx_valid(positions)
        g, beta = op.Mul(g, valid), op.Mul(beta, valid)
    return onnx_linear_attention(q, k, v, state, g, beta, "gated_delta", int(q.shape[2]), int(v.shape[3]))


def stepped(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any, positions: Any, axes: tuple[int, ...]
) -> tuple[Any, Any]:
    """With `axes` that are added to g to make it [B, R, H, K, 1] or [B, R, H, 1, 1]."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    heads, size, width = *map(int, q.shape[2:]), int(v.shape[3])
    decay = op.Unsqueeze(g, ints(*axes))
    amount = op.Unsqueeze(beta, ints(3, 4))
    if positions is not None:
        valid = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
        valid = op.Unsqueeze(valid, ints(2, 3, 4))
        decay, amount = op.Mul(decay, valid), op.Mul(amount, valid)
    if state is None:
        shape = op.Concat(op.Shape(q, start=0, end=1), ints(heads, size, width), axis=0)
        state = op.Expand(op.Constant(value_float=0.0), shape)

    def step(kept: Any, q: Any, k: Any, v: Any, decay: Any, amount: Any) -> tuple[Any, Any]:
        """[B, H, K, V]; q [B, H, 1, K], k [B, H, K, 1], v [B, H, 1, V], [B, H, .., 1] -> kept, o [B, H, 1, V]."""
        kept = op.Mul(op.Exp(decay), kept)
        learned = op.Mul(amount, op.Sub(v, op.MatMul(op.Transpose(k, perm=[0, 1, 3, 2]), kept)))
        kept = op.Add(kept, op.Mul(k, learned))
        return kept, op.MatMul(q, kept)

    rows = [op.Unsqueeze(q, ints(3)), op.Unsqueeze(k, ints(4)), op.Unsqueeze(v, ints(3)), decay, amount]

    def one() -> tuple[Any, Any]:
        kept, o = step(state, *(op.Squeeze(value, ints(1)) for value in rows))
        return kept, op.Unsqueeze(o, ints(1))

    kept, o = onnx_rows(q, 1, one, lambda: onnx_scan(step, [state], rows, 1, 1))
    return op.Squeeze(o, ints(3)), kept


if HAS_TRITON:

    @triton.jit
    def _delta_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_ptr, v_ptr, g_ptr, beta_ptr, state_ptr, positions_ptr, out_ptr, left_ptr, rows, heads, size, width,
        EACH: tl.constexpr, GIVEN: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        """One program for a head's `WIDTH` values of V, row by row; `EACH`: decays are those of channels of K."""
        batch, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
        n, column = tl.arange(0, SIZE), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        there, held = n < size, column < width
        inside = there[:, None] & held[None, :]
        kept = ((batch * heads + head) * size + n[:, None]) * width + column[None, :]
        s = tl.zeros([SIZE, WIDTH], tl.float32)
        if GIVEN:
            s = tl.load(state_ptr + kept, mask=inside, other=0.0)
        for t in range(0, rows):
            row = (batch * rows + t) * heads + head
            q = tl.load(q_ptr + row * size + n, mask=there, other=0.0)
            k = tl.load(k_ptr + row * size + n, mask=there, other=0.0)
            v = tl.load(v_ptr + row * width + column, mask=held, other=0.0)
            if EACH:
                decay = tl.load(g_ptr + row * size + n, mask=there, other=0.0)
            else:
                decay = tl.load(g_ptr + row + n * 0)
            beta = tl.load(beta_ptr + row)
            if PADDED:
                counts = tl.load(positions_ptr + batch * rows + t) >= 0
                decay, beta = tl.where(counts, decay, 0.0), tl.where(counts, beta, 0.0)
            s = tl.exp(decay)[:, None] * s
            learned = beta * (v - tl.sum(k[:, None] * s, 0))
            s += k[:, None] * learned[None, :]
            tl.store(out_ptr + row * width + column, tl.sum(q[:, None] * s, 0), mask=held)
        tl.store(left_ptr + kept, s, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given) or (f"a program holds up to {LARGEST} of K" if given[0].shape[3] > LARGEST else None)


def launch(*args: Any) -> tuple[Tensor, Tensor]:
    """Runs the Triton kernel: a program for some of the values of each head."""
    q, _, v, g, _, state, positions = args
    (out, left), (batch, rows, heads, size), width = fake(q, None, v), q.shape, v.shape[3]
    if out.numel():
        given = [out if t is None else t.contiguous() for t in args]
        flags = {"EACH": g.dim() == 4, "GIVEN": state is not None, "PADDED": positions is not None}
        tiles = {"SIZE": max(16, 1 << (size - 1).bit_length()), "WIDTH": WIDTH}
        grid = batch * heads, triton.cdiv(width, WIDTH)
        _delta_kernel[grid](*given, out, left, rows, heads, size, width, **flags, **tiles)
    return out, left


def aot(each: bool = False) -> Sequence[Aot]:
    """Keys of each size, from a state, with padding."""
    types = [*["*fp32"] * 6, "*i64", "*fp32", "*fp32", *["i32"] * 4]
    flags = {"EACH": each, "GIVEN": True, "PADDED": True, "WIDTH": WIDTH}
    return [compiled(_delta_kernel, types, {**flags, "SIZE": n}) for n in (16, 128, LARGEST)]


def cost(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Cost:
    """Eight operations an element of the state and row; the state in and out."""
    state = q.shape[0] * q.shape[2] * q.shape[3] * v.shape[3]
    moved = q.nbytes + k.nbytes + 2 * v.nbytes + rest[0].nbytes + rest[1].nbytes + 8 * state
    return Cost(8.0 * state * q.shape[1], float(moved))


def drawn(draw: Any, like: tuple[Any, ...] | None, each_channel: bool) -> tuple[Any, ...]:
    """Arguments with normalized keys, all alike or not: one row, several, more than a chunk; from a state or none."""
    from hypothesis import strategies as st

    batch, rows = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 5, 9, CHUNK + 3]))
    heads, size, width = (*like[0].shape[2:], like[2].shape[3]) if like else (draw(st.integers(1, 4)) for _ in "hkv")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    given, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (5, 6))
    shapes = ((size,), (size,), (width,), (size,) if each_channel else (), ())
    q, k, v, g, beta = (torch.randn(batch, rows, heads, *shape, generator=generator) for shape in shapes)
    state = torch.randn(batch, heads, size, width, generator=generator) if given else None
    k = torch.nn.functional.normalize(k if draw(st.booleans()) else k[:, :1].expand_as(k).clone(), dim=3)
    positions = padding(batch, rows, generator) if padded else None
    return q, k, v, -g.exp() * draw(st.sampled_from([0.0, 0.1, 3.0])), beta.sigmoid(), state, positions


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    from hypothesis import strategies as st

    return st.composite(lambda draw: drawn(draw, like, each_channel=False))()


OP = OpDef(
    name="gated_delta",
    schema="(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, Tensor? positions) "
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
    fixed={"q": (2, 3), "k": (2, 3), "v": (2, 3), "g": (2,), "beta": (2,), "state": (1, 2, 3)},
    mixer=Mixer(
        rows={"q": -3, "k": -3, "v": -3, "g": -2, "beta": -2},
        state=("state",),
        positions="positions",
        tree="gdn_tree_scan",
        commit="gdn_commit",
    ),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
