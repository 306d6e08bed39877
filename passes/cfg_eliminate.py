"""cfg-eliminate: a model trained to need no guidance runs its conditional branch alone: half of the forwards.

Legal only where the weights say so (`guidance_free`): Condition Contrastive Alignment (2410.09347) fine-tunes a model
until its conditional branch gives what guidance gave. Scale 1 is then what the program does, and another is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from aropt.ir.program import Program
from aropt.loops.guidance import INPUTS, TOGETHER, TWO_BRANCHES, UNCONDITIONAL, alone, without
from aropt.loops.rules import GUIDED
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.target import Target

RECIPE = "python -m aropt.models.train digits-ar --cca"
NEEDED = f"the weights need guidance; those that don't come from CCA fine-tuning: {RECIPE}"
GUIDANCE_FREE = Fact("guidance-free weights", lambda p: "" if p.meta.get("guidance_free") else NEEDED)


@dataclass(frozen=True)
class CfgEliminate:
    name: ClassVar[str] = "cfg-eliminate"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        when="asked",
        after=("canonicalize",),
        requires=(TWO_BRANCHES, GUIDANCE_FREE),
        establishes=(TOGETHER,),
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return Applies(("2 forwards a round become 1; guidance is 1",))

    def run(self, program: Program) -> Program:
        changed = alone(program)
        return program.replace(
            graphs={**program.graphs, **changed},
            inputs={n: i for n, i in program.inputs.items() if n not in INPUTS},
            state={n: s for n, s in program.state.items() if n != UNCONDITIONAL},
            control=without(program.control, changed),
            meta={**program.meta, "rules": [r for r in program.meta["rules"] if r not in GUIDED], "eliminated": True},
        )


PASS = CfgEliminate
