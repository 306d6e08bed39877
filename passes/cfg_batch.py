"""cfg-batch: the two branches of guidance run as one batch of twice the rows, and the weights are read once a round.

The state `tokens` then holds both, the conditional rows first, as the rule reads them. Both branches have the same
lengths, so that a ragged batch stays one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, rewrite
from aropt.ir.edit import compose, trim
from aropt.ir.program import Graph, Program, Spec
from aropt.loops.guidance import TOGETHER, TOKENS, TWICE, TWO_BRANCHES, UNCONDITIONAL, fitted, last
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
        both = replace(tokens, spec=Spec(tokens.spec.dtype, (TWICE, *tokens.spec.dims[1:])))
        changed = {"start": start(program), "append": append("append", both.spec, program)}
        changed["last"] = last(program.graphs["last"].inputs["logits"])

        def change(call: Call) -> list[Control]:
            if call.reads.get("ids") == UNCONDITIONAL:
                return []
            return [fitted(call, changed[call.graph])] if call.graph in changed else [call]

        return program.replace(
            graphs={**program.graphs, **changed},
            state={n: both if n == TOKENS else s for n, s in program.state.items() if n != UNCONDITIONAL},
            control=rewrite(program.control, change),
        )


PASS = CfgBatch


def start(program: Program) -> Graph:
    """The state before the first round, with both prompts as one batch."""
    graph = program.graphs["start"]
    tokens = {n: graph.outputs[n] for n in (TOKENS, UNCONDITIONAL)}
    stack = capture_function("stack", lambda **branches: torch.cat(list(branches.values())), tokens, [TOKENS])
    sequence = [
        Call("start", {n: n for n in graph.inputs}, {n: n for n in graph.outputs}),
        Call("stack", {n: n for n in tokens}, {TOKENS: TOKENS}),
    ]
    composed, _ = compose("start", sequence, {"start": graph, "stack": stack}, graph.inputs, program.weights)
    return trim(composed, set(graph.outputs) - {UNCONDITIONAL}, program.weights)


def append(name: str, tokens: Spec, program: Program) -> Graph:
    """tokens [2B, T], token [B] -> tokens [2B, T + 1]: both branches get the same token."""

    def function(tokens: Tensor, token: Tensor) -> Tensor:
        return torch.cat([tokens, torch.cat([token, token]).unsqueeze(1)], 1)

    token = program.graphs["append"].inputs["token"]
    return capture_function(name, function, {"tokens": tokens, "token": token}, [TOKENS])
