"""ngram-draft: a round checks ids that the text itself suggests, and keeps those that the rule picks anyway.

What followed the last three ids where they stood before (or two, or one; the latest place wins) is the draft. The step
computes the new id and the drafts as rows of one call; the rule picks an id for each row, and a draft counts if it is
what the row before picked (LLMA, Yang et al. 2023, arXiv 2304.04487; prompt lookup). So the ids are the greedy
ones, whatever the drafts. Keys and values of wrong ones are in slots that the next round writes again before a row sees
them. Recurrent state has no such slots: there `tree-draft` checks drafts of the text.

It is for one sequence at a time, greedy: others run as before. The prompt is a round of the plain step, and so are the
last rounds, where fewer ids are left than a round may write. A round of five rows costs more than one of one row: it
pays where text repeats itself or its prompt, so it is tried on the model's own prompts first (`pipeline.autotune`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from aropt.errors import UsageError
from aropt.ir.control import Call, Loop, Seq, renamed
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.guidance import NEW_ROWS, guided
from aropt.loops.rules import draws
from aropt.loops.speculate import (
    DRAFTS,
    NO_DRAFTS,
    Draft,
    Rounds,
    beside,
    checkable,
    checking,
    dense,
    from_text,
    varies,
)
from aropt.restrict.all_rows import wide
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.facts import ROWS_OF_ONE
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class NgramDraft:
    """Options: `drafts`, how many ids a round checks beside the one that it would write anyway."""

    drafts: int = 4
    source: ClassVar[str] = "text"
    name: ClassVar[str] = "ngram-draft"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        when="tried",
        after=("fuse-attention", "kv-cache"),
        requires=(NEW_ROWS, NO_DRAFTS, ROWS_OF_ONE),
        establishes=(DRAFTS,),
        tries=("drafts=4",),
    )

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise UsageError(what=f"ngram-draft:drafts={self.drafts}", why="it is 1 or more", hint="leave it out")

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        found = greedy(program)
        if not found:
            return Skips("no greedy loop over positions runs a cached step")
        if guided(program) or any(varies(program, one.rule) for one in found):
            return Skips("the rule depends on more than a row's logits")
        verify = wide(program.graphs[found[0].step.graph], program.weights)
        if verify is None:
            return Skips("the step's last rows can't be computed alone")
        if any(name in program.state and not program.state[name].rewinds for name in verify.outputs):
            return Skips("rejected rows can't be taken back of its recurrent state")
        return Applies((f"{self.drafts} drafts a round, for one sequence",))

    def run(self, program: Program) -> Program:
        found = greedy(program)
        verify = wide(program.graphs[found[0].step.graph], program.weights)
        assert verify is not None
        vocab, capacity = (int(program.meta[k]) for k in ("vocab", "capacity"))
        made = {g.name: g for g in (verify, *from_text(Draft(self.drafts, vocab, dense(verify)), capacity))}
        state = {
            "begun": StateSpec("flag", Spec(torch.bool), 0),
            "settled": StateSpec("flag", Spec(torch.bool)),
            "history": StateSpec("tokens", made["recall"].outputs["history"], -1),
            "drafted": StateSpec("tokens", Spec(torch.int64, ("B", self.drafts + 1))),
        }
        return program.replace(
            graphs={**program.graphs, **made},
            state={**program.state, **state},
            control=beside(program.control, made, found, drafting),
        )


PASS = NgramDraft


def greedy(program: Program) -> list[Rounds]:
    """The loops whose rule draws nothing."""
    return [one for one in checkable(program) if not draws(program.graphs[one.rule.graph])]


def drafting(plain: Loop, rounds: Rounds, made: dict[str, Graph]) -> Seq:
    """The rounds with drafts, and plain ones for what is left."""
    (emitted,), instead = plain.emits, {rounds.step.reads["ids"]: "drafted", plain.decides: "picks"}
    step, every = rounds.step, replace(rounds.last, graph="every")
    verify = Call("verify", step.reads, {o: step.writes.get(o, o) for o in made["verify"].outputs})
    body = [renamed(call, instead) for call in (*rounds.before, verify, every, rounds.rule)]
    body.append(call_by_name(made["accept"]))
    checked = checking("settled", Seq(tuple(body)), plain)
    rest = replace(plain, emits={emitted: "rest"})
    return Seq((call_by_name(made["recall"]), checked, call_by_name(made["resume"]), rest))
