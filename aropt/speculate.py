"""Rounds that check drafts: what of a draft counts, and what the next draft is (see `aropt.passes.ngram_draft`).

    open      alone: whether there is one sequence          opened   the prompt's round has run
    recall    the prompt and the first id as history, and the first draft
    every     the logits of all rows                        accept   which rows count; the next draft
    resume    what a plain round reads                      together the ids of all rounds, in order

There is one sequence, B = 1. All values have the same sizes in every round: `window` int64 [B, J] holds a round's new
ids, -1 after them; `history` int64 [B, C] the latest C ids, the newest first, -1 after them. A round is short, so the
number of nodes counts: a first row that does not hold is found by `argmin`, not by sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aropt.program import Graph, Spec
from aropt.trace import capture_function

BOOL, F32, I32, I64 = torch.bool, torch.float32, torch.int32, torch.int64
SCALAR, ROWS = Spec(I64), Spec(I64, ("B",))
LATEST = 1024  # ids in which drafts are looked for
COUNTERS = {True: ("last", "total"), False: ("filled",)}  # of a step with slots of its own (dense), or given ones
TYPES = {"last": Spec(I32, ("B",)), "total": Spec(I32), "filled": SCALAR}


def graphs(drafts: int, vocab: int, capacity: int, dense: bool) -> list[Graph]:
    """The graphs of a loop with drafts."""
    rows, size = drafts + 1, max(8, min(capacity, LATEST))
    counters = {n: TYPES[n] for n in COUNTERS[dense]}
    drafted, history = Spec(I64, ("B", rows)), Spec(I64, ("B", size))

    def recall(
        prompt: Tensor, feed: Tensor, count: Tensor, limit: Tensor, finished: Tensor, history: Tensor, **counts: Tensor
    ) -> tuple[Tensor, ...]:
        places = prompt.shape[1] - 1 - torch.arange(size)
        given = torch.where(places >= 0, prompt.index_select(1, places.clamp(min=0)), -1)
        known = torch.where(history[:, :1] >= 0, history, given)  # after a pause: without the ids of plain rounds
        history = torch.cat([feed[:, -1:], known[:, :-1]], 1)
        return following(history), history, finished | (limit - count <= drafts), *moved(counts, drafts)

    def accept(
        picks: Tensor, drafted: Tensor, done: Tensor, count: Tensor, limit: Tensor, stop: Tensor, history: Tensor,
        **counts: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own = picks.reshape(-1, rows)
        stops = (own.unsqueeze(2) == stop).any(2)
        goes_on = (torch.cat([drafted[:, 1:], torch.full_like(own[:, :1], -1)], 1) == own) & ~stops
        # the last row that counts: the draft after it is wrong, or the text ends with it
        taken = goes_on.to(F32).argmin(1).amin(0)
        window = torch.where(torch.arange(rows) > taken, -1, own)
        ended, count = done | stops.index_select(1, taken.reshape(1)).any(1), count + taken + 1
        finished = ended.all() | (count >= limit)
        history = torch.cat([own.flip(1), history], 1).index_select(1, torch.arange(size) + (drafts - taken))
        settled = finished | (limit - count <= drafts)
        by = taken if dense else taken - drafts  # beyond what the step counted: one row, or all
        return window, following(history), ended, count, finished, settled, history, *moved(counts, by)

    def following(history: Tensor) -> Tensor:
        """The newest id [B, 1] and what followed the latest place most like this one: [B, rows]."""
        places = [(history[:, 1 + i : size - 2 + i] == history[:, i : i + 1], 4.0 / 2**i) for i in range(3)]
        first, second, third = [torch.where(alike, worth, 0.0) for alike, worth in places]
        start = (first + second + third).argmax(1, keepdim=True)
        back = start - torch.arange(drafts) % (start + 1)  # a text that repeats itself goes on doing so
        return torch.cat([history[:, :1], history.gather(1, back).clamp(min=0)], 1)

    def moved(counts: dict[str, Tensor], by: Any) -> list[Tensor]:
        return [(value + by).to(value.dtype) for value in counts.values()]

    def resume(drafted: Tensor, **counts: Tensor) -> tuple[Tensor, ...]:
        return drafted[:, :1].clone(), *(moved(counts, -drafts if dense else 0))

    def together(first: Tensor, windows: Tensor, rest: Tensor) -> Tensor:
        ids = torch.cat([first, windows.flatten(1), rest], 1)
        there = ids >= 0
        places = torch.where(there, there.to(I64).cumsum(1) - 1, ids.shape[1])
        return torch.full((ids.shape[0], ids.shape[1] + 1), -1).scatter(1, places, ids)[:, :-1]

    back = {"recall": counters if dense else {}, "resume": counters if dense else {}}
    states = {"limit": SCALAR, "history": history, "count": SCALAR}
    return [
        capture_function(
            "open", lambda finished, begun, lengths: (begun | finished, torch.ones_like(lengths).sum() == 1),
            {"finished": Spec(BOOL), "begun": Spec(BOOL), "lengths": ROWS}, ["begun", "alone"],
        ),
        capture_function("opened", lambda count: count > 0, {"count": SCALAR}, ["begun"]),
        capture_function(
            "recall", recall,
            {"prompt": Spec(I64, ("B", "P")), "feed": Spec(I64, ("B", "R")), "finished": Spec(BOOL), **states,
             **back["recall"]},
            ["drafted", "history", "settled", *back["recall"]],
        ),
        capture_function(
            "every", lambda logits: logits.to(F32).flatten(0, 1), {"logits": Spec(F32, ("B", "R", vocab))}, ["row"]
        ),
        capture_function(
            "accept", accept,
            {"picks": Spec(I64, (f"{rows}*B",)), "drafted": drafted, "done": Spec(BOOL, ("B",)),
             "stop": Spec(I64, ("K",)), **states, **counters},
            ["window", "drafted", "done", "count", "finished", "settled", "history", *counters],
        ),
        capture_function(
            "resume", resume, {"drafted": drafted, **back["resume"]}, ["feed", *back["resume"]]
        ),
        capture_function(
            "together", together,
            {"first": Spec(I64, ("B", "F")), "windows": Spec(I64, ("B", "W", rows)), "rest": Spec(I64, ("B", "L"))},
            ["generated"],
        ),
    ]  # fmt: skip
