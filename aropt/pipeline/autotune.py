"""Passes that pay for some programs and not for others: kept where the model's prompts are generated faster so.

Drafts are right where a text repeats itself, or where a cheaper step guesses what the model itself would write; a round
that checks them costs more than one that does not. So the programs are lowered, and generate what the model's prompts
begin, in turns. Nothing is validated here: what is chosen is validated afterwards like any other passes.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aropt.ir.control import Control, If, calls, transform
from aropt.ir.program import Program
from aropt.ir.units import window
from aropt.loops.given import needs_negative, usual
from aropt.loops.request import workload
from aropt.loops.rules import draws
from aropt.loops.scheme import scheme_of
from aropt.loops.speculate import DRAFTS
from aropt.pipeline.checks import QUIET, Instruments
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.lossy import unpaid
from aropt.pipeline.registry import inserted
from aropt.rewriting.contract import Pass, Skips, planned
from aropt.targets import find_target, lower

PROMPTS, TOKENS = 4, 128  # generated in a turn: of each prompt so many new tokens
TURNS, PATIENCE = 7, 20.0  # turns, fewer where they take longer than so many seconds in all
PAUSE = 0.05  # seconds before each: the threads of the one before wait busily for a while
MARGIN = 1.1  # what a pass must win by, as other texts than these will be written
WITHOUT = "without"
ROWS = (1, 2, 4, 8, 16, 32, 64)
LARGE = 32 * 2**20  # bytes of weights, which take a millisecond or more to read


@dataclass
class Trial:
    """What was found of a pass: `ms` of a turn without it and in each way with it, medians; `kept`: the best way, with
    its options, or nothing; `reason` says why it was left out. Of several passes `name` is that of the best way.
    """

    name: str
    level: str
    kept: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    ids: dict[str, float] = field(default_factory=dict)  # that a round gives, on average
    prompts: int = 0
    tokens: int = 0
    rows: dict[int, float] = field(default_factory=dict)  # milliseconds to the first id after a prompt of so many rows
    left: dict[str, str] = field(default_factory=dict)  # ways that were not timed, and why
    reason: str = ""

    def told(self) -> str:
        """One sentence for people."""
        if not self.ms:
            return f"{self.name} was not tried: {self.reason}."
        best = fastest(self.ms)
        does = f"{self.kept} was kept" if self.kept else f"{best} was left out"
        longer = self.ms[best] / self.ms[WITHOUT] * self.ids[best] / self.ids[WITHOUT]
        return (
            f"{does}: a round gives {self.ids[best]:.2f} ids and takes {longer:.2f} times as long as one without, so "
            f"that the program is {self.ms[WITHOUT] / self.ms[best]:.2f} times as fast with it on "
            f"{self.prompts} prompts and {self.tokens} new tokens each. That depends on the model and the text: "
            f"--prompts FILE tries others, --pass and --no-pass {self.name} decide."
        )


def tried(
    program: Program,
    passes: Sequence[Pass],
    tries: Sequence[Sequence[Pass]],
    target: str,
    threads: int | None = None,
    instruments: Instruments = QUIET,
) -> tuple[list[Pass], list[Trial]]:
    """The passes with what of `tries` pays, one after the other, and what was found of each. See `trial`."""
    passes, found, known = list(passes), list[Trial](), dict[tuple[str, ...], Compiled]()
    for ways in tries:
        passes, one = trial(program, passes, ways, target, threads, instruments, known)
        found.append(one)
    return passes, found


def trial(
    program: Program,
    passes: Sequence[Pass],
    ways: Sequence[Pass],
    target: str,
    threads: int | None = None,
    instruments: Instruments = QUIET,
    known: dict[tuple[str, ...], Compiled] | None = None,
) -> tuple[list[Pass], Trial]:
    """The passes, with the best of `ways`, of which a program takes one, in its place among them if the program is
    faster so; and what was found.

    Lossy passes are applied as they are. Raises UsageError where nothing says what they may lose.
    `known` has what an earlier trial lowered, by its passes, and will have the program that is kept.
    """
    passes, found, known = list(passes), Trial(ways[0].name, ways[0].contract.level), {} if known is None else known
    prompts, tokens = workload(program, PROMPTS, TOKENS)
    others = [p.name for p in passes if DRAFTS in p.contract.establishes and DRAFTS in ways[0].contract.establishes]
    found.reason = f"{others[0]} makes drafts already" if others else unfit(program, target)
    found.reason = found.reason or ("" if tokens > 1 else "no prompt leaves room for an answer")
    if found.reason:
        return passes, found
    drawn, paid = bool(usual(program)), bool(instruments.budget)
    some = half(program, drawn)
    lists, programs, found.left = candidates(some, passes, ways, prompts, target, instruments)
    found.reason = "; ".join(dict.fromkeys(found.left.values()))
    if not programs:
        return passes, found
    plain = known.get(key(passes)) or lowered(applied(some, passes, target, paid)[0], target, threads)
    found.rows = rows_timed(plain, prompts, drawn)
    found.left |= {way: why for one in ways if (way := written(one)) in programs and (why := hopeless(one, found.rows))}
    programs = {way: one for way, one in programs.items() if way not in found.left}
    found.reason = "; ".join(dict.fromkeys(found.left.values()))
    if not programs:
        known[key(passes)] = plain
        return passes, found
    lists[WITHOUT] = passes
    made = {way: known.get(key(lists[way])) or lowered(one, target, threads) for way, one in programs.items()}
    made[WITHOUT] = plain
    found.prompts, found.tokens = len(prompts), tokens
    found.ms = timed(made, prompts, found.tokens, drawn)
    found.ids = {way: ids_of_round(one, prompts, found.tokens, drawn) for way, one in made.items()}
    best = fastest(found.ms)
    found.name, found.kept = best.partition(":")[0], best if found.ms[WITHOUT] > MARGIN * found.ms[best] else ""
    chosen = lists[found.kept or WITHOUT]
    known.clear()
    known[key(chosen)] = made[found.kept or WITHOUT]
    return chosen, found


def key(passes: Sequence[Pass]) -> tuple[str, ...]:
    """What tells programs apart that were made of the same one."""
    return tuple(map(written, passes))


def fastest(ms: dict[str, float]) -> str:
    """The best way with the pass."""
    return min((way for way in ms if way != WITHOUT), key=lambda way: ms[way])


def written(one: Pass) -> str:
    """The pass as --pass takes it, with the options that are not its default ones."""
    fields: Any = dataclasses.fields(one)  # type: ignore[arg-type]
    options = [f"{f.name}={getattr(one, f.name)}" for f in fields if getattr(one, f.name) != f.default]
    return ":".join([one.name, *([",".join(options)] if options else [])])


def source(one: Pass) -> str:
    """What makes the drafts of a pass: the "text", the model it"self", another "model"; "" of a pass without."""
    return str(getattr(one, "source", ""))


def candidates(
    program: Program, passes: Sequence[Pass], ways: Sequence[Pass], prompts: list[list[int]], target: str,
    instruments: Instruments,
) -> tuple[dict[str, list[Pass]], dict[str, Program], dict[str, str]]:  # fmt: skip
    """Of each way that may pay its passes and its program, and why others are left out.

    Of passes with the same source of drafts the first that applies is enough.
    """
    lists, programs, reasons, taken = dict[str, list[Pass]](), dict[str, Program](), dict[str, str](), dict[str, str]()
    for one in ways:
        way, chosen = written(one), inserted(passes, one)
        if taken.get(source(one), one.name) != one.name:
            continue
        if why := unpromising(program, prompts, one):
            reasons[way] = why
            continue
        instruments.say(f"{way}: is it worth it?")
        made, skipped = applied(program, chosen, target, bool(instruments.budget))
        if one.name in skipped:
            reasons[way] = skipped[one.name]
            continue
        lists[way], programs[way], taken[source(one)] = chosen, made, one.name
    return lists, programs, reasons


def unfit(program: Program, target: str) -> str:
    """Why nothing can be learned here; empty if something can."""
    if not find_target(target).has("autotuning"):
        return f"nothing is timed for the target {target}"
    return "" if scheme_of(program).forced else "it is for loops over positions"


def unpromising(program: Program, prompts: list[list[int]], one: Pass) -> str:
    """Why the pass can't pay; empty if it may."""
    if source(one) == "jacobi" and program.meta.get("modality") == "text":
        return "what a text goes on with depends on its latest ids"
    if source(one) in ("self", "jacobi"):
        size = sum(w.nbytes for w in program.weights.values())
        return "" if size > LARGE else f"all weights are {size / 2**20:.0f} MiB, which takes next to no time to read"
    if source(one) != "text":
        return ""
    if program.meta.get("modality") == "image":
        return "an image hardly repeats its ids in order"
    return "" if max(map(len, prompts), default=0) > 1 else "no prompt has two ids: --prompts gives others"


