"""cfg-batch: the two branches of guidance run as one batch of twice the rows, and the weights are read once a round.

The state `tokens` then holds both, the conditional rows first, as the rule reads them. Both branches have the same
lengths, so that a ragged batch stays one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from aropt.ir.program import Program
from aropt.loops.guidance import TOGETHER, TOKENS, TWICE, TWO_BRANCHES, UNCONDITIONAL, rebatch, together, without
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class CfgBatch:
    name: ClassVar[str] = "cfg-batch"
    contract: ClassVar[Contract] = Contract(
        "rounding", after=("canonicalize", "cfg-interval"), requires=(TWO_BRANCHES,), establishes=(TOGETHER,)
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return Applies(("2 forwards a round become 1 of twice the rows",))

    def run(self, program: Program) -> Program:
        tokens = program.state[TOKENS]
        both = replace(tokens, spec=rebatch(tokens.spec, TWICE))
        changed = together(program)
        return program.replace(
            graphs={**program.graphs, **changed},
            state={n: both if n == TOKENS else s for n, s in program.state.items() if n != UNCONDITIONAL},
            control=without(program.control, changed),
        )


PASS = CfgBatch
