"""Rounds that check drafts: what of a draft counts, and what comes next (see the passes ngram-draft and int8-draft).

    open      alone: whether there is one sequence          opened    the prompt's round has run
    recall    the prompt and the first id as history, and the first draft from it
    begin     the first id, and where a model's own drafts start
    note      a drafted row joins the draft                 spread    the rows of a round: the newest and its drafts
    spots     what the rule reads for each of them          rewind    slots of drafts are to be written again
    every     the logits of all rows                        accept    which rows count; what the next round reads
    resume    what a plain round reads                      together  the rows of all rounds, in order

There is one sequence, B = 1; a row is an id, or a window of W (`row`, see ir/units.py). All values have the same sizes
in every round: `window` int64 [B, J, (W)] holds a round's new rows, -1 after them; `history` int64 [B, C] the latest C
ids, the newest first, -1 after them. A round is short, so the number of nodes counts: a first row that does not hold is
found by `argmin`, not by sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, loops, sequence, transform
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec
from aropt.rewriting.contract import Fact

BOOL, F32, I32, I64 = torch.bool, torch.float32, torch.int32, torch.int64
SCALAR, ROWS = Spec(I64), Spec(I64, ("B",))
LATEST = 1024  # ids in which drafts are looked for
COUNTERS = {True: ("last", "total"), False: ("filled",)}  # of a step with slots of its own (dense), or given ones
TYPES = {"last": Spec(I32, ("B",)), "total": Spec(I32), "filled": SCALAR}


@dataclass(frozen=True)
class Draft:
    """What the graphs are for: `drafts` rows beside the newest, a step with COUNTERS[dense], rows of axes `row`."""

    drafts: int
    vocab: int
    dense: bool
    row: tuple[int, ...] = ()
    flat: bool = True  # rows of all sequences, or branches of guidance; else those of the one sequence by its index

    @property
    def rows(self) -> int:
        return self.drafts + 1

    @property
    def drafted(self) -> Spec:
        """The newest row and the drafts after it."""
        return Spec(I64, ("B", self.rows, *self.row))

    @property
    def counters(self) -> dict[str, Spec]:
        return {n: TYPES[n] for n in COUNTERS[self.dense]}

    def shared(self) -> list[Graph]:
        """The graphs that do not depend on where drafts come from."""
        logits = Spec(F32, ("B", "R", *self.row, self.vocab))
        return [
            capture_function(
                "open", lambda finished, begun, lengths: (begun | finished, torch.ones_like(lengths).sum() == 1),
                {"finished": Spec(BOOL), "begun": Spec(BOOL), "lengths": ROWS}, ["begun", "alone"],
                "prologue",
            ),
            capture_function("opened", lambda count: count > 0, {"count": SCALAR}, ["begun"]),
            capture_function(
                "every", lambda logits: logits.to(F32).flatten(0, 1) if self.flat else logits.to(F32).select(0, 0),
                {"logits": logits}, ["row"],
            ),
        ]  # fmt: skip

    def checked(self, own: Tensor, drafted: Tensor, count: Tensor, stop: Tensor) -> tuple[Tensor, ...]:
        """Of what a round picked and read, [B, rows, (W)]: the last row that counts; the rows with -1 for what does
        not; whether they end the text; the new count.
        """
        hits = (own.unsqueeze(-1) == stop).any(-1)
        wrong = torch.cat([drafted[:, 1:], torch.full_like(own[:, :1], -1)], 1) != own
        stops, wrong = (hits.any(2), wrong.any(2)) if self.row else (hits, wrong)
        # the last row that counts: the draft after it is wrong, or the text ends with it
        taken = (~(stops | wrong)).to(F32).argmin(1).amin(0)
        beyond = torch.arange(self.rows) > taken
        if self.row:  # nor does what a window holds after a stop token
            beyond = beyond.reshape(1, -1, 1) | (hits.to(I64).cumsum(2) - hits.to(I64) > 0)
        ended, count = stops.index_select(1, taken.reshape(1)).any(1), count + taken + 1
        return taken, torch.where(beyond, -1, own), ended, count


def together(**rounds: Tensor) -> Tensor:
    """The rows of all rounds, those that don't count at the end, as -1."""
    parts = [part.flatten(1, 2) if name == "windows" else part for name, part in rounds.items()]
    rows = torch.cat(parts, 1)
    there = (rows[:, :, 0] if rows.dim() == 3 else rows) >= 0
    places = torch.where(there, there.to(I64).cumsum(1) - 1, rows.shape[1])
    places = places.unsqueeze(2).expand_as(rows) if rows.dim() == 3 else places
    empty = torch.full((rows.shape[0], rows.shape[1] + 1, *rows.shape[2:]), -1)
    return empty.scatter(1, places, rows)[:, :-1]


