"""Passes that pay for some texts and not for others: kept where a program is faster with them on its own prompts.

Drafts are right where a text repeats itself, and a round that checks them costs more than one that does not. So both
programs are lowered, and generate what the model's prompts begin, in turns. Nothing is validated here: what is chosen
is validated afterwards like any other passes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from aropt.errors import Unsupported
from aropt.passbase import Pass, Skips
from aropt.passmanager import PASSES, Instruments, unpaid
from aropt.program import Control, If, Program, Seq, calls
from aropt.runtime import workload

PROMPTS, TOKENS = 4, 128  # generated in a turn: of each prompt so many new tokens
TURNS, PATIENCE = 7, 20.0  # turns, fewer where they take longer than so many seconds in all
PAUSE = 0.05  # seconds before each: the threads of the one before wait busily for a while
QUIET = Instruments()
MARGIN = 1.1  # what a pass must win by, as other texts than these will be written


@dataclass
class Trial:
    """What was found of one pass: `ms` of a turn without and with it, medians; `reason` says why it was left out."""

    name: str
    kept: bool = False
    ms: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    tokens: int = 0
    reason: str = ""

    def told(self) -> str:
        """One sentence for people."""
        if not self.ms:
            return f"{self.name} was not tried: {self.reason}."
        does = "was kept" if self.kept else "was left out"
        return (
            f"{self.name} {does}: the program is {self.ms['without'] / self.ms['with']:.2f} times as fast with it on "
            f"{self.prompts} prompts and {self.tokens} new tokens each. That depends on the text: --prompts FILE tries "
            f"others, --pass and --no-pass {self.name} decide."
        )


def trial(
    program: Program,
    passes: Sequence[Pass],
    one: Pass,
    target: str,
    threads: int | None = None,
    instruments: Instruments = QUIET,
) -> tuple[list[Pass], Trial]:
    """The passes, with `one` in its place among them if the program is faster so; and what was found.

    Lossy passes are applied as they are. Raises UsageError where nothing says what they may lose.
    """
    passes, found = list(passes), Trial(one.name)
    prompts, tokens = workload(program, PROMPTS, TOKENS)
    found.reason = unfit(program, target, prompts) or ("" if tokens > 1 else "no prompt leaves room for an answer")
    if found.reason:
        return passes, found
    instruments.say(f"{one.name}: is it worth it?")
    places = list(PASSES)
    longer = sorted([*passes, one], key=lambda p: places.index(p.name))
    with TemporaryDirectory(prefix="aropt-") as folder:
        ways: dict[str, Program] = {}
        for way, chosen in (("with", longer), ("without", passes)):
            made, skipped = applied(greedy(program), chosen, target, bool(instruments.budget))
            if way == "with" and one.name in skipped:
                found.reason = skipped[one.name]
                return passes, found
            ways[way] = lowered(made, target, Path(folder) / way, threads)
        found.prompts, found.tokens = len(prompts), tokens
        found.ms = timed(ways, prompts, found.tokens)
    found.kept = found.ms["without"] > MARGIN * found.ms["with"]
    return (longer if found.kept else passes), found


def unfit(program: Program, target: str, prompts: list[list[int]]) -> str:
    """Why nothing can be learned here; empty if something can."""
    if target != "onnxruntime":
        return f"nothing is timed for the target {target}"
    if program.meta.get("modality") == "image":
        return "an image hardly repeats its ids in order"
    if program.meta.get("loop", "positions") != "positions":
        return "it is for loops over positions"
    if max(map(len, prompts), default=0) < 2:
        return "no prompt has two ids: --prompts gives others"
    return ""


def greedy(program: Program) -> Program:
    """The program without what draws: half as much to lower."""

    def chosen(control: Control) -> Control:
        match control:
            case If("greedy", then, _):
                return then
            case Seq(body):
                return Seq(tuple(chosen(part) for part in body))
            case _:
                return control

    control = chosen(program.control)
    called = {c.graph for c in calls(control)}
    return program.replace(control=control, graphs={n: g for n, g in program.graphs.items() if n in called})


def applied(program: Program, passes: Sequence[Pass], target: str, paid: bool) -> tuple[Program, dict[str, str]]:
    """The program after the passes, with nothing verified, and why some have nothing to do.

    Raises UsageError for a lossy pass, unless it is `paid` for.
    """
    skipped = {}
    for one in passes:
        plan = one.plan(program, target)
        if isinstance(plan, Skips):
            skipped[one.name] = plan.reason
        elif (plan.level or one.contract.level) == "lossy" and not paid:
            raise unpaid(one)
        else:
            program = one.run(program)
    return program, skipped


def lowered(program: Program, target: str, folder: Path, threads: int | None) -> Program:
    """The program as it would run: in calls of several rounds, where it can."""
    from aropt.targets import lower, rounds

    executor = lower(program, target, folder, threads=threads)
    with suppress(Unsupported):  # then it steps, as it would without this trial
        executor.rounds = rounds.build(program, executor)  # type: ignore[attr-defined]
    return program.replace(executor=executor)


def timed(ways: dict[str, Program], prompts: list[list[int]], n: int) -> dict[str, float]:
    """Milliseconds of a turn, which generates the answer to each prompt by itself: medians, the first turn apart."""
    runs: dict[str, list[float]] = {way: [] for way in ways}
    began = time.perf_counter()
    while len(runs["with"]) <= TURNS and (len(runs["with"]) < 2 or time.perf_counter() - began < PATIENCE):
        for way, program in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for prompt in prompts:
                program.generate([prompt], n)
            runs[way].append((time.perf_counter() - start) * 1e3)
    return {way: statistics.median(times[1:]) for way, times in runs.items()}
