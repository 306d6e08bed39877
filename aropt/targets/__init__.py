"""Targets: what executes a program's graphs. Each is an Executor (see `aropt.interpreter`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from aropt.errors import UsageError
from aropt.interpreter import Executor
from aropt.program import Program

TARGETS = ("eager", "inductor", "onnxruntime")
DEFAULT = "onnxruntime"


def lower(
    program: Program,
    target: str,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    threads: int | None = None,
) -> Executor:
    """An executor for the program. `folder` holds (or receives) the built files, under models/<graph>/<target>/."""
    if target not in TARGETS:
        raise UsageError(what=f"unknown target '{target}'", hint="choose from " + ", ".join(TARGETS))
    module = import_module(f"aropt.targets.{target}")
    executor: Executor = module.build(program, folder, progress, threads)
    return executor
