"""Generates with a program in the reference interpreter, or with a compiled one on its target: tests mix them."""

from __future__ import annotations

from typing import Any

from aropt.loops import runtime


def generate(made: Any, prompts: Any, n: int | None = None, **options: Any) -> list[list[int]]:
    """New token ids for each prompt; options as of `aropt.loops.runtime.generate`."""
    if hasattr(made, "program"):
        return made.generate(prompts, n, **options)
    return runtime.generate(made, prompts, n, **options)
