"""Seeded miscompiles of merged linears and of the fused attention op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aropt.ir import ops
from aropt.ir.program import Program
from tests.mutants.surgery import mutant, reweigh, swap, then

OP = ops.load("cached_attention")
NAMES = [argument.name for argument in OP.overload._schema.arguments]
FIRST = ("attn.0",)


def changed(program: Program, **changes: Callable[[Any], Any]) -> Program:
    """The op with some arguments changed."""

    def run(*args: Any) -> Any:
        given = dict(zip(NAMES, args, strict=True))
        return OP.reference(**(given | {n: change(given[n]) for n, change in changes.items()}))

    return swap(program, OP.overload, run)


@mutant("fused", at=FIRST)
def fused_scale(p: Program) -> Program:
    """Scores are scaled by 1/D and not by its root."""
    return changed(p, scale=lambda scale: scale**2)


@mutant("fused", at=FIRST)
def fused_window(p: Program) -> Program:
    """A causal row sees only its last slots."""
    return changed(p, window=lambda _: 3)


@mutant("fused", at=FIRST)
def fused_without_rotation(p: Program) -> Program:
    return changed(p, cos=lambda _: None, sin=lambda _: None)


@mutant("fused", at=FIRST)
def fused_angles_of_the_next_slot(p: Program) -> Program:
    """Queries and keys are turned alike, but by tables one slot on whose last row is wrong; and backwards."""
    return changed(p, sin=lambda sin: -sin.roll(1, 0))


@mutant("fused", at=FIRST)
def fused_pairs_for_halves(p: Program) -> Program:
    return changed(p, interleaved=lambda _: True)


@mutant("fused", at=FIRST)
def fused_rows_one_slot_early(p: Program) -> Program:
    """Decoded rows overwrite the row before."""
    return changed(p, total=lambda total: total - (total > 4).to(total.dtype))


@mutant("fused", at=FIRST)
def fused_keys_as_values(p: Program) -> Program:
    """Keys and values trade places in the packed rows."""

    def traded(query: Tensor) -> Tensor:
        width = query.shape[-1] // 4  # four query heads of it, then two heads of keys and two of values
        q, k, v = query.split([2 * width, width, width], -1)
        return torch.cat([q, v, k], -1)

    return changed(p, query=traded)


@mutant("fused", at=FIRST)
def fused_groups_traded(p: Program) -> Program:
    """The heads of the groups come out in each other's place."""

    def run(*args: Any) -> Any:
        out, keys, values = OP.reference(*args)
        return out.unflatten(-1, (2, -1)).flip(2).flatten(2), keys, values

    return swap(p, OP.overload, run)


@mutant("fused", at=FIRST)
def fused_cache_not_returned(p: Program) -> Program:
    """Caches leave the op as they came in."""

    def run(*args: Any) -> Any:
        given = dict(zip(NAMES, args, strict=True))
        return OP.reference(*args)[0], given["k_cache"].clone(), given["v_cache"].clone()

    return swap(p, OP.overload, run)


@mutant("fused", at=FIRST)
def fused_total_stands_still(p: Program) -> Program:
    return then(p, "total", lambda total: total - 1)


@mutant("fused", at=FIRST)
def merged_rows_rotated(p: Program) -> Program:
    """A merged weight holds its rows in another order."""
    return reweigh(p, "merged.", lambda w: w.roll(1, 0))
