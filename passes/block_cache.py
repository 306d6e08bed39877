"""block-cache: each round of an unmasking loop computes its block alone, against the keys and values of earlier blocks.

Exact where no row sees a block after its own, which the captured mask is asked. The first round computes all rows. The
round that opens a block computes the finished one before it too: its last rows were written after its keys and values
were stored (the "persisting forward" of SGLang's and NBDiff's loops). So that the rows of a batch don't wait for each
other, each has its own block; all of them compute two blocks when one needs to, which changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.passbase import Applies, Contract, Skips, loops, rewrite
from aropt.program import Call, Control, Graph, If, Input, Program, Spec, StateSpec, calls
from aropt.restrict import restrict
from aropt.trace import capture_function
from aropt.unmask import current_block, places, same

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
CANVAS, ROWS, SCALAR = Spec(I64, ("B", "T")), Spec(I64, ("B",)), Spec(I64)
PICKED = Spec(I64, ("B", "R"))


@dataclass(frozen=True)
class BlockCache:
    name: ClassVar[str] = "block-cache"
    contract: ClassVar[Contract] = Contract("rounding", (), ("cached",))

    def plan(self, program: Program, target: str) -> Applies | Skips:
        model = full_forward(program)
        if model is None:
            return Skips("no loop runs a full forward over a canvas")
        block = int(program.meta.get("block") or 0)
        if not block:
            return Skips("the model has no blocks of its own: its rows see the whole canvas")
        reach = restrict(program.graphs[model.graph], program.weights, capacity(program), canvas=True).facts["reach"]
        late = next((i for i, far in enumerate(reach) if far >= (i // block + 1) * block), None)
        if late is not None:
            return Skips(f"row {late} sees row {reach[late]}, which is in a later block of {block}")
        return Applies((f"{model.graph}: blocks of {block}",))

    def run(self, program: Program) -> Program:
        model = full_forward(program)
        assert model is not None
        found = restrict(program.graphs[model.graph], program.weights, capacity(program), canvas=True)
        mask, vocab = int(program.meta["mask"]), int(program.meta["vocab"])
        parts = [choose(mask), rows_all(), *(rows_of(name) for name in ("rows_two", "rows_one")), spread(vocab)]
        step = replace(found.graph, name="step")
        graphs = {n: g for n, g in program.graphs.items() if n != model.graph} | {g.name: g for g in (*parts, step)}
        rows = If("first", same(graphs["rows_all"]), If("fresh", same(graphs["rows_two"]), same(graphs["rows_one"])))

        def change(call: Call) -> list[Control]:
            if call.graph != model.graph:
                return [call]
            reads = {n: n for n in step.inputs} | {"ids": "feed"}
            forward = Call("step", reads, {n: n for n in step.outputs} | {"logits": "computed"})
            return [same(graphs["choose"]), rows, forward, same(graphs["spread"])]

        return program.replace(
            graphs=graphs,
            state={**program.state, **{n: sized(s) for n, s in found.state.items()}},
            inputs={**program.inputs, "span": Input(Spec(I64, ("W",)), doc="0, 1, ... for the rows of a block")},
            control=rewrite(program.control, change),
            weights={**program.weights, **found.constants},
            meta={**program.meta, "ragged": True, "masks": found.facts["masks"]},
        )


PASS = BlockCache


def capacity(program: Program) -> int:
    return int(program.meta["capacity"])


def sized(state: StateSpec) -> StateSpec:
    """A canvas has one slot an id."""
    return replace(state, spec=replace(state.spec, dims=tuple("T" if d == "S" else d for d in state.spec.dims)))


def full_forward(program: Program) -> Call | None:
    """The call that runs the forward over the canvas, in an unmasking loop."""
    found = (c for loop in loops(program.control, "unmask") for c in calls(loop.body) if c.reads == {"ids": "tokens"})
    return next((c for c in found if list(program.graphs[c.graph].inputs) == ["ids"]), None)


def choose(mask: int) -> Graph:
    """Which block each sequence is at, and whether some sequence opens one."""

    def function(
        tokens: Tensor, lengths: Tensor, origin: Tensor, block: Tensor, cursor: Tensor, rounds: Tensor
    ) -> tuple[Tensor, ...]:
        now = current_block(tokens, lengths, origin, block, mask)[1]
        return now, (now != cursor).any(), rounds == 0

    rows = {n: ROWS for n in ("lengths", "origin", "cursor")}
    inputs = {"tokens": CANVAS, **rows, "block": SCALAR, "rounds": SCALAR}
    return capture_function("choose", function, inputs, ["now", "fresh", "first"])


def rows_all() -> Graph:
    """All rows of the canvas."""

    def function(tokens: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        slots = torch.arange(tokens.shape[1]).unsqueeze(0).expand(tokens.shape[0], -1)
        return tokens.clone(), slots.clone(), places(tokens, lengths).clamp(min=-1)

    inputs = {"tokens": CANVAS, "lengths": ROWS}
    return capture_function("rows_all", function, inputs, ["feed", "slots", "positions"])


def rows_of(name: str) -> Graph:
    """The rows of each sequence's block, or of that and the one before; the canvas's last rows where it ends."""

    def function(
        tokens: Tensor, lengths: Tensor, origin: Tensor, block: Tensor, now: Tensor, span: Tensor
    ) -> tuple[Tensor, ...]:
        before = block if name == "rows_two" else block - block
        rows = torch.cat([span, span + block]) if name == "rows_two" else span
        first = tokens.shape[1] - lengths + origin + now * block - before
        slots = (first.unsqueeze(1) + rows).clamp(min=0)
        slots = torch.minimum(slots, lengths.sum() * 0 + tokens.shape[1] - 1)
        at = (slots - (tokens.shape[1] - lengths).unsqueeze(1)).clamp(min=-1)
        return tokens.gather(1, slots), slots, at

    rows = {n: ROWS for n in ("lengths", "origin", "now")}
    inputs = {"tokens": CANVAS, **rows, "block": SCALAR, "span": Spec(I64, ("W",))}
    return capture_function(name, function, inputs, ["feed", "slots", "positions"])


def spread(vocab: int) -> Graph:
    """The computed rows' logits in their places; the other rows' are not used."""

    def function(tokens: Tensor, slots: Tensor, computed: Tensor) -> Tensor:
        logits = torch.zeros(tokens.shape[0], tokens.shape[1], vocab)
        return logits.scatter(1, slots.unsqueeze(2).expand(-1, -1, vocab), computed.to(F32))

    inputs = {"tokens": CANVAS, "slots": PICKED, "computed": Spec(F32, ("B", "R", vocab))}
    return capture_function("spread", function, inputs, ["logits"])
