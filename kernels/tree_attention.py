"""`aropt::tree_attention`: rotary embedding and attention of a tree's nodes over a cache and each other, in one op.

    tree_attention(query, key, value, k_cache, v_cache, mask, positions, cos, sin, heads, kv_heads, scale, interleaved)
        -> (out, k_rows, v_rows)

* `query` float [B, R, heads*D], `key` and `value` float [B, R, kv_heads*D]; or key and value None and all three packed
  in `query`, as in `aropt::cached_attention`, whose twin this is for rows that aren't written.
* `k_cache`, `v_cache` float [B, kv_heads, S, D]: what is stored.
* `mask` bool [B, R, S + R]: which slots a node sees, and then which nodes (a tree's pairs); one at least.
* `positions` int64 [B, R] below C (negative ones count as 0), `cos`, `sin` float [C, r/2] or None: query and key rows
  are rotated by the angles of their position, in the first r features of each head; in halves, or in neighbouring pairs
  if `interleaved`.
* `out` float [B, R, heads*D]; `k_rows`, `v_rows` float [B, kv_heads, R, D], as a cache would hold them.

In ONNX what lies behind the last slot that a node sees is not read. In ONNX Runtime the nodes of one sequence attend in
one GroupQueryAttention, which takes what they see as a bias of the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aropt.ir.opdef import Aot, Cost, OpDef
from aropt.kernels.cached_attention import laid, onnx_parts, rotated, turned
from aropt.kernels.tree_delay import tile

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LARGEST = 128  # features of a head that a kernel holds
TILE = 16  # rows of a program


def reference(
    query: Tensor, key: Tensor | None, value: Tensor | None, k_cache: Tensor, v_cache: Tensor, mask: Tensor,
    positions: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, kv_heads: int, scale: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition: see the module's text."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    if key is None or value is None:
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    parts = ((query, heads), (key, kv_heads), (value, kv_heads))
    q, k, v = (x.reshape(batch, rows, n, size).transpose(1, 2) for x, n in parts)
    if cos is not None and sin is not None:
        at = positions.clamp(min=0)
        q, k = (rotated(x, cos[at].unsqueeze(1), sin[at].unsqueeze(1), interleaved) for x in (q, k))
    keys, values = torch.cat([k_cache, k], 2), torch.cat([v_cache, v], 2)
    out = F.scaled_dot_product_attention(q, keys, values, mask.unsqueeze(1), scale=scale, enable_gqa=True)
    k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
    return out.transpose(1, 2).reshape(batch, rows, heads * size), k, v


def fake(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Any, mask: Any, positions: Any, cos: Any, sin: Any,
    heads: int, kv_heads: int, scale: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous results."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    k, v = (query.new_empty((batch, kv_heads, rows, size)) for _ in "kv")
    return query.new_empty((batch, rows, heads * size)), k, v


def onnx(query, key, value, k_cache, v_cache, mask, positions, cos, sin, heads, kv_heads, scale, interleaved):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20)."""
    from onnxscript import opset20 as op

    size = k_cache.shape[3]
    q, k, v = (laid(x, n, size) for x, n in onnx_parts(query, key, value, heads, kv_heads, size))
    if cos is not None:
        at = op.Max(positions, op.Constant(value_int=0))
        turn = [op.Unsqueeze(op.Gather(table, at), op.Constant(value_ints=[1])) for table in (cos, sin)]
        rotate: Any = turned
        q, k = (rotate(op, x, *turn, 2 * cos.shape[1], size, interleaved) for x in (q, k))
    return onnx_attended(q, k, v, k_cache, v_cache, *onnx_seen(mask), heads, kv_heads, scale), k, v


