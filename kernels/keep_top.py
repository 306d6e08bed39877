"""`aropt::keep_top`: the largest logits of each row, k of them or up to a probability of p; -inf for the others.

    keep_top(Tensor logits, Tensor? k, Tensor? p) -> Tensor

* `logits` float32 [N, V], V >= 1; `k` int64 [], `p` float32 []: one of them, the other is None.
* with `k` the k largest and what ties with the last of them; k <= 0 keeps all, and so does k >= V.
* with `p` the smallest set of the largest whose probability reaches p, at least one (Holtzman et al. 2020, 3.1),
  of equal ones those with the lowest ids; p >= 1 keeps all.
* result float32 [N, V].

The definition sorts. Its translation sorts as much as it needs: nothing where all are kept, k of them for a small k.
The GPU's kernel of these rules is that of `aropt::fused_sample`, which sorts nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

F32, I64 = torch.float32, torch.int64


def _check(logits: Tensor, k: Tensor | None, p: Tensor | None) -> None:
    torch._check(logits.dim() == 2, lambda: "logits must be [N, V]")
    torch._check_type(logits.dtype == F32, lambda: "logits must be float32")
    torch._check((k is None) != (p is None), lambda: "one of k and p is given, the other is None")
    for name, value, dtype in (("k", k, I64), ("p", p, F32)):
        if value is not None:
            torch._check(value.dim() == 0, lambda n=name: f"{n} must be one number")
            torch._check_type(value.dtype == dtype, lambda n=name, d=dtype: f"{n} must be {d}")


def reference(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """The definition: see the module's text. Raises RuntimeError on other shapes, TypeError on other dtypes."""
    _check(logits, k, p)
    size = logits.shape[-1]
    ordered, order = torch.sort(logits, dim=-1, descending=True, stable=True)
    if k is not None:
        last = (k.clamp(1, size) - 1).reshape(1, 1).expand(logits.shape[0], 1)
        return torch.where((logits >= ordered.gather(-1, last)) | (k <= 0), logits, -torch.inf)
    assert p is not None
    probabilities = torch.softmax(ordered, dim=-1)
    before = torch.cumsum(probabilities, dim=-1) - probabilities
    final = (before < p).to(I64).sum(-1, keepdim=True).clamp(min=1) - 1
    last, ids = ordered.gather(-1, final), torch.arange(size, device=logits.device)
    kept = (logits > last) | ((logits == last) & (ids <= order.gather(-1, final)))
    return torch.where(kept | (p >= 1), logits, -torch.inf)


def fake(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Tensor:
    """float32 [N, V]."""
    _check(logits, k, p)
    return torch.empty_like(logits)


def onnx(logits, k=None, p=None):  # type: ignore[no-untyped-def]
    """TopK of as many as are needed: of one where all are kept."""
    from onnxscript import opset20 as op

    one, low = op.Constant(value_ints=[1]), op.Constant(value_float=float("-inf"))
    size = op.Shape(logits, start=1, end=2)
    if k is not None:
        off = op.LessOrEqual(k, op.Constant(value_int=0))
        # no Max around the Min: onnxscript makes both a Clip, whose bounds get lost where k is read twice
        ordered, _ = op.TopK(logits, op.Where(off, one, op.Min(k, size)), axis=1, largest=1, sorted=1)
        kept = op.GreaterOrEqual(logits, op.ReduceMin(ordered, one, keepdims=1))
    else:
        off = op.GreaterOrEqual(p, op.Constant(value_float=1.0))
        ordered, order = op.TopK(logits, op.Where(off, one, size), axis=1, largest=1, sorted=1)
        probabilities = op.Softmax(ordered, axis=1)
        before = op.Sub(op.CumSum(probabilities, op.Constant(value_int=1)), probabilities)
        count = op.Max(op.ReduceSum(op.Cast(op.Less(before, p), to=7), one, keepdims=1), one)
        last = op.GatherElements(ordered, op.Sub(count, one), axis=1)
        place = op.GatherElements(order, op.Sub(count, one), axis=1)
        early = op.LessOrEqual(op.Range(0, op.Squeeze(size), 1), place)
        kept = op.Or(op.Greater(logits, last), op.And(op.Equal(logits, last), early))
    return op.Where(op.Or(kept, off), logits, low)


def cost(logits: Tensor, k: Tensor | None, p: Tensor | None) -> Cost:
    """Each logit is read and written once."""
    return Cost(flops=float(logits.numel()), bytes=8.0 * logits.numel())


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Logits with ties, -inf and rows of one; k and p that keep one, some and all. `like`: which of both is given."""
    from hypothesis import strategies as st

    def build(rows: int, size: int, seed: int, ties: bool, k: int, p: float, by_k: bool) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(rows, size, generator=generator) * 3
        if ties:
            logits = logits.round()
        logits[:, 1:][torch.rand(rows, size - 1, generator=generator) < 0.1] = -torch.inf
        return (logits, torch.tensor(k), None) if by_k else (logits, None, torch.tensor(p))

    which = st.booleans() if like is None else st.just(like[1] is not None)
    return st.builds(
        build, st.integers(1, 5), st.integers(1, 40), st.integers(0, 99), st.booleans(),
        st.sampled_from([-1, 0, 1, 2, 7, 40, 10**9]), st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.5]), which,
    )  # fmt: skip


OP = OpDef(
    name="keep_top",
    schema="(Tensor logits, Tensor? k, Tensor? p) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
)
