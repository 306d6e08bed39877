"""`aropt::canvas_attention`: rotary embedding, cache update and attention of chosen rows of a canvas, in one op.

    canvas_attention(query, key, value, k_cache, v_cache, slots, positions, mask, cos, sin, heads, scale, interleaved)
        -> (out, k_cache, v_cache)

* `query`, `key`, `value` float [B, R, heads*D]; or key and value None and all three packed in `query`.
* `k_cache`, `v_cache` float [B, heads, S, D]; `slots` int64 [B, R]: where each row goes. Returned with these rows.
* `positions` int64 [B, R] below C (negative ones count as 0), `cos`, `sin` float [C, r/2] or None: query and key rows
  are rotated by the angles of their position, in the first r features of each head; in halves, or in neighbouring pairs
  if `interleaved`.
* `mask` bool [B, R, S]: which slots a row sees, one at least. `out` float [B, R, heads*D].

In ONNX Runtime: RotaryEmbedding, ScatterND, MultiHeadAttention. Its twin for causal rows is `cached_attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from aropt.ir.opdef import Cost, OpDef
from aropt.kernels import write_rows
from aropt.kernels.cached_attention import rotated, turned

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: see the module's text."""
    return attend(write_rows.reference, *given)


def overwrite(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the rows written into the caches that were given."""
    return attend(write_rows.overwrite, *given)


def attend(
    update: Any, query: Tensor, key: Tensor | None, value: Tensor | None, k_cache: Tensor, v_cache: Tensor,
    slots: Tensor, positions: Tensor, mask: Tensor, cos: Tensor | None, sin: Tensor | None, heads: int, scale: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The computation; `update` writes rows into a cache."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    if key is None or value is None:
        query, key, value = query.chunk(3, -1)
    q, k, v = (x.reshape(batch, rows, heads, size).transpose(1, 2) for x in (query, key, value))
    if cos is not None and sin is not None:
        at = positions.clamp(min=0)
        q, k = (rotated(x, cos[at].unsqueeze(1), sin[at].unsqueeze(1), interleaved) for x in (q, k))
    keys, values = update(k_cache, slots, k, 2), update(v_cache, slots, v, 2)
    out = F.scaled_dot_product_attention(q, keys, values, mask.unsqueeze(1), scale=scale)
    return out.transpose(1, 2).reshape(batch, rows, heads * size), keys, values


def fake(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Tensor, slots: Any, positions: Any, mask: Any,
    cos: Any, sin: Any, heads: int, scale: float, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Contiguous results."""
    out = query.new_empty((query.shape[0], query.shape[1], heads * k_cache.shape[3]))
    return out, torch.empty_like(k_cache), torch.empty_like(v_cache)


def parts(query: Any, key: Any, value: Any, heads: int, size: int) -> tuple[Any, Any, Any]:
    """In ONNX: the three projections apart."""
    from onnxscript import opset20 as op

    from aropt.ir.opdef import onnx_node

    if key is not None:
        return query, key, value
    return tuple(onnx_node("", "Split", [query, op.Constant(value_ints=[heads * size] * 3)], 3, axis=-1))


def stored(cache: Any, slots: Any, new: Any, heads: int) -> Any:
    """In ONNX: the cache with the new rows."""
    write: Any = write_rows.onnx
    return write(cache, slots, new, 2, heads)


def onnx(query, key, value, k_cache, v_cache, slots, positions, mask, cos, sin, heads, scale, interleaved):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20)."""
    from onnxscript import opset20 as op

    size = k_cache.shape[3]
    apart = op.Constant(value_ints=[0, 0, heads, size])
    q, k, v = (op.Transpose(op.Reshape(x, apart), perm=[0, 2, 1, 3]) for x in parts(query, key, value, heads, size))
    if cos is not None:
        at = op.Max(positions, op.Constant(value_int=0))
        turn = [op.Unsqueeze(op.Gather(table, at), op.Constant(value_ints=[1])) for table in (cos, sin)]
        rotate: Any = turned
        q, k = (rotate(op, x, *turn, 2 * cos.shape[1], size, interleaved) for x in (q, k))
    keys, values = (stored(cache, slots, x, heads) for cache, x in ((k_cache, k), (v_cache, v)))
    scores = op.MatMul(op.Mul(q, op.Constant(value_float=float(scale))), op.Transpose(keys, perm=[0, 1, 3, 2]))
    seen = op.Unsqueeze(mask, op.Constant(value_ints=[1]))
    weights = op.Softmax(op.Where(seen, scores, op.Constant(value_float=float("-inf"))), axis=-1)
    out = op.Transpose(op.MatMul(weights, values), perm=[0, 2, 1, 3])
    return op.Reshape(out, op.Constant(value_ints=[0, 0, heads * size])), keys, values


def contrib(query, key, value, k_cache, v_cache, slots, positions, mask, cos, sin, heads, scale, interleaved):  # type: ignore[no-untyped-def]
    """The same with ONNX Runtime's RotaryEmbedding and MultiHeadAttention, which takes keys and values by head."""
    from onnxscript import opset20 as op

    from aropt.ir.opdef import onnx_node

    size = k_cache.shape[3]
    q, k, v = parts(query, key, value, heads, size)
    if cos is not None:
        at, width = op.Max(positions, op.Constant(value_int=0)), 2 * cos.shape[1]
        given: dict[str, int] = {"interleaved": int(interleaved)}
        given |= {"num_heads": heads, "rotary_embedding_dim": width} if width < size else {}
        q, k = (onnx_node("com.microsoft", "RotaryEmbedding", [x, at, cos, sin], 1, **given)[0] for x in (q, k))
    apart = op.Constant(value_ints=[0, 0, heads, size])
    k, v = (op.Transpose(op.Reshape(x, apart), perm=[0, 2, 1, 3]) for x in (k, v))
    keys, values = (stored(cache, slots, x, heads) for cache, x in ((k_cache, k), (v_cache, v)))
    bias = op.Where(mask, op.Constant(value_float=0.0), op.Constant(value_float=float("-inf")))
    bias = op.Unsqueeze(bias, op.Constant(value_ints=[1]))
    inputs = [q, keys, values, None, None, bias]
    out = onnx_node("com.microsoft", "MultiHeadAttention", inputs, 1, num_heads=heads, scale=float(scale))[0]
    return out, keys, values


