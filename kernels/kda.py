"""`aropt::kda`: Kimi's delta attention, the gated delta rule with a decay for each channel of keys (Kimi team 2025).

    kda(q, k, v, g, beta, state, positions) -> (o, state)

As `aropt::gated_delta`, but `g` is float [B, R, H, K]: S' = exp(g[t]) * S[t - 1], each row of S with its own decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Mixer, OpDef, onnx_linear_attention, onnx_valid
from aropt.kernels import gated_delta
from aropt.kernels.gated_delta import cost, drawn, fake, launch, stepped, supports

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

CHUNK = 16  # rows at once: the decays between them are held for each channel


def reference(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, chunk by chunk."""
    if positions is not None:
        valid = (positions >= 0).unsqueeze(2)
        g, beta = g * valid.unsqueeze(3), beta * valid
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]) if state is None else state
    found = []
    for start in range(0, q.shape[1], CHUNK):
        piece = [x[:, start : start + CHUNK].transpose(1, 2) for x in (q, k, v, g, beta)]
        o, state = chunk(state, *piece)
        found.append(o)
    o = torch.cat(found, 2).transpose(1, 2)
    return tuple(t.clone(memory_format=torch.contiguous_format) for t in (o, state))  # type: ignore[return-value]


def chunk(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """o [B, H, R, V] and the state after the rows, from [B, H, R, ..]; decays are differences, never quotients."""
    total = g.cumsum(2)
    later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=q.device).triu(1)
    o, learned = solved(state, q, k, v, total, beta, later)
    left = (total[:, :, -1:] - total).exp()
    return o, total[:, :, -1].exp().unsqueeze(3) * state + (left * k).transpose(2, 3) @ learned


def solved(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, total: Tensor, beta: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """o, and what each row learns [B, H, R, V], from decays since the state and the rows that a row doesn't see."""
    decay = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(hidden.unsqueeze(-1), -torch.inf).exp()
    known = (k * total.exp()) @ state  # decays are [B, H, R, R, K]
    alike, wanted = (torch.einsum("bhik,bhjk,bhijk->bhij", x, k, decay).masked_fill(hidden, 0.0) for x in (k, q))
    system = beta.unsqueeze(3) * alike
    learned = torch.linalg.solve_triangular(system, beta.unsqueeze(3) * (v - known), upper=False, unitriangular=True)
    return wanted @ learned + (q * total.exp()) @ state, learned


def onnx(q, k, v, g, beta, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is a step, several are a Scan of it."""
    return stepped(q, k, v, g, beta, state, positions, (4,))


def contrib(q, k, v, g, beta, state, positions):  # type: ignore[no-untyped-def]
    """As ONNX Runtime's LinearAttention, which takes a decay for each channel of the keys."""
    from onnxscript import opset20 as op

    if positions is not None:
        valid = onnx_valid(positions)
        g, beta = op.Mul(g, op.Unsqueeze(valid, op.Constant(value_ints=[3]))), op.Mul(beta, valid)
    g = op.Reshape(g, op.Constant(value_ints=[0, 0, -1]))
    return onnx_linear_attention(q, k, v, state, g, beta, "gated_delta", int(q.shape[2]), int(v.shape[3]))


def aot() -> Sequence[Aot]:
    """The kernel of `aropt::gated_delta`, with a decay for each channel."""
    return gated_delta.aot(each=True)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    from hypothesis import strategies as st

    return st.composite(lambda draw: drawn(draw, like, each_channel=True))()


OP = OpDef(
    name="kda",
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
    fixed={"q": (2, 3), "k": (2, 3), "v": (2, 3), "g": (2, 3), "beta": (2,), "state": (1, 2, 3)},
    mixer=Mixer(
        rows={"q": -3, "k": -3, "v": -3, "g": -3, "beta": -2},
        state=("state",),
        positions="positions",
        tree="kda_tree_scan",
    ),
    tolerance={torch.float32: (1e-3, 1e-4)},
)