def onnx_seen(mask: Any) -> tuple[Any, Any]:
    """How many slots F int64 [1] there are up to the last one that is seen; what is added to scores, [B, 1, R, F + R].

    They follow from the mask alone, so that they are computed once where layers share it.
    """
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    slots = op.Sub(op.Shape(mask, start=2, end=3), op.Shape(mask, start=1, end=2))
    stored = op.Slice(mask, ints(0), slots, ints(2))
    used = op.ReduceMax(op.Cast(stored, to=6), ints(0, 1), keepdims=0)
    one = op.Constant(value_int=1)
    count = op.Range(one, op.Add(op.Squeeze(slots), one), one)
    count = op.Concat(op.Where(op.Cast(used, to=9), count, op.Constant(value_int=0)), ints(0), axis=0)
    filled = op.ReduceMax(count, ints(0), keepdims=1)
    sees = op.Concat(op.Slice(mask, ints(0), filled, ints(2)), op.Slice(mask, slots, ints(2**62), ints(2)), axis=2)
    bias = op.Where(sees, op.Constant(value_float=0.0), op.Constant(value_float=float("-inf")))
    return filled, op.Unsqueeze(bias, ints(1))


def onnx_attended(
    q: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, filled: Any, bias: Any, heads: int, kv_heads: int, scale: float
) -> Any:
    """`out` from q [B, heads, R, D], k and v [B, kv_heads, R, D] and what `onnx_seen` gives, in standard ONNX ops."""
    from onnxscript import opset20 as op

    size = k_cache.shape[3]

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    pairs = ((k_cache, k), (v_cache, v))
    keys, values = (op.Concat(op.Slice(cache, ints(0), filled, ints(2)), new, axis=2) for cache, new in pairs)
    # the heads of a group are rows of one product, so that keys and values are read once
    q = op.Reshape(op.Mul(q, op.Constant(value_float=float(scale))), ints(0, kv_heads, -1, size))
    scores = op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2]))
    rows, columns = op.Shape(bias, start=2, end=3), op.Shape(bias, start=3, end=4)
    scores = op.Add(op.Reshape(scores, op.Concat(ints(0, heads), rows, columns, axis=0)), bias)
    weights = op.Reshape(op.Softmax(scores, axis=-1), op.Concat(ints(0, kv_heads, -1), columns, axis=0))
    out = op.Transpose(op.Reshape(op.MatMul(weights, values), ints(0, heads, -1, size)), perm=[0, 2, 1, 3])
    return op.Reshape(out, ints(0, 0, heads * size))


def contrib(query, key, value, k_cache, v_cache, mask, positions, cos, sin, heads, kv_heads, scale, interleaved):  # type: ignore[no-untyped-def]
    """The same with ONNX Runtime's RotaryEmbedding and, for one sequence, GroupQueryAttention.

    The latter rotates too, but refuses positions that are nearer to the end of the tables than there are rows.
    """
    from onnxscript import opset20 as op

    from aropt.ir.opdef import onnx_node, onnx_rows

    size, (filled, bias) = k_cache.shape[3], onnx_seen(mask)
    (q, _), (k, _), (v, _) = onnx_parts(query, key, value, heads, kv_heads, size)
    if cos is not None:
        at, width = op.Max(positions, op.Constant(value_int=0)), 2 * cos.shape[1]
        part = {"rotary_embedding_dim": width} if width < size else {}

        def rotate(x: Any, count: int) -> Any:
            given = {"interleaved": int(interleaved), "num_heads": count, **part}
            return onnx_node("com.microsoft", "RotaryEmbedding", [x, at, cos, sin], 1, **given)[0]

        q, k = rotate(q, heads), rotate(k, kv_heads)
    k_rows, v_rows = (laid(x, kv_heads, size) for x in (k, v))
    end = op.Cast(op.Add(filled, op.Shape(query, start=1, end=2)), to=6)
    last, total = op.Sub(end, op.Cast(op.Constant(value_ints=[1]), to=6)), op.Squeeze(end)

    def one() -> tuple[Any, ...]:
        first, axis = op.Constant(value_ints=[0]), op.Constant(value_ints=[2])
        stored = [op.Slice(x, first, filled, axis) for x in (k_cache, v_cache)]
        inputs = [q, k, v, *stored, last, total, None, None, None, bias]
        numbers = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scale), "causal": 0}
        return (onnx_node("com.microsoft", "GroupQueryAttention", inputs, 3, **numbers)[0],)

    def several() -> tuple[Any, ...]:
        apart = laid(q, heads, size), k_rows, v_rows
        return (onnx_attended(*apart, k_cache, v_cache, filled, bias, heads, kv_heads, scale),)

    (out,) = onnx_rows(query, 0, one, several)
    return out, k_rows, v_rows


