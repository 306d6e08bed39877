"""guide-cache: the guide of a guided diffusion computes the rows that are new, against its stored keys and values.

Exact where no row of the guide sees a later one, which its mask is asked. Before the first mask all ids are known;
after a round those up to the next mask are drafts that were kept: their keys and values are right. What was stored of
other drafts is not rolled back: it lies after the rows that could see it, and is computed anew before it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.errors import Unsupported
from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, rewrite
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.unmask.ar_verifier import OFFERED, guiding, renamed, whole
from aropt.loops.unmask.ar_verifier import PREFIX as WEIGHTS
from aropt.loops.unmask.blocks import FAR, current_block, places
from aropt.loops.unmask.cache_policy import sized
from aropt.restrict.rewrite import Restricted, restrict
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.target import Target

I64 = torch.int64
CANVAS, PICKED, ROWS = Spec(I64, ("B", "T")), Spec(I64, ("B", "R")), Spec(I64, ("B",))
PREFIX = "guide_"  # of its state
NO_GUIDE, ALL = "no guide runs a full forward over drafts", "the guide runs the full forward over drafts"
WHOLE_GUIDE = Fact("a guide's full forward", lambda p: "" if whole(p.control) else NO_GUIDE)
GUIDE_ROWS = Fact("a guide's new rows alone", lambda p: ALL if whole(p.control) else "")


@dataclass(frozen=True)
class GuideCache:
    name: ClassVar[str] = "guide-cache"
    contract: ClassVar[Contract] = Contract(
        "rounding", after=("canonicalize", "block-cache"), requires=(WHOLE_GUIDE,), establishes=(GUIDE_ROWS,)
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        try:
            reach = restricted(program).facts["reach"]
        except Unsupported as error:
            return Skips(str(error))
        for row, far in enumerate(reach):
            if far > row:
                return Skips(f"row {row} of the guide sees row {far}")
        return Applies(("guide: rows from the last known id on",))

    def run(self, program: Program) -> Program:
        forward, judge, agreed = guiding(program.control)
        found = restricted(program)
        names = {n: WEIGHTS + n for n in found.constants}
        constants = {names[n]: w for n, w in found.constants.items()}
        step = renamed(found.graph, names, {**program.weights, **constants})
        (logits,) = forward.writes
        step = replace(step, outputs={logits if n == "logits" else n: s for n, s in step.outputs.items()})
        offered = {n: s for n, s in program.graphs[judge.graph].inputs.items() if n in OFFERED}
        choosing, placing = guide_rows(program.meta["mask"], offered), agree(program.meta["mask"], bool(offered))
        graphs = {**program.graphs, **{g.name: g for g in (choosing, placing, step)}}
        state = {PREFIX + n: sized(s) for n, s in found.state.items()}
        state["guide_end"] = StateSpec("counter", ROWS, 0)

        def change(call: Call) -> list[Control]:
            if call == forward:
                reads = {n: PREFIX + n for n in step.inputs} | {"ids": "guide_feed"}
                writes = {n: PREFIX + n for n in step.outputs} | call.writes
                return [call_by_name(choosing), Call(step.name, reads, writes)]
            if call == judge:
                return [replace(call, reads=call.reads | {n: PREFIX + n for n in ("following", *offered)})]
            return [call_by_name(placing)] if call == agreed else [call]

        return program.replace(
            graphs=graphs,
            state={**program.state, **state},
            control=rewrite(program.control, change),
            weights={**program.weights, **constants},
            meta={**program.meta, "ragged": "masks" in program.meta},  # where the canvas's rows are chosen too
        )


PASS = GuideCache


def restricted(program: Program) -> Restricted:
    """The guide's forward for chosen rows, its constants under names of their own. Raises Unsupported."""
    guide = program.graphs[guiding(program.control)[0].graph]
    plain = replace(guide, outputs=dict(zip(("logits",), guide.outputs.values(), strict=True)))
    return restrict(plain, program.weights, program.meta["capacity"], canvas=True)


def guide_rows(mask: int, offered: dict[str, Spec]) -> Graph:
    """From the row before the first mask, or the first never computed, to the one before the block's last mask.

    `offered`: what the judge is told of the ids after them, beside the draft, [B, R, K].
    """

    def function(
        tokens: Tensor,
        drafted: Tensor,
        following: Tensor,
        lengths: Tensor,
        origin: Tensor,
        block: Tensor,
        guide_end: Tensor,
        **told: Tensor,
    ) -> tuple[Tensor, ...]:
        at = places(tokens, lengths)
        active, now = current_block(tokens, lengths, origin, block, mask)
        first = torch.where(active, at, FAR).amin(1, keepdim=True)
        last = torch.where(active, at, -1).amax(1, keepdim=True)
        due = (at >= torch.minimum(first - 1, guide_end.unsqueeze(1))) & (at < last) & (at >= 0)
        due = due & (now.unsqueeze(1) < FAR)
        slots = torch.ops.aropt.due_slots(due)
        inside = slots.clamp(max=tokens.shape[1] - 1)
        positions = torch.where(slots < tokens.shape[1], at.gather(1, inside), -1)
        rest = [x.gather(1, inside.unsqueeze(2).expand(-1, -1, x.shape[2])) for x in told.values()]
        return drafted.gather(1, inside), slots, positions, following.gather(1, inside), last.squeeze(1), *rest

    rows = {n: ROWS for n in ("lengths", "origin", "guide_end")}
    inputs = {"tokens": CANVAS, "drafted": CANVAS, "following": CANVAS, **rows, "block": Spec(I64)}
    inputs |= {n: replace(s, dims=("B", "T", s.dims[2])) for n, s in offered.items()}
    outputs = [PREFIX + n for n in ("feed", "slots", "positions", "following", "end", *offered)]
    return capture_function("guide_rows", function, inputs, outputs)


def agree(mask: int, chooses: bool) -> Graph:
    """Which rows the guide agrees with, in their places: a row judges the next id.

    `chooses`: and what it would take instead. Rows from the first such one on have to be computed again.
    """

    def function(tokens: Tensor, guide_slots: Tensor, fits: Tensor, **chosen: Tensor) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        to = (guide_slots + 1).clamp(max=length)
        accepted = torch.zeros(batch, length + 1, dtype=torch.bool).scatter(1, to, fits)[:, :-1]
        if not chosen:
            return (accepted,)
        candidate, at = chosen["candidate"], places(tokens, chosen["lengths"])
        taken = torch.cat([candidate, to[:, :1]], 1).scatter(1, to, chosen["choice"])[:, :-1]
        changed = torch.where((taken != candidate) & (tokens == mask), at, FAR).amin(1)
        return accepted, taken, torch.minimum(chosen["guide_end"], changed)

    inputs = {"tokens": CANVAS, "guide_slots": PICKED, "fits": Spec(torch.bool, ("B", "R"))}
    inputs |= {"choice": PICKED, "candidate": CANVAS, "lengths": ROWS, "guide_end": ROWS} if chooses else {}
    return capture_function("agree", function, inputs, ["accepted", *(["candidate", "guide_end"] if chooses else [])])
