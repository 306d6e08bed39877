"""Targets: what executes a program's graphs. Each is an Executor (see `aropt.ir.interpreter`)."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from aropt.errors import UsageError

if TYPE_CHECKING:  # the command line's help imports this package, and not torch
    from aropt.ir.interpreter import Executor
    from aropt.ir.program import Program

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
    check_target(target)
    module = import_module(f"aropt.targets.{target}")
    executor: Executor = module.build(program, folder, progress, threads)
    return executor


def check_target(target: str) -> None:
    """Raises UsageError for a target that there is not."""
    if target not in TARGETS:
        raise UsageError(what=f"unknown target '{target}'", where="--target", hint="choose from " + ", ".join(TARGETS))
