"""The model's arithmetic."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.ir.program import Program
from tests.mutants.surgery import (
    BOTH,
    aten,
    mutant,
    reweigh,
    swap,
    then,
    within,
)


@mutant("rotary", at=("attn.1",))
def wrong_scale(p: Program) -> Program:
    """Layer 1's attention divides by the head size, not its root."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1 / q.shape[-1])

    return swap(p, aten.scaled_dot_product_attention.default, attend, within("attn.1"))


@mutant("rotary", at=("attn.0",))
def heads_mapped_wrong(p: Program) -> Program:
    """Query head h reads key head h % 2, not h // 2."""
    return swap(p, aten.expand.default, lambda x, shape: x.expand(shape).transpose(1, 2), within("attn.0"))


@mutant("rotary", at=("attn.0",))
def sine_flipped(p: Program) -> Program:
    """Rotary angles turn the other way."""
    return reweigh(p, "positions.sin", torch.neg)


@mutant("rotary", "window", at=("attn.0",))
def sine_table_shifted(p: Program) -> Program:
    """Sines are those of the position before."""
    return reweigh(p, "positions.sin", lambda table: table.roll(1, 0))


@mutant("rotary", "guided", at=("up.0",))
def one_weight_off(p: Program) -> Program:
    """One element of a weight is off by a thousandth."""

    def nudge(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[3, 2] *= 1.001
        return weight

    return reweigh(p, "up.0.weight", nudge)


@mutant("rotary", at=("up.0",))
def layer_weights_swapped(p: Program) -> Program:
    """Layer 0 uses layer 1's weight, which has the same shape."""
    return reweigh(p, "up.0.weight", lambda _: p.weights["up.1.weight"])


@mutant("rotary", at=("down.0",))
def bias_dropped(p: Program) -> Program:
    """A linear layer without its bias."""
    return swap(p, aten.linear.default, lambda x, w, _: F.linear(x, w), within("down.0"))


@mutant("rotary", at=("norms.2",))
def wrong_epsilon(p: Program) -> Program:
    """A norm with a hundred times the epsilon."""
    return swap(p, aten.layer_norm.default, lambda x, shape, w, b, eps, _: F.layer_norm(x, shape, w, b, 100 * eps),
                within("norms.2"))  # fmt: skip


@mutant("rotary", at=("attn.0",))
def table_rounded(p: Program) -> Program:
    """A constant was folded in bfloat16."""
    return reweigh(p, "positions.cos", lambda table: table.bfloat16().float())


@mutant("guided", at=("head",))
def weight_rounded(p: Program) -> Program:
    """The head was stored in float16."""
    return reweigh(p, "head.weight", lambda w: w.half().float())


def second_last(x: Tensor, axis: int, *_: int) -> Tensor:
    return x.narrow(axis, max(x.shape[axis] - 2, 0), 1)


@mutant(*BOTH, at=("attn.1", "model"))
def last_row_off_by_one(p: Program) -> Program:
    """The logits are those of the row before the last."""
    return swap(p, aten.slice.Tensor, second_last, lambda n: n.args[2] == -1)


@mutant(*BOTH, "guided")
def logits_of_the_neighbour(p: Program) -> Program:
    """The rule sees the next sequence's logits."""
    return then(p, "row", lambda row: row.roll(1, 0))
