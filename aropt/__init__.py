"""aropt: an optimizing compiler for generation loops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aropt.ir.program import Program
    from aropt.loops.runtime import generate
    from aropt.pipeline.api import capture, optimize
    from aropt.pipeline.compiled import Compiled
    from aropt.pipeline.reading import load
    from aropt.targets.ort.threads import own_process

__version__ = "0.1.0"
__all__ = ["Compiled", "Program", "capture", "generate", "load", "optimize", "own_process"]

_HOMES = {
    "capture": "aropt.pipeline.api", "optimize": "aropt.pipeline.api", "load": "aropt.pipeline.reading",
    "Program": "aropt.ir.program", "Compiled": "aropt.pipeline.compiled", "generate": "aropt.loops.runtime",
    "own_process": "aropt.targets.ort.threads",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Public names, imported when first used: `import aropt` alone does not import torch."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'aropt' has no attribute '{name}'")
