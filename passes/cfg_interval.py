"""cfg-interval: rounds outside the interval of guidance run the conditional branch alone.

Before the interval the unconditional branch is only told which tokens came. The first round inside runs both, one
after the other: with caches (kv-cache, later) the branch catches up in one call, fed all that it was told. Then their
state is joined, and they run as one batch; after the interval its conditional rows go on. Exact, as the rule does not
read the branch outside. Both kinds of state exist all the time, so it takes twice the memory for caches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, If, Seq, renamed, rewrite, sequence, writes
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.guidance import (
    JOINED,
    TOGETHER,
    TOKENS,
    TWICE,
    TWO_BRANCHES,
    alone,
    append,
    bodies,
    joining,
    named,
    parting,
    rebatch,
    without,
)
from aropt.loops.rules import inside
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.target import Target

BOOL, I64 = torch.bool, torch.int64
RULE = "guidance-interval"
NONE = f"guidance has no interval: capture the model with the rule '{RULE}'"
INTERVAL = Fact("an interval of guidance", lambda p: "" if RULE in p.meta["rules"] else NONE)


@dataclass(frozen=True)
class CfgInterval:
    name: ClassVar[str] = "cfg-interval"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        when="asked",
        after=("canonicalize", "cfg-eliminate"),
        requires=(TWO_BRANCHES, INTERVAL),
        establishes=(TOGETHER,),
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return Applies(("both branches inside the interval, as one batch; 1 outside",))

    def run(self, program: Program) -> Program:
        tokens = program.state[TOKENS]
        both = replace(tokens, spec=rebatch(tokens.spec, TWICE))
        single = {n: replace(g, name=f"{n}_alone") for n, g in alone(program).items() if g.role != "prologue"}
        told = {n: g for n, g in single.items() if TOKENS not in g.outputs}
        appended = append("append_joined", program)
        batch = {n: appended if TOKENS in g.outputs else g for n, g in single.items() if g.role != "rule"}
        made = [joining("join", {TOKENS: tokens.spec}), parting("part", {TOKENS: tokens.spec}), phase()]
        join, part, turn = (named(g) for g in made)

        def rounds(body: Control) -> Control:
            before, after, more = (without(body, graphs) for graphs in (told, single, batch))
            more = rewrite(more, lambda call: [renamed(call, {TOKENS: JOINED + TOKENS})])
            inner = If("joined", ended(more, turn), ended(body, join, turn))
            outer = If("ended", Seq((If("leaving", part, Seq(())), *sequence(after), turn)), ended(before, turn))
            return If("guiding", inner, outer)

        control = bodies(program.control, rounds)
        assert isinstance(control, Seq)
        at = next(i for i, part in enumerate(control.body) if TOKENS in writes(part))
        return program.replace(
            graphs={**program.graphs, **{g.name: g for g in (*made, *single.values(), appended)}},
            state={**program.state, JOINED + TOKENS: both, **{n: StateSpec("flag", Spec(BOOL)) for n in turn.writes}},
            control=Seq((*control.body[: at + 1], join, turn, *control.body[at + 1 :])),
        )


PASS = CfgInterval


def ended(body: Control, *last: Call) -> Seq:
    return Seq((*sequence(body), *last))


def phase() -> Graph:
    """Which kind the next round is: inside the interval, and not the first there; after it, and the first there."""

    def function(count: Tensor, guidance_from: Tensor, guidance_to: Tensor) -> tuple[Tensor, ...]:
        guiding, ended = inside(guidance_from, guidance_to, count), count >= guidance_to
        leaving = (count == guidance_to) & (guidance_from < guidance_to)
        return guiding, guiding & (count > guidance_from), ended, leaving

    inputs = {n: Spec(I64) for n in ("count", "guidance_from", "guidance_to")}
    return capture_function("phase", function, inputs, ["guiding", "joined", "ended", "leaving"])