def unsupported(size: int, rotary: int) -> str | None:
    """Why ONNX Runtime's kernels can't take these, or None."""
    return f"the kernel rotates features in multiples of 16, not {rotary} of {size}" if rotary % 16 else None


def cost(
    query: Tensor, key: Any, value: Any, k_cache: Tensor, v_cache: Tensor, slots: Any, positions: Any, mask: Any,
    cos: Any, sin: Any, heads: int, scale: float, interleaved: bool,
) -> Cost:  # fmt: skip
    """Two products over all slots; the caches are counted as read once, and as returned."""
    batch, rows, size = query.shape[0], query.shape[1], k_cache.shape[3]
    moved = 2 * (k_cache.nbytes + v_cache.nbytes) + query.nbytes + batch * rows * heads * size * query.element_size()
    return Cost(flops=4.0 * batch * rows * heads * size * k_cache.shape[2], bytes=float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Rows in any slots, some of them nobody's; packed or apart; rotated in all, in part or not at all."""
    from collections.abc import Callable

    from hypothesis import strategies as st

    def pick(strategy: Any, held: Callable[[tuple[Any, ...]], Any]) -> Any:
        return strategy if like is None else st.just(held(like))

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, capacity = draw(st.integers(1, 3)), draw(st.sampled_from([2, 5, 17]))
        heads = draw(pick(st.integers(1, 3), lambda a: a[10]))
        size = draw(pick(st.sampled_from([16, 32]), lambda a: a[3].shape[3]))
        rows = draw(st.sampled_from([1, 2, capacity]))
        rotary = draw(pick(st.sampled_from([0, 16, size]), lambda a: 0 if a[8] is None else 2 * a[8].shape[1]))
        packed = draw(pick(st.booleans(), lambda a: a[1] is None))
        scale = draw(pick(st.sampled_from([size**-0.5, 1.0]), lambda a: a[11]))
        interleaved = draw(pick(st.booleans(), lambda a: a[12])) and bool(rotary)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        qkv = [random(batch, rows, (3 if packed else 1) * heads * size) for _ in range(1 if packed else 3)]
        caches = [random(batch, heads, capacity, size) for _ in range(2)]
        slots = torch.stack([torch.randperm(capacity, generator=generator)[:rows] for _ in range(batch)])
        positions = torch.randint(-1, capacity, (batch, rows), generator=generator)
        mask = torch.rand(batch, rows, capacity, generator=generator) < 0.6
        mask = mask | (torch.arange(capacity) == slots[:, :, None])
        angles = random(capacity, rotary // 2) if rotary else None
        table = (None, None) if angles is None else (angles.cos(), angles.sin())
        return (*(qkv if not packed else (qkv[0], None, None)), *caches, slots, positions, mask, *table, heads, scale,
                interleaved)  # fmt: skip

    return build()


OP = OpDef(
    name="canvas_attention",
    schema="(Tensor query, Tensor? key, Tensor? value, Tensor k_cache, Tensor v_cache, Tensor slots, "
    "Tensor positions, Tensor mask, Tensor? cos, Tensor? sin, int heads, float scale, bool interleaved) "
    "-> (Tensor, Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    contrib=contrib,
    fixed={"query": (2,), "key": (2,), "value": (2,), "k_cache": (1, 3), "v_cache": (1, 3), "cos": (1,),
           "sin": (1,)},
    overwrite=overwrite,
    in_place={1: "k_cache", 2: "v_cache"},
    tolerance={torch.float32: (1e-4, 1e-5)},
)  # fmt: skip
