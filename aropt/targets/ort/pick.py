"""Stepping, several rounds a call, or one call: the onnxruntime target generates in the way that is faster here.

Stepping calls the step's session once a round and updates caches in place, but the host takes part in each round. A
session of several rounds (`aropt.targets.ort.multi_step`) shares a call's cost among them. One call runs the exported
whole loop (`aropt.exporters.whole_loop`): no host, but ONNX's Loop copies caches from round to round. Which wins
depends on the model and the machine, so all are timed, in turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aropt.ir.executor import Executor
from aropt.ir.program import Program
from aropt.loops.request import example, room
from aropt.loops.runtime import generate
from aropt.targets.ort import multi_step, single_call
from aropt.targets.ort.files import file
from aropt.targets.ort.plan import SINGLE_CALL, Plan, Planned

ROUNDS = 15
PAUSE = 0.05  # seconds before each run: the threads of the one before wait busily for a while
MARGIN = 1.03  # what another way than stepping must win by to be worth its files and its session
LONGER = 4  # times as many tokens, in which one call must win too
STEPPING, ONE_CALL, SEVERAL = "stepping", "one call", f"{multi_step.ROUNDS} rounds a call"


def pick(
    program: Program, executor: Planned, say: Callable[[str], None] = lambda _: None
) -> tuple[Planned, dict[str, Any]]:
    """Builds, checks and times other ways than stepping. Returns the executor in the fastest, and what was measured.

    A way that can't be had is left out, and why is in the result.
    """
    stepping = executor.with_plan(Plan())
    ways: dict[str, Planned] = {STEPPING: stepping}
    verify, reasons = {}, []
    prompt, n = example(program, 64)
    for way, make in ((SEVERAL, several), (ONE_CALL, one_call)):
        say(f"{way}: export and compare")
        try:
            made, verify[way] = make(program, stepping)
            timed(program, {way: made}, [prompt], n, 1)
        except Exception as error:  # of the exporter or of ONNX Runtime, which has its own kinds
            reasons.append(f"{way}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        else:
            ways[way] = made
    say("time " + ", ".join(ways))
    ms = timed(program, ways, [prompt], n)
    picked = fastest(ms)
    if picked == ONE_CALL:  # it copies caches, and of longer answers these are larger
        n = min(LONGER * n, room(program, prompt))
        ms = timed(program, ways, [prompt], n)
        picked = fastest(ms)
    plan = Plan(faster(program, ways, prompt, n)) if picked == SEVERAL else ways[picked].plan
    multi_step.clean(executor.folder, plan.multi_step)
    if picked != ONE_CALL:
        single_call.discard(file(executor.folder, SINGLE_CALL))
    found: dict[str, Any] = {"picked": picked, "verify": verify, "tokens": n, "n": ROUNDS, "ms": ms}
    found |= {"reason": "; ".join(reasons), "graphs": sorted(plan.multi_step)}
    return executor.with_plan(plan), found


def fastest(ms: Mapping[str, float]) -> str:
    """The way to take."""
    return min(ms, key=lambda way: ms[way] * (1.0 if way == STEPPING else MARGIN))


def several(program: Program, stepping: Planned) -> tuple[Planned, dict[str, Any]]:
    """An executor of several rounds a call, and what comparing it found."""
    executor = stepping.with_plan(Plan(multi_step.build(program, stepping)))
    return executor, multi_step.compare(program, stepping, executor)


def one_call(program: Program, stepping: Planned) -> tuple[Planned, dict[str, Any]]:
    """An executor of the whole loop, and what comparing it found."""
    path = file(stepping.folder, SINGLE_CALL)
    verify = single_call.build(program, stepping, path)
    return stepping.with_plan(Plan(single_call=path)), verify


def timed(
    program: Program,
    ways: Mapping[str, Executor],
    prompts: list[list[int]],
    n: int,
    turns: int = ROUNDS,
    /,
    **params: Any,
) -> dict[str, float]:
    """Milliseconds of a generation in each way, in turns: lower quartiles, as what disturbs a run only adds to it."""
    if "negative" in program.inputs and program.meta.get("null") is None:
        params["negative"] = prompts
    runs: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(turns + 1):
        for way, executor in ways.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            generate(program, prompts, n, executor=executor, plain=True, **params)
            runs[way].append((time.perf_counter() - start) * 1e3)
    return {way: float(np.quantile(times[1:], 0.25)) for way, times in runs.items()}


def faster(program: Program, ways: Mapping[str, Planned], prompt: list[int], n: int) -> dict[str, Path]:
    """The models of several rounds that are faster: those for drawing and for prompts of several lengths may not be."""
    executor = ways[SEVERAL]
    kept, first = dict(executor.plan.multi_step), executor.ran
    for prompts in ([prompt], [prompt, prompt[1:] or prompt]):
        for params in (dict[str, Any](), {"temperature": 0.9}):
            ms = timed(program, {way: ways[way] for way in (STEPPING, SEVERAL)}, prompts, n, ROUNDS, **params)
            if executor.ran != first and ms[STEPPING] <= MARGIN * ms[SEVERAL]:
                kept.pop(executor.ran, None)
    return kept
