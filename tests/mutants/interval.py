"""Guidance in an interval: when it begins and ends, and what the unconditional branch is fed when it does."""

from __future__ import annotations

import torch

from aropt.ir.program import Program
from tests.mutants.surgery import aten, mutant, reads, recall, swap


@mutant("interval", "interval-cached")
def interval_begins_late(p: Program) -> Program:
    """The first row of the interval is not guided."""
    return swap(p, aten.ge.Tensor, lambda count, start: count > start, reads("guidance_from", 1))


@mutant("interval", "interval-cached", at=("", "emb"))
def interval_ends_early(p: Program) -> Program:
    """The last row of the interval is not guided."""
    return swap(p, aten.lt.Tensor, lambda count, end: count + 1 < end, reads("guidance_to", 1))


@mutant("interval", "interval-cached", at=("attn.0",))
def catch_up_forgets(p: Program) -> Program:
    """Of the rows that wait for the interval only the newest is fed."""
    return swap(p, aten.cat.default, lambda parts, _: parts[1], lambda n: len(n.args[0]) == 2 and waits(n))


@mutant("interval", "interval-cached", at=("emb",))
def catch_up_reversed(p: Program) -> Program:
    """The newest row is fed before those that waited longer."""
    return swap(p, aten.cat.default, lambda parts, axis: torch.cat(parts[::-1], axis), waits)


@mutant("interval-cached", at=("attn.0",))
def branches_share_a_cache(p: Program) -> Program:
    """The unconditional branch reads the conditional one's keys."""
    return recall(p, {"negative_k_0": "k_0"})


def waits(node: object) -> bool:
    """Whether the node joins rows that wait with a new one, not the batches of two branches."""
    parts, *axis = getattr(node, "args", [[]])
    return (
        bool(axis)
        and isinstance(parts, (list, tuple))
        and any(getattr(x, "target", None) in ("negative_feed", "feed") for x in parts)
    )
