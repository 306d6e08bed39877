"""Unmasking, for those who do not know it: what its rounds decide are canvases, and masked rows are what counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.control import Loop
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Meta, Program
from aropt.loops.guards import FOREVER, I64, Guard, apart, first, outside
from aropt.loops.runtime import padded
from aropt.loops.scheme import Look, Mismatch, Prompts, Round, Scheme
from aropt.loops.unmask.blocks import current_block
from aropt.loops.unmask.build import unmasking
from aropt.loops.unmask.cases import Canvases
from aropt.loops.unmask.commit import chosen

GIVE_MASK = "give it: --mask ID, or mask= in Python"


class Unmask(Scheme):
    """Rounds decide a canvas, from logits of some of its rows."""

    kind, requests = "unmask", Canvases
    masked, fills, least = True, True, 1

    def claims(self, meta: Mapping[str, Any]) -> bool:
        return meta.get("mask") is not None

    def check_model(self, meta: Mapping[str, Any]) -> None:
        mask = meta.get("mask")
        if mask is None:
            why = "unmasking starts from a canvas of masks"
            raise UsageError(what="the model has no mask id", why=why, hint=GIVE_MASK)
        if not 0 <= int(mask) < int(meta["vocab"]):
            why = f"the logits have {meta['vocab']} tokens"
            raise UsageError(what=f"the mask id {mask} is outside the vocabulary", why=why, hint=GIVE_MASK)

    def check_rules(self, rules: Sequence[str] | None, guided: bool) -> None:
        chosen(tuple(rules or ()))

    def build(
        self, model: Graph, weights: dict[str, Tensor], meta: Meta, rules: Sequence[str] | None, guide: Any
    ) -> Program:
        return unmasking(model, weights, meta, tuple(rules or ()), guide)

    def hidden(self, meta: Mapping[str, Any]) -> set[int]:
        return {int(meta["mask"])}

    def rows(self, inputs: Values) -> int:
        return inputs["canvas"].shape[1]

    def inputs(
        self, program: Program, prompts: Prompts, n: int, params: Mapping[str, Any], fill: Prompts | None
    ) -> Values:
        return canvas_inputs(program, prompts, n, params, fill)

    def guard(self, program: Program) -> Guard:
        """Canvases begin nowhere if nothing may be generated."""
        meta = program.meta
        capacity, ragged, own = meta["capacity"], meta.get("ragged"), meta.get("block")

        def check(canvas: Tensor, block: Tensor, seed: Tensor, finished: Tensor, **rows: Tensor) -> tuple[Tensor, ...]:
            lengths, answers, width = rows["lengths"], rows["answers"], torch.zeros((), dtype=I64) + canvas.shape[1]
            wrong = ((answers < 1) | (answers >= lengths) | (lengths > width)).any()
            blocks = block < 1
            if own:
                blocks = blocks | (block != own) | (rows["origin"] != 0).any()
            status = first([width > capacity, wrong, outside(seed), *apart(lengths, canvas, ragged), blocks])
            return status, finished | (status != 0), torch.where(status != 0, FOREVER, answers)

        reads = ["canvas", "block", "seed", "finished", "lengths", "answers", "origin"]
        return Guard(check, reads, ["status", "finished", "answers"])

    def observe(self, program: Program, inputs: Values) -> Look:
        sizes, width, last = inputs["lengths"].tolist(), inputs["canvas"].shape[1], inputs["canvas"]

        def look(loop: Loop, values: Values) -> list[list[Round]]:
            nonlocal last
            canvas, seen, found = values[loop.shown].clone(), values[loop.evidence], []
            for j, size in enumerate(sizes):
                pad = width - size
                slots = values["slots"][j] if "slots" in values else torch.arange(width)
                real = (slots >= pad) & (slots < width)
                evidence, rows = seen[j][real].clone(), slots[real] - pad
                found.append([Round(loop.decides, canvas[j, pad:], evidence, rows, last[j, pad:])])
            last = canvas
            return found

        return look

    def most_rounds(self, inputs: Values) -> int:
        return int(inputs["lengths"].max())

    def foreseen(self, program: Program, inputs: Values, rounds: Sequence[Round]) -> list[Tensor]:
        return [one.before for one in rounds]

    def compared(self, program: Program, inputs: Values, round: Round, number: int) -> tuple[Any, Tensor]:
        mask, shift = numbers(program)
        rows = round.rows
        if "slots" in inputs:
            if not torch.equal(inputs["slots"][0], rows):
                theirs = inputs["slots"][0].tolist()
                raise Mismatch(f"round {number} computes rows {rows.tolist()}, the schedule says {theirs}")
            rows = torch.arange(len(rows))
        predicted = (round.rows + shift).clamp(max=len(round.before) - 1)
        masked = round.before[predicted] == mask
        return (0, rows[masked]), masked

    def overrule(self, program: Program, results: Values, output: str, round: Round) -> Values:
        finished = ~(round.decided == numbers(program)[0]).any()
        return {**results, output: round.decided[None], "finished": finished}

    def nudged(self, program: Program, evidence: Tensor, round: Round, decided: Tensor, by: float) -> list[Tensor]:
        mask, shift = numbers(program)
        computed = round.rows if evidence.shape[1] == len(round.rows) else torch.arange(evidence.shape[1])
        at = {int(row): i for i, row in enumerate(computed)}
        mine, nudged = evidence.clone(), evidence.clone()
        mine[0, [at[int(row)] for row in round.rows]] = round.evidence.to(evidence.dtype)
        for row in (round.decided != decided).nonzero().flatten().tolist():
            source, token = at.get(max(row - shift, 0)), int(round.decided[row])
            if source is None:  # not computed, so filled after a stop token
                continue
            if token != mask:
                nudged[0, source, token] += by
            else:
                nudged[0, source, nudged[0, source].argmax()] -= by
        return [mine, nudged]

    def counting(self, program: Program, inputs: Values, round: Round, evidence: Tensor) -> Tensor:
        """Those that predict the masks of the block at hand."""
        mask, shift = numbers(program)
        active, _ = current_block(round.before[None], inputs["lengths"], inputs["origin"], inputs["block"], mask)
        at = {int(row): i for i, row in enumerate(round.rows)}
        return evidence[[at[max(row - shift, 0)] for row in active[0].nonzero().flatten().tolist()]]

    def idle(self, round: Round) -> bool:
        return torch.equal(round.before, round.decided)


def numbers(program: Program) -> tuple[int, int]:
    """The mask id, and how many rows before it a row predicts an id."""
    return program.meta["mask"], int(program.meta.get("shift") or 0)


def canvas_inputs(
    program: Program,
    prompts: Prompts,
    n: int,
    params: Mapping[str, Any],
    fill: Prompts | None,
) -> Values:
    """Prompts and masked answers as one canvas, and the grid of blocks. Raises UsageError where they don't fit.

    A model with blocks of its own has them counted from the first id, others from the first id of the answer.
    """
    mask, own = program.meta["mask"], int(program.meta.get("block") or 0)
    fill = [[mask] * n] * len(prompts) if fill is None else fill
    for i, prompt in enumerate(prompts):
        if mask in prompt:
            raise UsageError(
                what=f"the prompt holds the mask id {mask}",
                where=f"prompt {i}",
                why="ids of a prompt are given; masks belong to the answer",
                hint="give them as fill=, with the mask id where an id is to be found",
            )
    block = int(params.get("block", own or program.inputs["block"].default or 1))
    if block < 1 or (own and block != own) or ("block" in params and not own and n % block):
        raise UsageError(
            what=f"blocks of {block} don't divide the {n} new tokens" if not own else f"blocks are of {own} ids here",
            why="a schedule counts rounds by whole blocks" if not own else "the model was trained on them",
            hint="choose a block that divides the number of new tokens" if not own else "leave block out",
        )
    values: Values = {
        "canvas": padded([[*p, *f] for p, f in zip(prompts, fill, strict=True)]),
        "lengths": torch.tensor([len(p) + n for p in prompts]),
        "answers": torch.tensor([len(p) for p in prompts]),
        "origin": torch.tensor([0 if own else len(p) for p in prompts]),
        "block": torch.tensor(block),
    }
    if "steps" in program.inputs:
        steps = int(params.get("steps", 0))
        values["steps"] = torch.tensor(steps if own else share(steps, -(-n // block)))
    return values


def share(steps: int, blocks: int) -> int:
    """Rounds of each block, of `steps` in all. Raises UsageError where they can't be shared out evenly."""
    if steps % blocks:
        raise UsageError(
            what=f"{steps} steps are not a whole number for each of {blocks} blocks",
            where="parameter steps: rounds in all (of a model with blocks of its own: rounds of each block)",
            why="every block gets the same number of rounds, at least one",
            hint=f"choose a multiple of {blocks}, or another block",
        )
    return steps // blocks


SCHEME = Unmask()
