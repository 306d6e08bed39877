"""cfg-interval: rounds outside the interval of guidance run the conditional branch alone.

A round is one of three: before the interval, where the unconditional branch is only told which tokens came; in it;
after it, where that branch is gone. With caches (kv-cache, later) the branch catches up in one call when the interval
begins: what the rounds before it told it is fed together. Exact, as the rule does not read the branch outside.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.guidance import alone, bodies, unlike, without
from aropt.passbase import Applies, Contract, Skips
from aropt.program import Call, Control, Graph, If, Program, Seq, Spec, StateSpec
from aropt.rules import inside
from aropt.trace import capture_function

BOOL, I64 = torch.bool, torch.int64
RULE = "guidance-interval"


@dataclass(frozen=True)
class CfgInterval:
    name: ClassVar[str] = "cfg-interval"
    contract: ClassVar[Contract] = Contract("rounding", ("two branches",), ("no idle branch",))

    def plan(self, program: Program, target: str) -> Applies | Skips:
        reason = unlike(program)
        if not reason and RULE not in program.meta["rules"]:
            reason = f"guidance has no interval: capture the model with the rule '{RULE}'"
        return Skips(reason) if reason else Applies(("2 forwards a round inside the interval, 1 outside",))

    def run(self, program: Program) -> Program:
        found = {n: replace(g, name=f"{n}_alone") for n, g in alone(program).items()}
        told = {n: g for n, g in found.items() if n != "append"}
        graphs = {**program.graphs, **{g.name: g for g in found.values()}, "phase": phase()}
        next_phase = Call("phase", {n: n for n in graphs["phase"].inputs}, {n: n for n in graphs["phase"].outputs})

        def three(body: Control) -> Control:
            assert isinstance(body, Seq)
            both, before, after = (
                Seq((*one.body, next_phase)) for one in (body, without(body, told), without(body, found))
            )
            return If("guiding", both, If("ended", after, before))

        control = bodies(program.control, three)
        assert isinstance(control, Seq)
        at = next(i for i, part in enumerate(control.body) if isinstance(part, Call) and part.graph == "start")
        flags = {n: StateSpec("flag", Spec(BOOL)) for n in ("guiding", "ended")}
        return program.replace(
            graphs=graphs,
            state={**program.state, **flags},
            control=Seq((*control.body[: at + 1], next_phase, *control.body[at + 1 :])),
        )


PASS = CfgInterval


def phase() -> Graph:
    """Where the next round is: inside the interval, or after it."""

    def function(count: Tensor, guidance_from: Tensor, guidance_to: Tensor) -> tuple[Tensor, ...]:
        return inside(guidance_from, guidance_to, count), count >= guidance_to

    inputs = {n: Spec(I64) for n in ("count", "guidance_from", "guidance_to")}
    return capture_function("phase", function, inputs, ["guiding", "ended"])
