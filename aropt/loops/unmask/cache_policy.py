"""Cache policies for canvases: which rows a round computes, against the stored keys and values of the others.

A policy is a function from what a round may look at (`Look`) to bool [B, T], the rows to compute. `cached` turns it and
a plain unmasking program into one that computes those rows alone:

    rows    due -> slots [B, N], the ids and positions there; N is what the fullest sequence of the batch needs
    step    the forward restricted to them (`restrict.rewrite`): it stores their keys and values, and sees all slots
    place   what they predict, in its places on the canvas

Sequences that need fewer rows compute some that nobody sees: they go to slot T, whose position is -1. So each sequence
of a batch has its own schedule, and its tokens are those that it has alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aropt.errors import Unsupported, UsageError
from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, calls, loops, rewrite
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.unmask.ar_verifier import whole
from aropt.loops.unmask.blocks import FAR, block_of, current_block, places
from aropt.restrict.rewrite import Restricted, restrict
from aropt.rewriting.contract import Applies, Contract, Fact, Skips

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
CANVAS, ROWS, SCALAR = Spec(I64, ("B", "T")), Spec(I64, ("B",)), Spec(I64)
PICKED = Spec(I64, ("B", "R"))


@dataclass(frozen=True)
class Look:
    """What a policy may look at.

    [B, T]: `at`, the position of each row counted from the first id; `index`, its block (-1 before the first);
    `offset`, its distance from the first row of the block at hand; `masked` now; `before`, masked in the round before
    (all at first). int64 [B, 1]: `now`, the block at hand; `was`, that of the round before (-1 at first); `step`,
    rounds of this block so far. int64 []: `rounds` so far; `size`, the rows of a block. `fresh`, bool [B, 1]: a block
    begins. `all`: every row that is not padding.
    """

    at: Tensor
    index: Tensor
    offset: Tensor
    masked: Tensor
    before: Tensor
    now: Tensor
    was: Tensor
    step: Tensor
    rounds: Tensor
    size: Tensor

    @property
    def fresh(self) -> Tensor:
        return self.now != self.was

    @property
    def all(self) -> Tensor:
        return self.at >= 0


Policy = Callable[[Look], Tensor]


def full_forward(program: Program) -> Call | None:
    """The call that runs the forward over the whole canvas, in an unmasking loop."""
    found = (c for loop in loops(program.control, "unmask") for c in calls(loop.body))
    return next((c for c in found if c.reads.get("ids") == "tokens"), None)


WHOLE_CANVAS = Fact(
    "a full forward over a canvas",
    lambda p: "" if full_forward(p) else "no loop runs a full forward over a canvas",
)


def all_rows(program: Program) -> str:
    """Why rounds of an unmasking loop do not compute chosen rows alone; "" if they do."""
    if not loops(program.control, "unmask"):
        return "there is no loop over a canvas"
    return "each round runs the forward over the whole canvas" if full_forward(program) else ""


CHOSEN_ROWS = Fact("chosen rows alone", all_rows)
EXACT = Contract(  # of a cache whose rows see nothing that is stale
    "rounding",
    after=("canonicalize", "int8-linears", "dkv-cache", "dual-cache", "free-cache", "prefix-cache", "vicinity"),
    requires=(WHOLE_CANVAS,),
    establishes=(CHOSEN_ROWS,),
)
STALE = Contract(  # of one whose rows see stored ones that would be others by now
    "lossy",
    when="asked",
    after=("canonicalize", "int8-linears"),
    requires=(WHOLE_CANVAS,),
    establishes=(CHOSEN_ROWS,),
    budget=("kl", "kl_max", "top1", "agreement", "quality"),
    refresh=(16, 8, 4, 2),  # 1 would save nothing
)


def restricted(program: Program) -> Restricted:
    """The program's forward for chosen rows. Raises Unsupported."""
    model = full_forward(program)
    assert model is not None
    capacity, never = program.meta["capacity"], program.meta.get("never", ())
    return restrict(program.graphs[model.graph], program.weights, capacity, canvas=True, never=never)


def cached(program: Program, policy: Policy) -> Program:
    """The program with a forward over the policy's rows. Raises Unsupported where the forward can't be restricted."""
    model, found = full_forward(program), restricted(program)
    assert model is not None
    shift = bool(program.meta.get("shift"))
    again = "remask" in program.meta.get("rules", ())
    parts = [rows(policy, program.meta["mask"], shift, again), place(shift), replace(found.graph, name="step")]
    dropped = {model.graph, "every_row", "align"}
    graphs = {n: g for n, g in program.graphs.items() if n not in dropped} | {g.name: g for g in parts}
    moved = {*dropped, "blend"}

    def change(call: Call) -> list[Control]:
        if call.graph == model.graph:
            step = graphs["step"]
            reads = {n: n for n in step.inputs} | {"ids": "feed"}
            before = [call_by_name(graphs[n]) for n in ("rows", "blend") if n in graphs]  # a blend is of these rows
            return [*before, Call("step", reads, {n: n for n in step.outputs})]
        if "picked" in call.writes and call.graph not in dropped:
            return [replace(call, writes={o: o for o in call.writes}), call_by_name(graphs["place"])]
        return [] if call.graph in moved else [call]

    return program.replace(
        graphs=graphs,
        state={
            **program.state,
            **{n: sized(s) for n, s in found.state.items()},
            "earlier": StateSpec("tokens", CANVAS, -1),
        },
        control=rewrite(program.control, change),
        weights={**program.weights, **found.constants},
        meta={**program.meta, "ragged": not whole(program.control), "masks": found.facts["masks"]},
    )


