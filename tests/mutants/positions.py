"""Positions and masks."""

from __future__ import annotations

import torch

from aropt.ir.program import Program
from tests.mutants.surgery import (
    BOTH,
    CAPACITY,
    aten,
    follows,
    mutant,
    reweigh,
    swap,
    then,
)


@mutant("guided", "guided-cached", at=("model", "pos"))
def position_plus_one(p: Program) -> Program:
    """Learned positions are one too high. (Rotary ones would not show it.)"""
    return then(p, "positions", lambda at: torch.where((at >= 0) & (at < CAPACITY - 1), at + 1, at))


@mutant("rotary", at=("attn.0",))
def position_plus_one_in_decode(p: Program) -> Program:
    """Decoded rows are one position too far from the prompt."""
    return then(p, "positions", lambda at, filled: (at + (filled > 0).long()).clamp(max=CAPACITY - 1), "filled")


@mutant("rotary", "guided", at=("attn.0", "model", "pos"))
def position_constant(p: Program) -> Program:
    """All rows are at position 0."""
    return then(p, "positions", lambda at: at.clamp(max=0))


@mutant("guided", "guided-cached", at=("model", "pos"))
def slots_as_positions(p: Program) -> Program:
    """Padding counts in the positions of the rows after it: only ragged batches show it."""
    return then(p, "positions", lambda at, pads: torch.where(at >= 0, at + pads[:, None], at), "pads")


@mutant("guided", at=("model", "pos"))
def padding_of_the_neighbour(p: Program) -> Program:
    """Each row takes the next one's padding."""
    return then(p, "pads", lambda pads: pads.roll(1), loop=False)


@mutant("rotary", at=("attn.0",))
def position_table_too_short(p: Program) -> Program:
    """The last position that the model takes has the angles of the one before."""
    return reweigh(p, "positions.", lambda table: torch.cat([table[:-1], table[-2:-1]]))


@mutant(*BOTH, "window", at=("attn.0",))
def sees_a_later_row(p: Program) -> Program:
    """Rows see one row ahead."""
    return swap(p, aten.le.Tensor, lambda stored, rows: stored <= rows + 1)


@mutant(*BOTH, at=("attn.0",))
def sees_padding(p: Program) -> Program:
    """Padding is stored as position 0: only ragged batches show it."""
    return then(p, "positions", lambda at: at.clamp(min=0))


@mutant(*BOTH, "window", at=("attn.0",))
def sees_empty_slots(p: Program) -> Program:
    """Slots that nothing was written to are attended to."""
    return swap(p, aten.ge.Scalar, lambda stored, _: stored >= -1, lambda n: n.args[1] == 0)


@mutant("rotary", at=("attn.0",))
def first_token_hidden(p: Program) -> Program:
    """Rows do not see position 0."""
    return swap(p, aten.ge.Scalar, lambda stored, _: stored >= 1, lambda n: n.args[1] == 0)


@mutant("window", at=("attn.0",))
def window_too_wide(p: Program) -> Program:
    """The window holds one row more."""
    return swap(p, aten.gt.Tensor, lambda stored, oldest: stored >= oldest)


@mutant("window", at=("attn.0",))
def window_ignored(p: Program) -> Program:
    """The local layer has the global layer's mask."""
    return swap(p, aten.gt.Tensor, lambda stored, _: stored > -2)


@mutant("window", at=("attn.0",))
def window_too_narrow(p: Program) -> Program:
    """The window holds one row less."""
    return swap(p, aten.gt.Tensor, lambda stored, oldest: stored > oldest + 1)


@mutant("rotary", at=("attn.0",))
def own_slot_off_by_one(p: Program) -> Program:
    """A row sees the slot after its own."""
    return swap(p, aten.eq.Tensor, lambda all_slots, mine: all_slots == mine + 1, follows(aten.arange.default))


@mutant("rotary", at=("attn.0",))
def mask_of_the_neighbour(p: Program) -> Program:
    """Each row takes the next one's mask: only ragged batches show it."""
    return swap(p, aten.le.Tensor, lambda stored, rows: (stored <= rows).roll(1, 0))
