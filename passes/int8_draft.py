"""int8-draft: the model itself with weights of eight bits drafts rows one by one, and a round checks them all at once.

Where a round waits for weights, reading them once for several rows costs little more than for one, and a step that
reads a quarter of the bytes little beside it. So the step with its linear layers as `int8-linears` makes them drafts,
by the same rule with the same noise, into the same slots; then the step computes the newest row and the drafts as rows
of one call, writes its own keys and values over the drafts', and the rule picks for each row (speculative decoding,
Leviathan et al. 2023, 2211.17192; with the model's own reduced weights as in QuantSpec, 2502.10424). A draft counts if
it is what the row before picked. So the ids, greedy or drawn, are those of the plain loop whatever the drafts are:
noise is a function of seed and position, so that a draw is checked like a choice, and nothing is spent from a budget.

It is for one sequence at a time, with guidance in one batch on targets whose attention takes several rows of several
sequences; others run as before. The prompt is a round of the plain step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from aropt.errors import UsageError
from aropt.ir.control import Loop, Seq, renamed
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.ir.units import window
from aropt.loops.guidance import NEW_ROWS
from aropt.loops.speculate import (
    DRAFTS,
    NO_DRAFTS,
    REWINDS,
    Draft,
    Rounds,
    beside,
    checkable,
    checking,
    dense,
    from_model,
    sketching,
    varies,
)
from aropt.restrict.all_rows import wide
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.int8 import EightBits, by_name
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class Int8Draft:
    """Options: `drafts`, rows that a round checks beside the one that it would write anyway; `group` and `least` as of
    int8-linears.
    """

    drafts: int = 8
    group: int = 128
    least: int = 2**16
    source: ClassVar[str] = "self"
    name: ClassVar[str] = "int8-draft"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        when="tried",
        after=("fuse-attention", "kv-cache"),
        requires=(NEW_ROWS, REWINDS, NO_DRAFTS),
        establishes=(DRAFTS,),
        tries=("drafts=8", "drafts=16"),
    )

    def __post_init__(self) -> None:
        if self.drafts < 1:
            raise UsageError(what=f"int8-draft:drafts={self.drafts}", why="it is 1 or more", hint="leave it out")
        self.bits.check()

    @property
    def bits(self) -> EightBits:
        return EightBits(self.group, self.least, self.name)

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        found = checkable(program)
        if not found:
            return Skips("no loop over positions runs a cached step, straight")
        step, other = program.graphs[found[0].step.graph], {v for one in found for v in varies(program, one.rule)}
        if other:
            return Skips(f"the rule depends on more than a row's logits: {', '.join(sorted(other))}")
        if guided(program) and not target.has("batched-chunks"):
            return Skips("its attention takes several rows of one sequence, and guidance makes two of it")
        layers, others = self.bits.layers(step, program.weights)
        rejected = tuple(by_name(others, program.weights))
        if not layers:
            return Skips("no linear layer of the step takes weights of eight bits", rejected)
        if wide(step, program.weights) is None:
            return Skips("the step's last rows can't be computed alone")
        return Applies((f"{self.drafts} drafts a round, by {len(layers)} layers of eight bits",), rejected)

    def run(self, program: Program) -> Program:
        found, weights = checkable(program), dict(program.weights)
        step = program.graphs[found[0].step.graph]
        verify = wide(step, weights)
        assert verify is not None
        sketch = self.bits.changed(step, self.bits.layers(step, weights)[0], weights, "sketch")
        for node in sketch.fx.nodes:
            node.meta.pop("origin", None)  # nothing of the reference computes this
        row = window(program.meta)
        shape = Draft(self.drafts, program.meta["vocab"], dense(step), row, guided(program))
        made = {g.name: g for g in (verify, sketch, *from_model(shape, program.state["feed"].spec))}
        flag, counter = Spec(torch.bool), Spec(torch.int64)
        state = {
            "begun": StateSpec("flag", flag, 0),
            "ready": StateSpec("flag", flag, 0),
            "ahead": StateSpec("counter", counter),
            "want": StateSpec("counter", counter),
            "drafted": StateSpec("tokens", shape.drafted),
            "fed": program.state["feed"],
        }
        return program.replace(
            graphs={**program.graphs, **made},
            state={**program.state, **state},
            control=beside(program.control, made, found, drafting),
            weights=weights,
        )


PASS = Int8Draft


def guided(program: Program) -> bool:
    """Whether a round feeds both branches of guidance."""
    return program.state["feed"].spec.dims[0] != "B"


def drafting(plain: Loop, rounds: Rounds, made: dict[str, Graph]) -> Seq:
    """The rounds with drafts."""
    ahead = {plain.evidence: "draft_row", plain.decides: "draft", "count": "ahead"}
    step, sketch = rounds.step, replace(rounds.step, graph="sketch")
    sketched = [renamed(sketch if call == step else call, ahead) for call in rounds.needed()]
    note = renamed(call_by_name(made["note"]), {plain.decides: "draft"})
    drafts = sketching("ready", Seq((*sketched, note)))
    fed = {step.reads["ids"]: "fed"}
    placed = [call_by_name(made["rewind"]), *(renamed(call, fed) for call in rounds.before)] if rounds.before else []
    verify, every = renamed(replace(step, graph="verify"), fed), replace(rounds.last, graph="every")
    pick = renamed(rounds.rule, {plain.decides: "picks", "position": "places", "streams": "row_streams"})
    check = [*placed, call_by_name(made["spots"]), verify, every, pick, call_by_name(made["accept"])]
    round_ = Seq((drafts, call_by_name(made["spread"]), *check))
    return Seq((call_by_name(made["begin"]), checking("finished", round_, plain)))
