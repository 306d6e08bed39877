"""Generates with a program in the reference interpreter, or with a compiled one on its target."""

from __future__ import annotations

from typing import Any

from aropt.ir.program import Program
from aropt.loops import runtime
from aropt.loops.request import parse
from aropt.pipeline.compiled import Compiled
from aropt.targets.ort import run_loop


def generate(made: Program | Compiled, prompts: Any, n: int | None = None, **options: Any) -> list[list[int]]:
    """New token ids for each prompt; options as of `aropt.loops.runtime.generate`."""
    if isinstance(made, Compiled):
        return made.generate(prompts, n, **options)
    return runtime.generate(made, prompts, n, **options)


def from_session(
    session: Any, program: Program, prompts: Any, n: int | None = None, *, chunk: int | None = None, **options: Any
) -> list[list[int]]:
    """The same of a whole loop that was exported, in an onnxruntime session; `chunk`: rounds of one call."""
    known = ("seed", "stop", "negative", "fill", "streams", "plain")
    given = {k: options.pop(k) for k in known if k in options}
    return run_loop.answer(session, program, parse(program, prompts, n, options, **given), chunk)
