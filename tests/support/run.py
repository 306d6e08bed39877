"""Generates with a program in the reference interpreter, or with a compiled one on its target."""

from __future__ import annotations

from typing import Any

from aropt.ir.program import Program
from aropt.loops import runtime
from aropt.pipeline.compiled import Compiled


def generate(made: Program | Compiled, prompts: Any, n: int | None = None, **options: Any) -> list[list[int]]:
    """New token ids for each prompt; options as of `aropt.loops.runtime.generate`."""
    if isinstance(made, Compiled):
        return made.generate(prompts, n, **options)
    return runtime.generate(made, prompts, n, **options)
