"""The loop: limits, stop tokens, what it emits and feeds."""

from __future__ import annotations

from dataclasses import replace

import torch

from aropt.ir.control import If, Seq
from aropt.ir.program import Program
from tests.mutants.surgery import (
    BOTH,
    aten,
    follows,
    mutant,
    reads,
    recall,
    swap,
    then,
)


@mutant(*BOTH)
def limit_plus_one(p: Program) -> Program:
    """One token too many."""
    return swap(p, aten.ge.Tensor, lambda count, limit: count >= limit + 1, reads("limit"))


@mutant("rotary")
def limit_minus_one(p: Program) -> Program:
    """One token too few."""
    return swap(p, aten.ge.Tensor, lambda count, limit: count >= limit - 1, reads("limit"))


@mutant(*BOTH)
def limit_ignored(p: Program) -> Program:
    """Without a stop token the loop never ends."""
    return swap(p, aten.ge.Tensor, lambda count, _: count < 0, reads("limit"))


@mutant("rotary")
def one_token_for_none(p: Program) -> Program:
    """A limit of 0 still gives a token."""
    return then(p, "finished", torch.zeros_like, loop=False)


@mutant(*BOTH)
def stop_ignored(p: Program) -> Program:
    """Stop tokens end nothing."""
    return swap(p, aten.any.dim, lambda x, _: torch.zeros_like(x[:, 0]), follows(aten.eq.Tensor))


@mutant("rotary")
def stop_ignored_when_sampling(p: Program) -> Program:
    """Stop tokens end nothing in the sampled loop."""
    return swap(p, aten.any.dim, lambda x, _: torch.zeros_like(x[:, 0]), follows(aten.eq.Tensor), graph="step_sample")


@mutant("rotary")
def stop_of_the_neighbour(p: Program) -> Program:
    """A stop token ends the next row."""
    return swap(p, aten.any.dim, lambda x, axis: x.any(axis).roll(1), follows(aten.eq.Tensor))


@mutant("rotary")
def first_stop_only(p: Program) -> Program:
    """Only the first of the stop tokens counts."""
    return swap(p, aten.eq.Tensor, lambda token, stop: token == stop[:1], reads("stop", 1))


@mutant("rotary")
def one_end_ends_all(p: Program) -> Program:
    """The batch ends with its first row."""
    return swap(p, aten.all.default, torch.any)


@mutant(*BOTH)
def emits_after_the_end(p: Program) -> Program:
    """Tokens follow the stop token."""
    return swap(p, aten.where.ScalarSelf, lambda done, none, token: token)


@mutant("rotary")
def stop_token_swallowed(p: Program) -> Program:
    """The stop token itself is not emitted."""
    return then(p, "emitted", lambda x, stop: torch.where((x[:, None] == stop).any(1), -1, x), "stop")


@mutant("rotary")
def end_forgotten(p: Program) -> Program:
    """A row that ended goes on a round later."""
    return swap(p, aten.__or__.Tensor, lambda _, now: now, reads("done", 0))


@mutant(*BOTH)
def end_pruned(p: Program) -> Program:
    """Pruning took the flag of ended rows for dead."""
    return recall(p, drop="done")


@mutant("rotary", "guided", at=("emb",))
def feeds_the_neighbour(p: Program) -> Program:
    """Each row continues with the next one's token: a batch of one hides it."""
    return then(p, "feed", lambda feed: feed.roll(1, 0))


@mutant("rotary", "guided", at=("emb",))
def first_decode_repeats(p: Program) -> Program:
    """The round after the prompt feeds the prompt's last token again."""
    return then(p, "feed", lambda new, fed: fed[:, -1:] if fed.shape[1] > 1 else new, "feed")


@mutant("rotary", at=("emb",))
def prompt_loses_its_last_token(p: Program) -> Program:
    """The last token of the prompt is fed as the one before it."""
    return then(p, "feed", lambda x: torch.cat([x[:, :-1], x[:, -2:][:, :1]], 1), loop=False)


@mutant(*BOTH)
def branches_of_if_swapped(p: Program) -> Program:
    """Greedy generation runs the sampled loop."""
    assert isinstance(p.control, Seq)
    parts = (replace(c, then=c.orelse, orelse=c.then) if isinstance(c, If) else c for c in p.control.body)
    return p.replace(control=Seq(tuple(parts)))
