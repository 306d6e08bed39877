"""Targets: what executes a program's graphs.

A target is a file here, named as the target, with `TARGET` (what it can do) and `build` (an executor of a program, see
`aropt.ir.interpreter`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

from aropt.errors import UsageError

if TYPE_CHECKING:  # the command line's help imports this package, and not torch
    from aropt.ir.executor import Executor
    from aropt.ir.program import Program
    from aropt.rewriting.target import Target

SUPPORT = ("scratch",)  # modules here that are no targets
TARGETS = tuple(sorted(m.name for m in iter_modules(__path__) if not m.ispkg and m.name not in SUPPORT))
DEFAULT = "onnxruntime"


def lower(
    program: Program,
    target: str,
    folder: Path | None = None,
    progress: Callable[[str], None] = lambda _: None,
    threads: int | None = None,
    read: bool = False,
) -> Executor:
    """An executor for the program. `folder` holds (or receives) the built files, under models/<graph>/<target>/.

    `read`: the folder is an artifact, in which nothing is written.
    """
    check_target(target)
    module = import_module(f"aropt.targets.{target}")
    executor: Executor = module.build(program, folder, progress, threads, read)
    return executor


def find_target(name: str) -> Target:
    """The target of a name. Raises UsageError for one that there is not."""
    check_target(name)
    found: Target = import_module(f"aropt.targets.{name}").TARGET
    return found


def check_target(target: str) -> None:
    """Raises UsageError for a target that there is not."""
    if target not in TARGETS:
        raise UsageError(what=f"unknown target '{target}'", where="--target", hint="choose from " + ", ".join(TARGETS))
