"""Rounds that check drafts: what of a draft counts, and what the next draft is (see `aropt.passes.ngram_draft`).

    open      alone: whether there is one sequence          opened   the prompt's round has run
    recall    the prompt and the first id as history, and the first draft
    every     the logits of all rows                        accept   which rows count; the next draft
    resume    what a plain round reads                      together the ids of all rounds, in order

All values have the same sizes in every round: `window` int64 [B, J] holds a round's new ids, -1 after them; `history`
int64 [B, C] the latest C ids, each at its place modulo C.
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
        feed = feed[:, -1:]
        known = count + prompt.shape[1]  # again after a pause: of the ids in between only the last is remembered
        end = prompt.shape[1] - 1
        latest = end - (end - torch.arange(size)) % size  # the last row of the prompt that has this place
        history = torch.where(latest >= 0, prompt.index_select(1, latest.clamp(min=0)), history)
        history = history.scatter(1, ((known - 1) % size).expand(feed.shape), feed)
        settled = finished | (limit - count <= drafts)
        return following(history, known, feed), history, known, settled, *moved(counts, drafts)

    def accept(
        picks: Tensor, drafted: Tensor, done: Tensor, count: Tensor, limit: Tensor, stop: Tensor, history: Tensor,
        known: Tensor, **counts: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        own = picks.reshape(-1, rows)
        wrong = ((drafted[:, 1:] != own[:, :-1]) & ~done.unsqueeze(1)).to(I64).cumsum(1)
        taken = (wrong == 0).to(I64).sum(1).amin(0)
        places = torch.arange(rows)
        ends = (own.unsqueeze(2) == stop).any(2) & (places <= taken)
        before = ends.to(I64).cumsum(1) - ends.to(I64) > 0
        window = torch.where(done.unsqueeze(1) | before | (places > taken), -1, own)
        ended, count, after = done | ends.any(1), count + taken + 1, known + taken + 1
        finished = ended.all() | (count >= limit)
        history = history.scatter(1, ((known + places) % size).expand(window.shape), window)
        drafts_next = following(history, after, own.index_select(1, taken.reshape(1)))
        by = taken if dense else taken - drafts  # beyond what the step counted: one row, or all
        settled = finished | (limit - count <= drafts)
        return window, drafts_next, ended, count, finished, settled, history, after, *moved(counts, by)

    def following(history: Tensor, known: Tensor, newest: Tensor) -> Tensor:
        """The newest id [B, 1] and what followed the latest place like this one: [B, rows]."""
        before = history.index_select(1, (known - 2 - torch.arange(2)) % size)
        found = (history[:, 2:-1] == newest).to(F32) * 4 + (history[:, 1:-2] == before[:, :1]).to(F32) * 2
        found = found + (history[:, :-3] == before[:, 1:]).to(F32)
        found = torch.where(history[:, 3:] >= 0, found, -1.0) * size + torch.arange(size - 3)
        start = found.argmax(1, keepdim=True) + 3
        length = ((known - start) % size).clamp(min=1)  # a text that repeats itself goes on doing so
        guess = history.gather(1, (start + torch.arange(drafts) % length) % size)
        return torch.cat([newest, guess.clamp(min=0)], 1)

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
            ["drafted", "history", "known", "settled", *back["recall"]],
        ),
        capture_function(
            "every", lambda logits: logits.to(F32).flatten(0, 1), {"logits": Spec(F32, ("B", "R", vocab))}, ["row"]
        ),
        capture_function(
            "accept", accept,
            {"picks": Spec(I64, (f"{rows}*B",)), "drafted": drafted, "done": Spec(BOOL, ("B",)),
             "stop": Spec(I64, ("K",)), "known": SCALAR, **states, **counters},
            ["window", "drafted", "done", "count", "finished", "settled", "history", "known", *counters],
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
