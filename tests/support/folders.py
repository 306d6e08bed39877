"""Folders as commands leave them, small enough to compare."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aropt.pipeline import store
from aropt.pipeline.manifest import write_manifest


def make(folder: Path, text: str = "one") -> Path:
    """A folder as aropt writes it."""
    (folder / "models" / "step").mkdir(parents=True)
    (folder / "models" / "step" / "model.onnx").write_text(text)
    (folder / "README.md").write_text("how to use it")
    write_manifest(folder)
    return folder


def written(out: Path, text: str, force: bool = False, during: Callable[[], object] = lambda: None) -> None:
    with store.staged_export(out, force) as folder:
        (folder / "model.onnx").write_text(text)
        during()


def holds(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in sorted(folder.rglob("*")) if f.is_file()}
