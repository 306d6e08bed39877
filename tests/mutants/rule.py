"""The rule: noise, filters, penalties, guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aropt.ir.program import Program
from tests.mutants.surgery import (
    BOTH,
    CAPACITY,
    VOCAB,
    aten,
    follows,
    mutant,
    reads,
    swap,
    then,
)


def noise(program: Program, change: Callable[..., tuple[Any, ...]]) -> Program:
    """The noise of other seeds, streams or positions."""
    return swap(program, torch.ops.aropt.noise.default, lambda *a: torch.ops.aropt.noise(*change(*a)))


@mutant(*BOTH, "guided")
def noise_ignored(p: Program) -> Program:
    """All uniform numbers are a half."""
    return swap(p, torch.ops.aropt.noise.default, lambda seed, streams, _, n: torch.full((len(streams), n), 0.5))


@mutant("rotary", "guided")
def noise_of_one_stream(p: Program) -> Program:
    """All rows draw alike."""
    return noise(p, lambda seed, streams, at, n: (seed, torch.zeros_like(streams), at, n))


@mutant("rotary")
def noise_by_row(p: Program) -> Program:
    """Noise depends on the row of the batch, not on the stream."""
    return noise(p, lambda seed, streams, at, n: (seed, torch.arange(len(streams)), at, n))


@mutant("rotary", "guided")
def noise_without_position(p: Program) -> Program:
    """Each round draws alike."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, torch.zeros_like(at), n))


@mutant("rotary")
def noise_position_plus_one(p: Program) -> Program:
    """The noise is that of the next token."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, at + 1, n))


@mutant("rotary")
def noise_by_slot(p: Program) -> Program:
    """Noise depends on the padded position: only ragged batches show it."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, at.max().expand_as(at), n))


@mutant(*BOTH)
def seed_ignored(p: Program) -> Program:
    """All seeds are 0."""
    return noise(p, lambda seed, streams, at, n: (torch.zeros_like(seed), streams, at, n))


@mutant("rotary", quick=False)
def seed_of_32_bits(p: Program) -> Program:
    """Large seeds lose their high bits."""
    return noise(p, lambda seed, streams, at, n: (seed % 2**32, streams, at, n))


@mutant("rotary")
def gumbel_sign(p: Program) -> Program:
    """Noise is added with the wrong sign."""
    return swap(p, aten.sub.Tensor, lambda logits, g: logits + g, follows(aten.log.default, 1))


def kept(p: Program, name: str, change: Callable[..., torch.Tensor]) -> Program:
    """What top-k or top-p keep."""
    return swap(p, torch.ops.aropt.keep_top.default, change, reads(name))


def nucleus(x: torch.Tensor, p: torch.Tensor, excluded: int, more: int) -> torch.Tensor:
    """Top-p by its definition, with slips: logits that are not counted before one, and kept after the last."""
    ordered = torch.sort(x, dim=-1, descending=True).values
    total = torch.softmax(ordered, dim=-1).cumsum(-1)
    before = total if excluded else total - torch.softmax(ordered, dim=-1)
    count = ((before < p).sum(-1, keepdim=True) + more).clamp(1, VOCAB)
    return torch.where((x >= ordered.gather(-1, count - 1)) | (p >= 1), x, -torch.inf)


@mutant(*BOTH)
def top_k_plus_one(p: Program) -> Program:
    """One token more is kept."""
    return kept(p, "top_k", lambda x, k, _: torch.ops.aropt.keep_top(x, k + (k > 0), None))


@mutant("rotary")
def top_k_minus_one(p: Program) -> Program:
    """One token less is kept."""
    return kept(
        p, "top_k", lambda x, k, _: torch.ops.aropt.keep_top(x, torch.where(k > 0, (k - 1).clamp(min=1), k), None)
    )


@mutant("rotary")
def top_p_excludes_the_last(p: Program) -> Program:
    """The token that reaches p is left out."""
    return kept(p, "top_p", lambda x, _, top_p: nucleus(x, top_p, 1, 0))


@mutant("rotary")
def top_p_one_more(p: Program) -> Program:
    """The token after the one that reaches p is kept."""
    return kept(p, "top_p", lambda x, _, top_p: nucleus(x, top_p, 0, 1))


@mutant("rotary")
def top_p_ignored(p: Program) -> Program:
    """All tokens are kept."""
    return kept(p, "top_p", lambda x, *_: x.clone())


@mutant("rotary", "guided")
def temperature_ignored(p: Program) -> Program:
    """The temperature is 1."""
    return swap(p, aten.clamp.default, lambda t, _: torch.ones_like(t), reads("temperature", 0))


@mutant("guided")
def min_p_squared(p: Program) -> Program:
    """The threshold is p squared."""
    return swap(p, aten.log.default, lambda p: 2 * p.log(), reads("min_p", 0))


@mutant("guided", "guided-cached")
def penalty_forgets_the_prompt(p: Program) -> Program:
    """Only generated tokens are penalized."""
    return then(p, "seen", torch.zeros_like, loop=False)


@mutant("guided", "guided-cached")
def penalty_forgets_the_generated(p: Program) -> Program:
    """Only the prompt's tokens are penalized."""
    return then(p, "seen", lambda _, before: before, "seen")


@mutant("guided")
def penalty_counts_padding(p: Program) -> Program:
    """The padding token counts as seen: only ragged batches show it."""
    return swap(p, aten.ge.Tensor, lambda at, first: at >= first - CAPACITY, graph="begin")


@mutant("guided")
def penalty_rewards_negatives(p: Program) -> Program:
    """Negative logits are divided too, which makes them likelier."""
    return swap(p, aten.mul.Tensor, lambda x, penalty: x / penalty, reads("repetition_penalty", 1))


@mutant("guided", "guided-cached")
def guidance_branches_swapped(p: Program) -> Program:
    """The unconditional branch is taken for the conditional one."""
    return swap(p, aten.select.int, lambda x, axis, i: x.select(axis, 1 - i), lambda n: n.args[1] == 0)


@mutant("guided")
def guidance_scale_off(p: Program) -> Program:
    """The guidance scale is a tenth too large."""
    return swap(p, aten.mul.Tensor, lambda scale, x: 1.1 * scale * x, reads("guidance", 0))


@mutant("guided", at=("emb",))
def negative_prompt_ignored(p: Program) -> Program:
    """Both branches get the prompt."""
    return swap(
        p,
        aten.cat.default,
        lambda x: torch.cat([x[0], x[0]]),
        reads("negative"),
        graph="begin" if "begin" in p.graphs else "enter",
    )


@mutant("guided")
def bias_ignored(p: Program) -> Program:
    """The bias over the vocabulary is not added."""
    return swap(p, aten.add.Tensor, lambda x, _: x, reads("bias", 1))