def hopeless(one: Pass, rows: dict[int, float]) -> str:
    """Why the pass can't pay even if all drafts are right, by what rows take; empty if it may or nothing is known."""
    checked, ids = getattr(one, "offers", (1, 1))
    size = max((n for n in rows if n <= checked), default=1)
    longer = rows.get(size, 0.0) / rows.get(1, 1.0)
    if longer * MARGIN < ids or ids < 2:
        return ""
    return f"a round of {size} rows takes {longer:.1f} times as long as one of 1, and gives {ids} ids at most"


def half(program: Program, drawn: bool) -> Program:
    """The program without what draws, or without what does not: half as much to lower."""

    def chosen(node: Control) -> Control:
        if not isinstance(node, If):
            return node
        draw = [any(draws(program.graphs[c.graph]) for c in calls(side)) for side in (node.then, node.orelse)]
        return node if draw[0] == draw[1] else node.then if draw[0] == drawn else node.orelse

    control = transform(program.control, chosen)
    called = {c.graph for c in calls(control)}
    return program.replace(control=control, graphs={n: g for n, g in program.graphs.items() if n in called})


def applied(program: Program, passes: Sequence[Pass], target: str, paid: bool) -> tuple[Program, dict[str, str]]:
    """The program after the passes, with nothing verified, and why some have nothing to do.

    Raises UsageError for a lossy pass, unless it is `paid` for.
    """
    skipped = {}
    for one in passes:
        plan = planned(one, program, find_target(target))
        if isinstance(plan, Skips):
            skipped[one.name] = plan.reason
        elif (plan.level or one.contract.level) == "lossy" and not paid:
            raise unpaid(one)
        else:
            program = one.run(program)
    return program, skipped


