"""Stepping or one call: the onnxruntime target generates in the way that is faster here.

Stepping calls the step's session once a round and updates caches in place, but the host takes part in each round. One
call runs the exported whole loop (`aropt.exporters.whole_loop`): no host, but ONNX's Loop copies caches from round to
round. Which wins depends on the model and the machine, so both are timed, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.interpreter import Values
from aropt.program import Program
from aropt.runtime import fitted, room

ROUNDS = 5
MARGIN = 1.03  # what one call must win by to be worth its file and its session


def file(folder: Path) -> Path:
    return folder / "models" / "whole" / "onnxruntime" / "model.onnx"


class Whole:
    """The whole loop's session, made at its first call."""

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self.threads = path, threads
        self.session: Any = None
        self.kept: Any = None  # a temporary folder that lives as long as this

    def generate(self, inputs: Values) -> Tensor:
        """The generated rows, int64 [B, N] or [B, N, W], -1 after a sequence's end."""
        from aropt.exporters.run_loop import session

        if self.session is None:
            self.session = session(self.path, self.threads)
        (rows,) = self.session.run(["generated"], {n: v.numpy() for n, v in inputs.items()})
        return torch.from_numpy(rows)


def pick(program: Program, executor: Any, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Builds, checks and times the whole loop; the executor keeps it if it is faster. Returns what was measured.

    Whatever fails, the target steps, and the reason is in the result.
    """
    path = file(executor.folder)
    try:
        found = measured(program, executor, path, say)
    except Exception as error:  # of the exporter or of ONNX Runtime, which has its own kinds
        found = {"picked": "stepping", "reason": (str(error).splitlines() or [type(error).__name__])[0]}
    if found["picked"] == "stepping":
        executor.whole = None
        discard(path)
    return found


def measured(program: Program, executor: Any, path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """What `pick` returns, where nothing fails."""
    from aropt.exporters import run_loop
    from aropt.exporters.whole_loop import export_program

    say("one call: export")
    export_program(program, path, contrib=True, graphs=executor.translated)
    say("one call: compare")
    verify = run_loop.compare(path, program.replace(executor=executor))
    whole = Whole(path, executor.threads)
    prompt = fitted(program, program.meta["prompts"][0])
    n = min(64, room(program, prompt))
    runs: dict[str, list[float]] = {"stepping": [], "one call": []}
    say("one call: time")
    for _ in range(ROUNDS + 1):
        for way, times in runs.items():
            executor.whole = whole if way == "one call" else None
            start = time.perf_counter()
            program.generate([prompt], n, executor=executor)
            times.append((time.perf_counter() - start) * 1e3)
    medians = {way: statistics.median(times[1:]) for way, times in runs.items()}
    better = medians["stepping"] > MARGIN * medians["one call"]
    executor.whole = whole if better else None
    picked = "one call" if better else "stepping"
    return {"verify": verify, "picked": picked, "tokens": n, "n": ROUNDS, "ms": medians}


def discard(path: Path) -> None:
    """Removes the model, its data and its folders."""
    for one in (path, path.with_name(path.name + ".data")):
        one.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
