"""Changes that nothing can tell: the validator must let them pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from aropt.ir.control import Call, rewrite
from aropt.ir.program import Program
from tests.mutants.surgery import (
    aten,
    follows,
    mutant,
    swap,
)


@mutant("rotary", equivalent=True)
def own_slot_rule_dropped(p: Program) -> Program:
    """Rows of padding see nothing: SDPA gives zeros for them, and nobody reads those."""
    return swap(p, aten.eq.Tensor, lambda all_slots, mine: (all_slots == mine) & False, follows(aten.arange.default))


@mutant("rotary", "window", equivalent=True)
def strictly_earlier(p: Program) -> Program:
    """Rows see strictly earlier positions, and their own by the own-slot rule."""
    return swap(p, aten.le.Tensor, lambda stored, rows: stored < rows)


@mutant("rotary", equivalent=True)
def states_renamed(p: Program) -> Program:
    """Two states of the same type change names, where read and where written."""
    names = {"k_0": "k_1", "k_1": "k_0"}

    def change(call: Call) -> list[Any]:
        reads, writes = ({i: names.get(v, v) for i, v in given.items()} for given in (call.reads, call.writes))
        return [replace(call, reads=reads, writes=writes)]

    return p.replace(control=rewrite(p.control, change))


@mutant("rotary", equivalent=True)
def logits_rounded_elsewhere(p: Program) -> Program:
    """The attention sums in another order."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num() @ v

    return swap(p, aten.scaled_dot_product_attention.default, attend)
