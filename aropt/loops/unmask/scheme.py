"""Unmasking, for those who do not know it: what its rounds decide are canvases, and masked rows are what counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aropt.ir.control import Loop
from aropt.ir.executor import Values
from aropt.ir.program import Program
from aropt.loops.scheme import Look, Mismatch, Round, Scheme


class Unmask(Scheme):
    """Rounds decide a canvas, from logits of some of its rows."""

    kind = "unmask"

    def observe(self, program: Program, inputs: Values) -> Look:
        sizes, width, last = inputs["lengths"].tolist(), inputs["canvas"].shape[1], inputs["canvas"]

        def look(loop: Loop, values: Values) -> list[Round]:
            nonlocal last
            canvas, seen, found = values[loop.shown].clone(), values[loop.evidence], []
            for j, size in enumerate(sizes):
                pad = width - size
                slots = values["slots"][j] if "slots" in values else torch.arange(width)
                real = (slots >= pad) & (slots < width)
                evidence, rows = seen[j][real].clone(), slots[real] - pad
                found.append(Round(loop.decides, canvas[j, pad:], evidence, rows, last[j, pad:]))
            last = canvas
            return found

        return look

    def most_rounds(self, inputs: Values) -> int:
        return int(inputs["lengths"].max())

    def foreseen(self, program: Program, rounds: Sequence[Round]) -> Tensor:
        return torch.stack([one.before for one in rounds])

    def compared(self, program: Program, inputs: Values, round: Round, number: int) -> tuple[Tensor, Tensor]:
        mask, shift = numbers(program)
        rows = round.rows
        if "slots" in inputs:
            if not torch.equal(inputs["slots"][0], rows):
                theirs = inputs["slots"][0].tolist()
                raise Mismatch(f"round {number} computes rows {rows.tolist()}, the schedule says {theirs}")
            rows = torch.arange(len(rows))
        predicted = (round.rows + shift).clamp(max=len(round.before) - 1)
        masked = round.before[predicted] == mask
        return rows[masked], masked

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

    def idle(self, round: Round) -> bool:
        return torch.equal(round.before, round.decided)


def numbers(program: Program) -> tuple[int, int]:
    """The mask id, and how many rows before it a row predicts an id."""
    return int(program.meta["mask"]), int(program.meta.get("shift") or 0)


SCHEME = Unmask()