def moved(counts: dict[str, Tensor], by: Any) -> list[Tensor]:
    return [(value + by).to(value.dtype) for value in counts.values()]


def from_text(made: Draft, capacity: int) -> list[Graph]:
    """The graphs of a loop whose drafts are what followed the latest ids where they stood before."""
    drafts, rows, size = made.drafts, made.rows, max(8, min(capacity, LATEST))
    counters, history = made.counters, Spec(I64, ("B", size))

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
        taken, window, ended, count = made.checked(own, drafted, count, stop)
        done = done | ended
        finished = done.all() | (count >= limit)
        history = torch.cat([own.flip(1), history], 1).index_select(1, torch.arange(size) + (drafts - taken))
        by = taken if made.dense else taken - drafts  # beyond what the step counted: one row, or all
        settled = finished | (limit - count <= drafts)
        return window, following(history), done, count, finished, settled, history, *moved(counts, by)

    def following(history: Tensor) -> Tensor:
        """The newest id [B, 1] and what followed the latest place most like this one: [B, rows]."""
        places = [(history[:, 1 + i : size - 2 + i] == history[:, i : i + 1], 4.0 / 2**i) for i in range(3)]
        first, second, third = [torch.where(alike, worth, 0.0) for alike, worth in places]
        start = (first + second + third).argmax(1, keepdim=True)
        back = start - torch.arange(drafts) % (start + 1)  # a text that repeats itself goes on doing so
        return torch.cat([history[:, :1], history.gather(1, back).clamp(min=0)], 1)

    def resume(drafted: Tensor, **counts: Tensor) -> tuple[Tensor, ...]:
        return drafted[:, :1].clone(), *(moved(counts, -drafts if made.dense else 0))

    back = counters if made.dense else {}
    states = {"limit": SCALAR, "history": history, "count": SCALAR}
    return [
        *made.shared(),
        capture_function(
            "recall", recall,
            {"prompt": Spec(I64, ("B", "P")), "feed": Spec(I64, ("B", "R")), "finished": Spec(BOOL), **states, **back},
            ["drafted", "history", "settled", *back], "prologue",
        ),
        capture_function(
            "accept", accept,
            {"picks": Spec(I64, (f"{rows}*B",)), "drafted": made.drafted, "done": Spec(BOOL, ("B",)),
             "stop": Spec(I64, ("K",)), **states, **counters},
            ["window", "drafted", "done", "count", "finished", "settled", "history", *counters], "commit",
        ),
        capture_function("resume", resume, {"drafted": made.drafted, **back}, ["feed", *back], "epilogue"),
        capture_function(
            "together", together,
            {"first": Spec(I64, ("B", "F")), "windows": Spec(I64, ("B", "W", rows)), "rest": Spec(I64, ("B", "L"))},
            ["generated"], "epilogue",
        ),
    ]  # fmt: skip