def sized(state: StateSpec) -> StateSpec:
    """A canvas has one slot an id, and one for what nobody sees."""
    return replace(state, spec=replace(state.spec, dims=tuple("T+1" if d == "S" else d for d in state.spec.dims)))


def rows(policy: Policy, mask: int, shift: bool, again: bool) -> Graph:
    """The rows that the policy wants, and in any case those that predict the masks of the block at hand, or what were
    masks once (`again`: the rule looks at what it has written).
    """

    def function(tokens: Tensor, origin: Tensor, block: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        canvas = values.pop("canvas", None)
        active, look = seen(mask, tokens, origin=origin, block=block, **values)
        needed = active
        if canvas is not None:
            needed = (block_of(look.at, origin, block) == look.now) & (canvas == mask)
        due = policy(look) | needed
        if shift:  # the row before a mask predicts it
            length = tokens.shape[1]
            due = due | (needed.index_select(1, (torch.arange(length) + 1).clamp(max=length - 1)))
        slots = torch.ops.aropt.due_slots(due & look.all & (look.now < FAR))
        inside = slots.clamp(max=tokens.shape[1] - 1)
        positions = torch.where(slots < tokens.shape[1], look.at.gather(1, inside), -1)
        return tokens.gather(1, inside), slots, positions, tokens.clone()

    ones = {n: ROWS for n in ("lengths", "origin", "cursor", "step")}
    inputs = {"tokens": CANVAS, "earlier": CANVAS, **ones, "block": SCALAR, "rounds": SCALAR}
    inputs |= {"canvas": CANVAS} if again else {}
    return capture_function("rows", function, dict(inputs), ["feed", "slots", "positions", "earlier"])


def seen(
    mask: int,
    tokens: Tensor,
    earlier: Tensor,
    lengths: Tensor,
    origin: Tensor,
    block: Tensor,
    cursor: Tensor,
    step: Tensor,
    rounds: Tensor,
) -> tuple[Tensor, Look]:
    """The masked rows of the block at hand, and what a policy may look at."""
    at = places(tokens, lengths)
    active, now = current_block(tokens, lengths, origin, block, mask)
    now, was = now.unsqueeze(1), cursor.unsqueeze(1)
    offset = at - origin.unsqueeze(1)
    index = torch.where(offset < 0, -1, torch.div(offset.clamp(min=0), block, rounding_mode="floor"))
    so_far = torch.where(now != was, 0, step.unsqueeze(1))
    before = ((earlier == mask) | (earlier < 0)) & (at >= 0)
    masked = (tokens == mask) & (at >= 0)
    return active, Look(at, index, offset - now * block, masked, before, now, was, so_far, rounds, block)


def place(shift: bool) -> Graph:
    """What the computed rows predict, in its places; elsewhere nothing is sure."""

    def function(tokens: Tensor, slots: Tensor, picked: Tensor, sure: Tensor) -> tuple[Tensor, ...]:
        batch, length = tokens.shape
        to = (slots + int(shift)).clamp(max=length)
        candidate = torch.zeros(batch, length + 1, dtype=I64).scatter(1, to, picked)
        confidence = torch.full((batch, length + 1), -torch.inf).scatter(1, to, sure)
        return candidate[:, :-1], confidence[:, :-1]

    inputs: dict[str, Any] = {"tokens": CANVAS, "slots": PICKED, "picked": PICKED, "sure": Spec(F32, ("B", "R"))}
    return capture_function("place", function, inputs, ["candidate", "confidence"])


def exact_by_mask(program: Program) -> str:
    """Why the model's mask does not keep blocks from seeing later ones; empty if it does. Raises Unsupported."""
    block = int(program.meta.get("block") or 0)
    if not block:
        return "the model has no blocks of its own: its rows see the whole canvas"
    reach = restricted(program).facts["reach"]
    late = next((i for i, far in enumerate(reach) if far >= (i // block + 1) * block), None)
    return "" if late is None else f"row {late} sees row {reach[late]}, which is in a later block of {block}"


def plan_cache(program: Program, schedule: str, by_mask: bool, lossy: bool = True) -> Applies | Skips:
    """The plan of a cache. `by_mask`: its schedule is exact where the model's mask is causal over blocks.

    `lossy`: it may be used elsewhere too, as a lossy one.
    """
    model = full_forward(program)
    assert model is not None  # WHOLE_CANVAS
    try:
        why = exact_by_mask(program)
    except Unsupported as error:
        return Skips(str(error))
    if why and not lossy:
        return Skips(why)
    return Applies((f"{model.graph}: {schedule}",), level="rounding" if by_mask and not why else "")


def refreshed(policy: Policy, refresh: int) -> Policy:
    """The policy with all rows in every `refresh`-th round, counted from the first (0: never)."""
    return (lambda look: policy(look) | (look.all & (look.rounds % refresh == 0))) if refresh else policy


def check_least(name: str, **options: tuple[int, int]) -> None:
    """Raises UsageError for an option below its least value: {option: (value, least)}."""
    for option, (value, least) in options.items():
        if value < least:
            raise UsageError(
                what=f"{name}:{option}={value} would never compute some rows" if least else f"{name}:{option}={value}",
                why=f"it is {least} or more",
                hint=f"leave it out, or give {option}={max(least, 1)}",
            )