if HAS_TRITON:

    @triton.jit
    def turned_row(  # type: ignore[no-untyped-def]
        x_ptr, at, column, turn, cos_ptr, sin_ptr, half, inside, TURNED: tl.constexpr, INTERLEAVED: tl.constexpr
    ):
        """Features `column` of heads at `at`, rotated by the rows `turn` of the tables, which have `half` columns."""
        x = tl.load(x_ptr + at + column, mask=inside, other=0.0)
        if TURNED:
            if INTERLEAVED:
                first, angle, other = column % 2 == 0, column // 2, column + 1 - 2 * (column % 2)
            else:
                first, angle = column < half, column % half
                other = tl.where(first, column + half, column - half)
            there = inside & (column < 2 * half)
            y = tl.load(x_ptr + at + other, mask=there, other=0.0)
            cos = tl.load(cos_ptr + turn * half + angle, mask=there, other=1.0)
            sin = tl.load(sin_ptr + turn * half + angle, mask=there, other=0.0)
            x = x * cos + tl.where(first, -y, y) * sin
        return x

    @triton.jit
    def _tree_rows_kernel(  # type: ignore[no-untyped-def]
        k_ptr, v_ptr, positions_ptr, cos_ptr, sin_ptr, k_rows_ptr, v_rows_ptr, rows, kv_heads, size, half, stride,
        TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """One program for some rows of a head's keys and values: as a cache would hold them."""
        batch, head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
        row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)[None, :]
        there = row < rows
        inside = there[:, None] & (column < size)
        turn = tl.maximum(tl.load(positions_ptr + batch * rows + row, mask=there, other=0), 0)[:, None]
        at = (batch * rows + row[:, None]) * stride + head * size
        to = ((batch * kv_heads + head) * rows + row[:, None]) * size + column
        k = turned_row(k_ptr, at, column, turn, cos_ptr, sin_ptr, half, inside, TURNED, INTERLEAVED)
        tl.store(k_rows_ptr + to, k, mask=inside)
        tl.store(v_rows_ptr + to, tl.load(v_ptr + at + column, mask=inside, other=0.0), mask=inside)

    @triton.jit
    def attended(  # type: ignore[no-untyped-def]
        q, out, top, total, k_ptr, v_ptr, mask_ptr, rows, there, count, size, ROWS: tl.constexpr, SIZE: tl.constexpr
    ):
        """A softmax's sums after `ROWS` columns more; those that no row sees are not read."""
        slot, column = tl.arange(0, ROWS), tl.arange(0, SIZE)
        sees = (
            tl.load(mask_ptr + rows[:, None] + slot[None, :], mask=there[:, None] & (slot < count)[None, :], other=0)
            != 0
        )
        if tl.max(tl.max(sees.to(tl.int32), 1), 0) > 0:
            at, inside = slot[:, None] * size + column[None, :], (slot < count)[:, None] & (column < size)[None, :]
            k = tl.load(k_ptr + at, mask=inside, other=0.0)
            scores = tl.where(sees, tl.dot(q, tl.trans(k), input_precision="tf32x3"), -3e38)
            highest = tl.maximum(top, tl.max(scores, 1))
            weights = tl.where(sees, tl.exp(scores - highest[:, None]), 0.0)
            left = tl.exp(top - highest)
            v = tl.load(v_ptr + at, mask=inside, other=0.0)
            out = out * left[:, None] + tl.dot(weights, v, input_precision="tf32x3")
            total, top = total * left + tl.sum(weights, 1), highest
        return out, top, total

    @triton.jit
    def _tree_attention_kernel(  # type: ignore[no-untyped-def]
        q_ptr, k_cache_ptr, v_cache_ptr, k_rows_ptr, v_rows_ptr, mask_ptr, positions_ptr, cos_ptr, sin_ptr, out_ptr,
        rows, slots, heads, kv_heads, size, half, stride, scale,
        TURNED: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """One program for some rows of a group of heads; products in three parts of tf32, as exact as fp32."""
        batch, group = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
        served, column = heads // kv_heads, tl.arange(0, SIZE)[None, :]
        one = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        there, row, head = one < served * rows, one % rows, group * served + one // rows
        inside = there[:, None] & (column < size)
        turn = tl.maximum(tl.load(positions_ptr + batch * rows + row, mask=there, other=0), 0)[:, None]
        at = (batch * rows + row[:, None]) * stride + head[:, None] * size
        q = turned_row(q_ptr, at, column, turn, cos_ptr, sin_ptr, half, inside, TURNED, INTERLEAVED) * scale
        out, total = tl.zeros([ROWS, SIZE], tl.float32), tl.zeros([ROWS], tl.float32)
        top = tl.full([ROWS], -3e38, tl.float32)
        mask_ptr += batch * rows * (slots + rows)
        seen, kept = row * (slots + rows), (batch * kv_heads + group) * size
        for start in range(0, slots, ROWS):
            first = kept * slots + start * size
            out, top, total = attended(
                q, out, top, total, k_cache_ptr + first, v_cache_ptr + first, mask_ptr + start, seen, there,
                slots - start, size, ROWS, SIZE,
            )  # fmt: skip
        for start in range(0, rows, ROWS):
            first = kept * rows + start * size
            out, top, total = attended(
                q, out, top, total, k_rows_ptr + first, v_rows_ptr + first, mask_ptr + slots + start, seen, there,
                rows - start, size, ROWS, SIZE,
            )  # fmt: skip
        to = (batch * rows + row[:, None]) * (heads * size) + head[:, None] * size + column
        tl.store(out_ptr + to, out / tl.where(there, total, 1.0)[:, None], mask=inside)


def supports(query: Tensor, key: Any, value: Any, k_cache: Tensor, *rest: Any) -> str | None:
    """Why the kernels can't run, or None."""
    if not HAS_TRITON:
        return "triton isn't installed"
    if k_cache.shape[3] > LARGEST:
        return f"a kernel holds {LARGEST} features of a head"
    floats = {t.dtype for t in (query, key, value, k_cache, *rest) if isinstance(t, Tensor) and t.is_floating_point()}
    return None if floats == {torch.float32} else "the kernels compute in float32"


def launch(
    query: Tensor, key: Tensor | None, value: Tensor | None, k_cache: Tensor, v_cache: Tensor, mask: Tensor,
    positions: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, kv_heads: int, scale: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Runs the Triton kernels: the rows as a cache would hold them, then their attention."""
    made = fake(query, key, value, k_cache, v_cache, mask, positions, cos, sin, heads, kv_heads, scale, interleaved)
    out, k_rows, v_rows = made
    if not out.numel():
        return made
    (batch, rows), (slots, size) = query.shape[:2], k_cache.shape[2:]
    query, k_cache, v_cache, mask, positions = (t.contiguous() for t in (query, k_cache, v_cache, mask, positions))
    widths, packed = [heads * size, kv_heads * size, kv_heads * size], key is None or value is None
    q, k, v = query.split(widths, -1) if packed else (query, key.contiguous(), value.contiguous())  # type: ignore[union-attr]
    tables = [out if t is None else t.contiguous() for t in (cos, sin)]
    half = 0 if cos is None else cos.shape[1]
    flags = {"TURNED": cos is not None, "INTERLEAVED": interleaved, "SIZE": tile(size, LARGEST), "ROWS": TILE}
    grid = batch * kv_heads, triton.cdiv(rows, TILE)
    laid_out = rows, kv_heads, size, half, query.shape[2] if packed else widths[1]
    _tree_rows_kernel[grid](k, v, positions, *tables, k_rows, v_rows, *laid_out, **flags)
    given = (q, k_cache, v_cache, k_rows, v_rows, mask, positions, *tables, out)
    grid = batch * kv_heads, triton.cdiv(rows * heads // kv_heads, TILE)
    sizes = rows, slots, heads, kv_heads, size, half, query.shape[2]
    _tree_attention_kernel[grid](*given, *sizes, float(scale), **flags, num_warps=warps(flags["SIZE"]))
    return made


def aot() -> Sequence[Aot]:
    """Heads of each size; products on tensor cores."""
    flags = {"TURNED": True, "INTERLEAVED": False, "ROWS": TILE}
    rows = [*["*fp32"] * 2, "*i64", *["*fp32"] * 4, *["i32"] * 5, *["constexpr"] * 4]
    types = [*["*fp32"] * 5, "*i1", "*i64", *["*fp32"] * 3, *["i32"] * 7, "fp32", *["constexpr"] * 4]
    laid, kernel = _tree_rows_kernel, _tree_attention_kernel
    signatures = [dict(zip(k.arg_names, t, strict=True)) for k, t in ((laid, rows), (kernel, types))]
    sized, expects = [{**flags, "SIZE": n} for n in (16, 64, LARGEST)], {80: ("mma.sync",)}
    found = [Aot(kernel, signatures[1], one, warps(one["SIZE"]), expects) for one in sized]
    return [Aot(laid, signatures[0], sized[-1]), *found]


def warps(size: int) -> int:
    """Of a program, so that heads of so many features stay in registers."""
    return 4 if size < LARGEST else 8


def cost(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Tensor, mask: Tensor, positions: Any, cos: Any,
    sin: Any, heads: int, kv_heads: int, scale: float, interleaved: bool,
) -> Cost:  # fmt: skip
    """Two products over what is seen; the caches are counted as read once, rows as read and returned."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    out = batch * rows * heads * size
    moved = k_cache.nbytes + v_cache.nbytes + mask.nbytes + (2 * out + 4 * batch * rows * kv_heads * size) * 4
    return Cost(4.0 * int(mask.sum()) * heads * size, float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Empty caches and full ones, nodes that see all or few, packed or apart, rotated in all, in part or not at all."""
    from hypothesis import strategies as st

    def pick(strategy: Any, held: Callable[[tuple[Any, ...]], Any]) -> Any:
        return strategy if like is None else st.just(held(like))

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, slots, rows = (
            draw(st.integers(1, 3)),
            draw(st.sampled_from([1, 5, 40])),
            draw(st.sampled_from([1, 5, 17])),
        )
        kv_heads = draw(pick(st.integers(1, 3), lambda a: a[10]))
        groups = draw(pick(st.sampled_from([1, 2, 3]), lambda a: a[9] // a[10]))
        size = draw(pick(st.sampled_from([16, 32, 48]), lambda a: a[3].shape[3]))
        rotary = draw(pick(st.sampled_from([0, 16, size]), lambda a: 0 if a[7] is None else 2 * a[7].shape[1]))
        packed = draw(pick(st.booleans(), lambda a: a[1] is None))
        scale = draw(pick(st.sampled_from([size**-0.5, 1.0]), lambda a: a[11]))
        interleaved = draw(pick(st.booleans(), lambda a: a[12])) and bool(rotary)
        filled = draw(st.integers(0, slots))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        heads = kv_heads * groups

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        widths = (heads + 2 * kv_heads,) if packed else (heads, kv_heads, kv_heads)
        qkv = [random(batch, rows, n * size) for n in widths]
        mask = random(batch, rows, slots + rows) > draw(st.sampled_from([-9.0, 0.0, 9.0]))
        mask[:, :, filled:slots] = False
        mask[:, :, slots:] |= torch.eye(rows, dtype=torch.bool)
        angles = random(filled + rows, rotary // 2) if rotary else None
        table = (None, None) if angles is None else (angles.cos(), angles.sin())
        positions = torch.randint(-1, filled + rows, (batch, rows), generator=generator)
        caches = [random(batch, kv_heads, slots, size) for _ in "kv"]
        return (*(qkv if not packed else (qkv[0], None, None)), *caches, mask, positions, *table, heads, kv_heads,
                scale, interleaved)  # fmt: skip

    return build()


OP = OpDef(
    name="tree_attention",
    schema="(Tensor query, Tensor? key, Tensor? value, Tensor k_cache, Tensor v_cache, Tensor mask, Tensor positions, "
    "Tensor? cos, Tensor? sin, int heads, int kv_heads, float scale, bool interleaved) -> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"query": (2,), "key": (2,), "value": (2,), "k_cache": (1, 3), "v_cache": (1, 3), "cos": (1,), "sin": (1,)},
    tolerance={torch.float32: (1e-4, 1e-5)},
)