def from_model(made: Draft, feed: Spec) -> list[Graph]:
    """The graphs of a loop whose drafts a cheaper step makes, one after the other; `feed`: what a round reads.

    `drafted` [B, rows, (W)] moves to the left by a row with each draft, so that it ends with the newest row and
    what was drafted after it. `ahead` counts new rows and drafts, `want` is how many drafts this round has: fewer
    before the end.
    """
    drafts, rows, row = made.drafts, made.rows, made.row
    wide = 1 if feed.dims[0] == "B" else 2  # both branches of guidance
    read = Spec(I64, (feed.dims[0], "R", *row))
    counters = {n: Spec(s.dtype, feed.dims[: len(s.dims)]) for n, s in made.counters.items()}  # of as many sequences

    def fed(newest: Tensor) -> Tensor:
        return torch.cat([newest, newest]) if wide > 1 else newest.clone()

    def again(newest: Tensor, count: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        """What the next drafts begin with: drafted, ahead, want, ready."""
        want = (limit - count - 1).clamp(0, drafts)
        return newest.repeat(1, rows, *(1 for _ in row)), count + 0, want, want <= 0

    def begin(feed: Tensor, count: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        return again(feed[: feed.shape[0] // wide, -1:], count, limit)

    def note(token: Tensor, drafted: Tensor, ahead: Tensor, count: Tensor, want: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([drafted[:, 1:], token.unsqueeze(1)], 1), ahead + 1, ahead + 1 - count >= want

    def spread(drafted: Tensor, want: Tensor) -> Tensor:
        due = (torch.arange(rows) >= drafts - want).unsqueeze(0).expand(drafted.shape[0], -1)
        slots = torch.ops.aropt.due_slots(due)
        return fed(drafted.gather(1, slots.unsqueeze(2).expand(-1, -1, *row) if row else slots))

    def spots(fed: Tensor, streams: Tensor, lengths: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        places = (lengths + count).unsqueeze(1) + torch.arange(fed.shape[1])
        found = streams.unsqueeze(1).expand_as(places), places
        return tuple(x.flatten() if made.flat else x.select(0, 0).clone() for x in found)

    def whole(part: Tensor) -> Tensor:
        """The rows of a round, -1 where it has fewer."""
        return torch.cat([part, torch.full((part.shape[0], rows, *row), -1)], 1)[:, :rows]

    def accept(
        picks: Tensor, fed: Tensor, want: Tensor, done: Tensor, count: Tensor, limit: Tensor, stop: Tensor,
        **counts: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        batch = fed.shape[0] // wide
        own = whole(picks.unsqueeze(0)).expand(batch, -1, *row)
        taken, window, ended, count = made.checked(own, whole(fed[:batch]), count, stop)
        newest, done = own.index_select(1, taken.reshape(1)), done | ended
        finished, back = done.all() | (count >= limit), moved(counts, taken - want)
        feed = torch.cat([newest, newest]) if wide > 1 else newest.clone()
        return window, *again(newest, count, limit), feed, done, count, finished, *back

    states = {"limit": SCALAR, "count": SCALAR}
    ahead = ["drafted", "ahead", "want", "ready"]
    graphs = [
        *made.shared(),
        capture_function("begin", begin, {"feed": read, **states}, ahead, "prologue"),
        capture_function(
            "note", note,
            {"token": Spec(I64, ("B", *row)), "drafted": made.drafted, "ahead": SCALAR, "count": SCALAR,
             "want": SCALAR},
            ["drafted", "ahead", "ready"], "commit",
        ),
        capture_function(
            "spread", spread, {"drafted": made.drafted, "want": SCALAR}, ["fed"],
        ),
        capture_function(
            "spots", spots, {"fed": read, "streams": ROWS, "lengths": ROWS, "count": SCALAR},
            ["row_streams", "places"],
        ),
        capture_function(
            "accept", accept,
            {"picks": Spec(I64, ("N", *row)), "fed": read, "want": SCALAR, "done": Spec(BOOL, ("B",)),
             "stop": Spec(I64, ("K",)), **states, **counters},
            ["window", *ahead, "feed", "done", "count", "finished", *counters], "commit",
        ),
        capture_function(
            "together", together,
            {"first": Spec(I64, ("B", "F", *row)), "windows": Spec(I64, ("B", "W", rows, *row))}, ["generated"],
            "epilogue",
        ),
    ]  # fmt: skip
    if not made.dense:  # rows go to given slots, those of the drafts again
        graphs.append(capture_function(
            "rewind", lambda want, **counts: tuple(moved(counts, -want)), {"want": SCALAR, **counters}, list(counters)
        ))  # fmt: skip
    return graphs


def checks_drafts(control: Control) -> bool:
    """Whether some rounds check drafts: they run for one sequence alone."""
    return bool(loops(control, "speculate"))


DRAFTS = Fact("drafts", lambda p: "" if checks_drafts(p.control) else "no round checks drafts")


def kept(program: Program) -> str:
    """Which state does not take rejected rows back; "" if all does."""
    found = [name for name, state in program.state.items() if not state.rewinds]
    return f"rejected rows can't be taken back of recurrent state ({', '.join(found)})" if found else ""


REWINDS = Fact("state that takes rejected rows back", kept)
NO_DRAFTS = Fact("no drafts", lambda p: "rounds check drafts already" if checks_drafts(p.control) else "")


def checking(until: str, body: Control, plain: Loop, evidence: str = "", at: str = "") -> Loop:
    """Rounds that check drafts, in the place of those of a plain loop."""
    evidence = evidence or plain.evidence
    return Loop("speculate", until, body, {"window": "windows"}, plain.params, "window", evidence, at=at)


def sketching(until: str, body: Control) -> Loop:
    """Rounds that make drafts, one after the other; nobody watches them."""
    return Loop("draft", until, body, {}, {"limit": "ahead"}, internal=True)


@dataclass(frozen=True)
class Rounds:
    """A loop over positions whose rounds are calls of one cached step and one rule, and what these calls do."""

    loop: Loop
    before: tuple[Call, ...]  # where the step's rows go
    step: Call
    last: Call  # the evidence of what it gives
    rule: Call
    commit: Call

    def needed(self) -> list[Call]:
        """The calls that what is decided depends on, through earlier rounds too, but for the commit."""
        body, values = [c for c in calls(self.loop.body) if c != self.commit], {self.loop.decides}
        while True:
            found = [c for c in body if values & set(c.writes.values())]
            more = values.union(*(c.reads.values() for c in found))
            if more == values:
                return found
            values = more


def rounds_of(loop: Loop, graphs: Mapping[str, Graph]) -> Rounds | None:
    """The loop's rounds, if they are such ones."""
    body = [part for part in sequence(loop.body) if isinstance(part, Call)]
    of_role = {role: [c for c in body if graphs[c.graph].role == role] for role in ("forward", "rule", "commit")}
    last = [c for c in body if loop.evidence in c.writes.values()]
    if len(body) != len(sequence(loop.body)) or any(len(found) != 1 for found in (*of_role.values(), last)):
        return None
    (step,), (rule,), (commit,) = of_role.values()
    return Rounds(loop, tuple(body[: body.index(step)]), step, last[0], rule, commit)


def checkable(program: Program) -> list[Rounds]:
    """The loops that may check drafts: those of even batches, where ragged ones have loops of their own."""
    found = [made for loop in loops(program.control, "positions") if (made := rounds_of(loop, program.graphs))]
    return [made for made in found if dense(program.graphs[made.step.graph])] or found


def dense(step: Graph) -> bool:
    """Whether the step has slots of its own."""
    return set(COUNTERS[True]) <= set(step.inputs)


def varies(program: Program, rule: Call) -> list[str]:
    """What of its inputs makes a rule another one for the rows after the next."""
    return sorted(set(rule.reads.values()) & set(program.state))


def beside(
    control: Control,
    made: dict[str, Graph],
    wanted: Sequence[Rounds],
    drafting: Callable[[Loop, Rounds, dict[str, Graph]], Seq],
) -> Control:
    """Each loop that is wanted as it was, for several sequences, and with drafts for one.

    That is the prompt's round, and `drafting` of the loop.
    """

    def visit(node: Control) -> Control:
        found = next((one for one in wanted if one.loop == node), None)
        if found is None:
            return node
        plain = replace(found.loop, body=Seq((*sequence(found.loop.body), call_by_name(made["opened"]))))
        (emitted,) = plain.emits
        prompt = replace(plain, until="begun", emits={emitted: "first"})
        alone = Seq((prompt, *drafting(plain, found, made).body, call_by_name(made["together"])))
        return Seq((call_by_name(made["open"]), If("alone", alone, plain)))

    return transform(control, visit)
