"""`aropt::attention`: softmax attention with a soft-cap and sinks, and how much each row saw.

    attention(query, key, value, mask, sinks, scale, softcap) -> (out, seen)

* `query` float [.., H, R, D], `key` float [.., H, S, D], `value` float [.., H, S, E].
* `mask` float, added to the scores, or bool (True: sees); it broadcasts to [.., H, R, S]. None: each row sees all.
* `softcap` c > 0: scores are c * tanh(scale * q k^T / c) before the mask (Gemma 2, section 2); 0: scale * q k^T.
* `sinks` float [H] or None: a score more in each row's softmax, with no value (Xiao et al. 2024, section 3).
* `out` float [.., H, R, E]; `seen` float [.., H, R], the logarithm of the sum of the softmax, its sink included.

torch's scaled_dot_product_attention is the same without soft-cap, sinks and `seen`, and is what stands in their place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The definition: see the module's text."""
    scores = query @ key.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    seen = torch.logsumexp(scores, -1)
    if sinks is not None:
        seen = torch.logaddexp(seen, sinks.unsqueeze(-1))
    return torch.exp(scores - seen.unsqueeze(-1)) @ value, seen


def fake(query: Tensor, key: Any, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty((*query.shape[:-1], value.shape[-1])), query.new_empty(query.shape[:-1])


def onnx(query, key, value, mask, sinks, scale, softcap):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops (opset 20)."""
    from onnxscript import opset20 as op

    def number(value: float) -> Any:
        return op.Constant(value_float=float(value))

    axes, rank = op.Constant(value_ints=[-1]), len(query.shape)
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, number(scale)), op.Transpose(key, perm=swapped))
    if softcap > 0:
        scores = op.Mul(op.Tanh(op.Div(scores, number(softcap))), number(softcap))
    if mask is not None:
        scores = op.Where(mask, scores, number(float("-inf"))) if mask.dtype == 9 else op.Add(scores, mask)
    top = op.ReduceMax(scores, axes, keepdims=1)
    if sinks is not None:
        sink = op.Unsqueeze(sinks, op.Constant(value_ints=[-1, -2]))
        top = op.Max(top, sink)
    weights = op.Exp(op.Sub(scores, top))
    total = op.ReduceSum(weights, axes, keepdims=1)
    if sinks is not None:
        total = op.Add(total, op.Exp(op.Sub(sink, top)))
    return op.Div(op.MatMul(weights, value), total), op.Squeeze(op.Add(op.Log(total), top), axes)


def cost(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Cost:
    """Two products; everything read and written once."""
    columns, rows = key.shape[-2], query.numel() // query.shape[-1]
    moved = query.nbytes + key.nbytes + value.nbytes + rows * (value.shape[-1] + 1) * query.element_size()
    return Cost(2.0 * rows * columns * (query.shape[-1] + value.shape[-1]), float(moved))


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One row and several, masks of both kinds, soft-caps, sinks; values of another size than keys."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
        heads = like[0].shape[1] if like else draw(st.integers(1, 3))
        sizes = [t.shape[-1] for t in (like[0], like[2])] if like else [draw(st.sampled_from([4, 8])) for _ in "qv"]
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        kinds = {None: "none", torch.bool: "bool", torch.float32: "float"}
        kind = draw(st.sampled_from(list(kinds.values())))
        if like:
            kind = kinds[None if like[3] is None else like[3].dtype]
        sees = random(batch, 1, rows, columns) > 0
        sees[..., 0] = True
        mask = {"none": None, "bool": sees, "float": torch.zeros_like(sees, dtype=torch.float32)}[kind]
        if mask is not None and kind == "float":
            mask = mask.masked_fill(~sees, torch.finfo(torch.float32).min) + random(1, heads, rows, columns)
        sunk = like[4] is not None if like else draw(st.booleans())
        scale, cap = like[5:] if like else (draw(st.sampled_from([0.5, 1.0])), draw(st.sampled_from([0.0, 2.0, 30.0])))
        query, key, value = (
            random(batch, heads, n, d) for n, d in ((rows, sizes[0]), (columns, sizes[0]), (columns, sizes[1]))
        )
        return query, key, value, mask, random(heads) if sunk else None, scale, cap

    return build()


OP = OpDef(
    name="attention",
    schema="(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? sinks, float scale, float softcap) "
    "-> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    mixer=Mixer(rows={"query": -2}, slots={"key": -2, "value": -2}, mask="mask"),
    fixed={"query": (3,), "value": (3,)},
    tolerance={torch.float32: (1e-4, 1e-5)},
)
