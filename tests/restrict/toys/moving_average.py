"""`aropt::moving_average`: a causal moving average along the sequence, a toy mixer in one kernel file.

    moving_average(x, decay, state, positions) -> (y, state)

* `x` float [B, R, D], `decay` float [D] between 0 and 1: y[t] = decay * y[t - 1] + (1 - decay) * x[t].
* `state` float [B, D]: y of the row before, or None (zeros). `positions` int64 [B, R] or None: rows at -1 are padding,
  whose y is that of the row before. The returned state is y of the last row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, Mixer, OpDef

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(x: Tensor, decay: Tensor, state: Tensor | None, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, for all rows at once: each row's weight in each later one."""
    valid = torch.ones_like(x[..., 0]) if positions is None else (positions >= 0).to(x.dtype)
    steps = valid.cumsum(1)
    apart = (steps.unsqueeze(2) - steps.unsqueeze(1)).clamp(min=0.0).unsqueeze(3)  # [B, R, R, 1]
    seen = torch.ones_like(apart).squeeze(3).tril() * valid.unsqueeze(1)
    y = ((decay**apart) * seen.unsqueeze(3) * ((1 - decay) * x).unsqueeze(1)).sum(2)
    if state is not None:
        y = y + decay ** steps.unsqueeze(2) * state.unsqueeze(1)
    return y, y[:, -1].clone()


def fake(x: Tensor, decay: Any, state: Any, positions: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.shape[0], x.shape[2]))


def onnx(x, decay, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    one, zero = op.Constant(value_float=1.0), op.Constant(value_float=0.0)
    rows = op.Shape(x, start=0, end=2)
    if positions is None:
        valid = op.Expand(one, rows)
    else:
        valid = op.Cast(op.GreaterOrEqual(positions, op.Constant(value_int=0)), to=1)
    steps = op.CumSum(valid, op.Constant(value_int=1))
    apart = op.Max(op.Sub(op.Unsqueeze(steps, ints(2)), op.Unsqueeze(steps, ints(1))), zero)
    seen = op.Mul(op.Trilu(op.Expand(one, op.Shape(apart)), upper=0), op.Unsqueeze(valid, ints(1)))
    weights = op.Mul(op.Pow(decay, op.Unsqueeze(apart, ints(3))), op.Unsqueeze(seen, ints(3)))
    given = op.Unsqueeze(op.Mul(op.Sub(one, decay), x), ints(1))
    y = op.ReduceSum(op.Mul(weights, given), ints(2), keepdims=0)
    if state is not None:
        y = op.Add(y, op.Mul(op.Pow(decay, op.Unsqueeze(steps, ints(2))), op.Unsqueeze(state, ints(1))))
    return y, op.Gather(y, op.Constant(value_int=-1), axis=1)


def cost(x: Tensor, decay: Tensor, state: Any, positions: Any) -> Cost:
    """Two operations an element."""
    return Cost(2.0 * x.numel(), 2.0 * x.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Sequences from their first row or from a state, with padding before some or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 9))
        size = like[0].shape[2] if like else draw(st.integers(1, 5))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        pads = torch.randint(0, rows, (batch, 1), generator=generator)
        state = torch.randn(batch, size, generator=generator)
        positions = (torch.arange(rows) - pads).clamp(min=-1)
        some, padded = (draw(st.booleans()) if like is None else like[i] is not None for i in (2, 3))
        x = torch.randn(batch, rows, size, generator=generator)
        decay = torch.rand(size, generator=generator)
        return x, decay, state if some else None, positions if padded else None

    return build()


OP = OpDef(
    name="moving_average",
    schema="(Tensor x, Tensor decay, Tensor? state, Tensor? positions) -> (Tensor, Tensor)",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    mixer=Mixer(rows={"x": -2}, state=("state",), positions="positions"),
    tolerance={torch.float32: (1e-5, 1e-5)},
)
