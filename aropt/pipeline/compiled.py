"""What `aropt.optimize` and `aropt.load` return: a program, and what it runs on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aropt.ir.executor import Executor
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.loops import runtime
from aropt.pipeline import artifact


@dataclass(frozen=True, eq=False)
class Compiled:
    """A program on a target. `report` is what optimize() measured, `home` the artifact that it was read from."""

    program: Program
    executor: Executor
    report: dict[str, Any] = field(default_factory=dict)
    home: str = ""

    def generate(self, prompts: Any, n: int | None = None, **options: Any) -> list[list[int]]:
        """Up to `n` new token ids for each prompt; see `aropt.loops.runtime.generate` for the options."""
        options = {"executor": self.executor, "home": self.home, **options}
        return runtime.generate(self.program, prompts, n, **options)

    def save(self, path: str, force: bool = False) -> None:
        """Writes the artifact folder; see `aropt.pipeline.artifact.save`."""
        artifact.save(self.program, path, force, self.report, self.executor.folder)

    def __str__(self) -> str:
        return text(self.program)