def lowered(program: Program, target: str, threads: int | None) -> Compiled:
    """The program as it would run: in calls of several rounds, where it can."""
    return Compiled(program, lower(program, target, threads=threads).multi_step(program))


def ids_of_round(made: Compiled, prompts: list[list[int]], n: int, drawn: bool) -> float:
    """New ids of a round, on average over the answers to the prompts."""
    rounds, ids = [0], 0

    def count(_: Any) -> None:
        rounds[0] += 1

    for prompt in prompts:
        ids += len(made.generate([prompt], n, plain=True, on_round=count, **options_of(made, prompt, drawn))[0])
    return ids / max(1, rounds[0])


def options_of(made: Compiled, prompt: list[int], drawn: bool) -> dict[str, Any]:
    """Besides the prompt."""
    given: dict[str, Any] = {"temperature": 1.0} if drawn else {}
    return {**given, "negative": [prompt]} if needs_negative(made.program) else given


def rows_timed(made: Compiled, prompts: list[list[int]], drawn: bool) -> dict[int, float]:
    """Milliseconds to the first id after so many rows, medians of turns; {} where a row holds several ids."""
    if window(made.program.meta) or not (ids := [token for prompt in prompts for token in prompt]):
        return {}
    sizes = [n for n in ROWS if n < int(made.program.meta["capacity"])]
    texts = {n: [ids[i % len(ids)] for i in range(n)] for n in sizes}
    runs: dict[int, list[float]] = {n: [] for n in sizes}
    for _ in range(1 + TURNS):
        for n, prompt in texts.items():
            for again in (False, True):  # the call before was of another size
                start = time.perf_counter()
                made.generate([prompt], 1, plain=True, **options_of(made, prompt, drawn))
                if again:
                    runs[n].append((time.perf_counter() - start) * 1e3)
    return {n: statistics.median(times[1:]) for n, times in runs.items()}


def timed(ways: dict[str, Compiled], prompts: list[list[int]], n: int, drawn: bool = False) -> dict[str, float]:
    """Milliseconds of a turn, which generates the answer to each prompt by itself: medians, the first turn apart."""
    runs: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    while min(map(len, runs.values())) <= TURNS and (
        min(map(len, runs.values())) < 2 or time.perf_counter() - began < PATIENCE
    ):
        for way, made in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for prompt in prompts:
                made.generate([prompt], n, plain=True, **options_of(made, prompt, drawn))
            runs[way].append((time.perf_counter() - start) * 1e3)
    return {way: statistics.median(times[1:]) for way, times in runs.items()}
