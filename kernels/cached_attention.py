"""`aropt::cached_attention`: rotary embedding, cache update and causal grouped attention of new rows, in one op.

    cached_attention(query, key, value, k_cache, v_cache, last, total, cos, sin,
                     heads, kv_heads, scale, window, interleaved) -> (out, k_cache, v_cache)

* `query` float [B, R, heads*D], `key` and `value` float [B, R, kv_heads*D]; or key and value None and all three packed
  in `query`, float [B, R, (heads + 2*kv_heads)*D].
* `k_cache`, `v_cache` float [B, kv_heads, S, D]; `total` int32 []: how many slots are filled when the R new rows are in
  the last of them; `last` int32 [B] = total - 1 for each sequence. Returned caches hold earlier and new rows; what they
  hold beyond is unspecified (here: as before).
* `cos`, `sin` float [C, r/2] or None: query and key rows are rotated by the angles of their slot, in the first r
  features of each head (Su et al. 2021, section 3.4): in halves, or in neighbouring pairs if `interleaved`.
* A row sees the slots up to its own; only the last `window` of them if `window` > 0.
* `out` float [B, R, heads*D]; head h attends to the keys of head h // (heads / kv_heads) (Ainslie et al. 2023).

In ONNX Runtime this is one GroupQueryAttention, which updates caches in place if they are bound to their own buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aropt.ir.opdef import Cost, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [B, N, R, D] with its first r features rotated; cos, sin [R, r/2], or [B, 1, R, r/2]."""
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def reference(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    last: Tensor,
    total: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: see the module's text."""
    given = (query, key, value, k_cache, v_cache, last, total, cos, sin, heads, kv_heads, scale, window, interleaved)
    return attend(torch.Tensor.index_copy, *given)


def overwrite(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the rows written into the caches that were given."""
    return attend(torch.Tensor.index_copy_, *given)


def attend(
    update: Callable[..., Tensor], query: Tensor, key: Tensor | None, value: Tensor | None, k_cache: Tensor,
    v_cache: Tensor, last: Tensor, total: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, kv_heads: int,
    scale: float, window: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The computation; `update` writes rows into a cache."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    slots = total - rows + torch.arange(rows, device=query.device)
    if key is None or value is None:
        query, key, value = query.split([heads * size, kv_heads * size, kv_heads * size], -1)
    q, k, v = (
        x.reshape(batch, rows, n, size).transpose(1, 2) for x, n in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    if cos is not None and sin is not None:
        q, k = (rotated(x, cos[slots], sin[slots], interleaved) for x in (q, k))
    keys, values = update(k_cache, 2, slots, k), update(v_cache, 2, slots, v)
    stored = torch.arange(k_cache.shape[2], device=query.device)
    seen = stored <= slots[:, None]
    if window > 0:
        seen = seen & (stored > slots[:, None] - window)
    out = F.scaled_dot_product_attention(q, keys, values, seen, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).reshape(batch, rows, heads * size), keys, values


def fake(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Tensor, last: Any, total: Any, cos: Any, sin: Any,
    heads: int, kv_heads: int, scale: float, window: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous results."""
    out = query.new_empty((query.shape[0], query.shape[1], heads * k_cache.shape[3]))
    return out, torch.empty_like(k_cache), torch.empty_like(v_cache)


def onnx(query, key, value, k_cache, v_cache, last, total, cos, sin, heads, kv_heads, scale, window, interleaved):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20)."""
    from onnxscript import opset20 as op

    size, groups = k_cache.shape[3], heads // kv_heads

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    q, k, v = (laid(x, n, size) for x, n in onnx_parts(query, key, value, heads, kv_heads, size))
    rows = op.Squeeze(op.Shape(query, start=1, end=2), ints(0))
    end = op.Cast(total, to=7)
    slots = op.Range(op.Sub(end, rows), end, op.Constant(value_int=1))
    if cos is not None:
        turn = op.Gather(cos, slots), op.Gather(sin, slots)
        q, k = (turned(op, x, *turn, 2 * cos.shape[1], size, interleaved) for x in (q, k))

    def stored(cache: Any, new: Any) -> Any:
        where = op.Expand(op.Reshape(slots, ints(1, 1, -1, 1)), op.Shape(new))
        return op.ScatterElements(cache, where, new, axis=2)

    keys, values = stored(k_cache, k), stored(v_cache, v)
    capacity = op.Squeeze(op.Shape(k_cache, start=2, end=3), ints(0))
    every = op.Range(op.Constant(value_int=0), capacity, op.Constant(value_int=1))
    mine = op.Unsqueeze(slots, ints(1))
    hidden = op.Greater(every, mine)
    if window > 0:
        hidden = op.Or(hidden, op.LessOrEqual(every, op.Sub(mine, op.Constant(value_int=window))))
    # the heads of a group are rows of one product, so that keys and values are read once
    q = op.Reshape(op.Mul(q, op.Constant(value_float=float(scale))), ints(0, kv_heads, -1, size))
    scores = op.MatMul(q, op.Transpose(keys, perm=[0, 1, 3, 2]))
    hidden = op.Tile(hidden, ints(groups, 1)) if groups > 1 else hidden
    weights = op.Softmax(op.Where(hidden, op.Constant(value_float=float("-inf")), scores), axis=-1)
    out = op.Reshape(op.MatMul(weights, values), ints(0, heads, -1, size))
    return op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), ints(0, 0, heads * size)), keys, values


def onnx_parts(query: Any, key: Any, value: Any, heads: int, kv_heads: int, size: int) -> list[tuple[Any, int]]:
    """Query, key and value apart, each with its number of heads."""
    from onnxscript import opset20 as op

    from aropt.ir.opdef import onnx_node

    counts = (heads, kv_heads, kv_heads)
    if key is None:
        widths = op.Constant(value_ints=[n * size for n in counts])
        query, key, value = onnx_node("", "Split", [query, widths], 3, axis=-1)
    return list(zip((query, key, value), counts, strict=True))


def laid(x: Any, heads: int, size: int) -> Any:
    """[B, R, heads*D] as [B, heads, R, D]."""
    from onnxscript import opset20 as op

    return op.Transpose(op.Reshape(x, op.Constant(value_ints=[0, 0, heads, size])), perm=[0, 2, 1, 3])


def turned(op: Any, x: Any, cos: Any, sin: Any, rotary: int, size: int, interleaved: bool) -> Any:
    """`rotated` in ONNX ops."""

    def piece(start: int, end: int, step: int = 1) -> Any:
        return op.Slice(x, *(op.Constant(value_ints=[n]) for n in (start, end, -1, step)))

    a, b = (
        (piece(0, rotary, 2), piece(1, rotary, 2))
        if interleaved
        else (piece(0, rotary // 2), piece(rotary // 2, rotary))
    )
    first, second = op.Sub(op.Mul(a, cos), op.Mul(b, sin)), op.Add(op.Mul(b, cos), op.Mul(a, sin))
    if interleaved:
        pairs = op.Concat(*(op.Unsqueeze(y, op.Constant(value_ints=[-1])) for y in (first, second)), axis=-1)
        parts = [op.Reshape(pairs, op.Constant(value_ints=[0, 0, 0, rotary]))]
    else:
        parts = [first, second]
    if rotary < size:
        parts.append(piece(rotary, size))
    return op.Concat(*parts, axis=-1) if len(parts) > 1 else parts[0]


def contrib(query, key, value, k_cache, v_cache, last, total, cos, sin, heads, kv_heads, scale, window, interleaved):  # type: ignore[no-untyped-def]
    """The same as ONNX Runtime's GroupQueryAttention."""
    from aropt.ir.opdef import onnx_node

    return onnx_node(
        "com.microsoft", "GroupQueryAttention", [query, key, value, k_cache, v_cache, last, total, cos, sin], 3,
        num_heads=heads, kv_num_heads=kv_heads, scale=float(scale), do_rotary=int(cos is not None),
        rotary_interleaved=int(interleaved), local_window_size=window if window > 0 else -1,
    )  # fmt: skip


def unsupported(heads: int, kv_heads: int, size: int, rotary: int) -> str | None:
    """Why ONNX Runtime's kernel can't take these, or None."""
    if heads % kv_heads:
        return f"{heads} heads do not divide into {kv_heads} groups"
    if size % 8:
        return f"the kernel takes head sizes that are multiples of 8, not {size}"
    if rotary and (size % 16 or rotary % 16):
        return f"the kernel rotates heads of multiples of 16, not {rotary} of {size}"
    return None


def cost(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Tensor, last: Any, total: Any, cos: Any, sin: Any,
    heads: int, kv_heads: int, scale: float, window: int, interleaved: bool,
) -> Cost:  # fmt: skip
    """Two products over the filled slots; the caches are counted as read once, and as returned."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    slots = int(total)
    moved = 2 * (k_cache.nbytes + v_cache.nbytes) + query.nbytes + batch * rows * heads * size * query.element_size()
    return Cost(flops=4.0 * batch * rows * heads * size * slots, bytes=float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Prefill (nothing filled) and decode (one row), packed or apart, rotated in all, in part or not at all."""
    from hypothesis import strategies as st

    def pick(strategy: Any, held: Callable[[tuple[Any, ...]], Any]) -> Any:
        return strategy if like is None else st.just(held(like))

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, capacity = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 17, 64]))
        kv_heads = draw(pick(st.integers(1, 3), lambda a: a[10]))
        groups = draw(pick(st.sampled_from([1, 2, 3]), lambda a: a[9] // a[10]))
        size = draw(pick(st.sampled_from([16, 32, 48]), lambda a: a[3].shape[3]))
        rows = draw(st.sampled_from([1, 2, capacity]))
        filled = draw(st.integers(0, capacity - 1)) if rows == 1 else 0
        window = draw(pick(st.sampled_from([0, 0, 1, 3, 100]), lambda a: a[12]))
        rotary = draw(pick(st.sampled_from([0, 16, size]), lambda a: 0 if a[7] is None else 2 * a[7].shape[1]))
        packed = draw(pick(st.booleans(), lambda a: a[1] is None))
        scale = draw(pick(st.sampled_from([size**-0.5, 1.0]), lambda a: a[11]))
        interleaved = draw(pick(st.booleans(), lambda a: a[13])) and bool(rotary)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        heads = kv_heads * groups

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        widths = (heads + 2 * kv_heads,) if packed else (heads, kv_heads, kv_heads)
        qkv = [random(batch, rows, n * size) for n in widths]
        empty = torch.arange(capacity)[:, None] >= filled  # kept zero: what is beyond the rows is unspecified
        caches = [random(batch, kv_heads, capacity, size).masked_fill(empty, 0.0) for _ in range(2)]
        angles = random(capacity, rotary // 2) if rotary else None
        table = (None, None) if angles is None else (angles.cos(), angles.sin())
        total = torch.tensor(filled + rows, dtype=torch.int32)
        ends = (total - 1).expand(batch).clone(), total
        return (*(qkv if not packed else (qkv[0], None, None)), *caches, *ends, *table, heads, kv_heads,
                scale, window, interleaved)  # fmt: skip

    return build()


OP = OpDef(
    name="cached_attention",
    schema="(Tensor query, Tensor? key, Tensor? value, Tensor k_cache, Tensor v_cache, Tensor last, Tensor total, "
    "Tensor? cos, Tensor? sin, int heads, int kv_heads, float scale, int window, bool interleaved) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    fixed={"query": (2,), "key": (2,), "value": (2,), "k_cache": (1, 3), "v_cache": (1, 3), "cos": (1,), "sin": (1,)},
    overwrite=overwrite,
    in_place={1: "k_cache", 2: "v_cache"},
    tolerance={torch.float32: (1e-4, 1e-5)},
)
