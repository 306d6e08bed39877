"""Rounds and time of a generation against the window: an image model beside models of its shape with other windows.

A model of windows says by `twin(window)` what it would be with another one. Twins have random weights: the time of a
round does not depend on them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from aropt.loops.request import room
from aropt.pipeline.api import capture, optimize
from aropt.pipeline.checks import Instruments
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.registry import pipeline

MOST = 8  # windows: larger ones leave a handful of rounds


def windows(side: int) -> list[int]:
    """Windows that divide an image, but for the whole of it."""
    return [s for s in range(1, min(MOST, side - 1) + 1) if side % s == 0]


def curve(
    module: nn.Module, done: Compiled, target: str, threads: int, runs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """[{window, rounds, median, p10, p90, n}] of one image each, in milliseconds; windows take turns.

    `done` is the optimized program of `module`; twins go through the default passes and the same target. All step, one
    call a round, also where `done` would run in one call.
    """
    twin: Any = getattr(module, "twin", None)
    meta = done.program.meta
    if twin is None or not meta.get("window"):
        return []
    own, side = int(meta["window"]), int(meta["side"])
    done = replace(done, executor=done.executor.stepping())
    programs = {}
    for window in windows(side):
        say(f"window {window}")
        programs[window] = done if window == own else optimize(
            capture(twin(window), rules=tuple(meta["rules"])), target, pipeline(), check=False, threads=threads,
            instruments=Instruments(check=False),
        )  # fmt: skip
    times = timed(programs, runs)
    return [
        {"window": window, "rounds": (side // window) ** 2, "n": len(found), "median": statistics.median(found),
         "p10": min(found), "p90": max(found)}
        for window, found in times.items()
    ]  # fmt: skip


def timed(programs: dict[int, Compiled], runs: int) -> dict[int, list[float]]:
    """Milliseconds of so many images by each program, in turns; a first one is not counted."""
    times: dict[int, list[float]] = {window: [] for window in programs}
    for run in range(runs + 1):
        for window, made in programs.items():
            program = made.program
            prompt = program.meta["prompts"][0]
            start = time.perf_counter()
            made.generate([prompt], room(program, prompt), temperature=1.0, seed=run, plain=True)
            times[window] += [(time.perf_counter() - start) * 1e3] if run else []
    return times
