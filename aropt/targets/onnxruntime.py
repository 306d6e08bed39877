"""The onnxruntime target: one session a graph, state bound to it and updated in place (see `aropt.targets.ort`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from aropt.errors import MissingTool, Unsupported
from aropt.ir.executor import Executor
from aropt.ir.program import Program
from aropt.rewriting.target import Target
from aropt.targets.ort import files, plan
from aropt.targets.ort.executor import OnnxRuntime
from aropt.targets.ort.files import file
from aropt.targets.ort.graphs import hot_graphs
from aropt.targets.scratch import Scratch

ABLE = ("autotuning", "grouped-query-attention", "int8-drafts", "int8-weights", "multi-head-attention")
TARGET = Target("onnxruntime", "ONNX Runtime", frozenset(ABLE))


def build(
    program: Program, folder: Path | None, progress: Callable[[str], None], threads: int | None, read: bool
) -> Executor:
    """Exports the graphs that are missing in `folder` (a temporary one by default), or reads an artifact's."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingTool(
            what="ONNX Runtime is not installed", why=str(error), hint="pip install 'aropt[onnx]'"
        ) from error
    kept = None
    if folder is None:
        kept = Scratch()
        folder = Path(kept.name)
    hot = hot_graphs(program)
    if read:
        files.check(program, folder)
    for name in [*hot, *(g for g in program.graphs if g not in hot)]:
        if read and name in hot and not file(folder, name).exists():
            files.refuse(file(folder, name), "it is missing")
        if not read and not file(folder, name).exists():
            from aropt.exporters.onnx import export

            progress(f"export {name}")
            try:
                export(program.graphs[name], program.weights, file(folder, name), contrib=True)
            except Unsupported:
                if name in hot:  # others run eagerly
                    raise
    return OnnxRuntime(program, folder, threads, plan.found(folder, hot), kept)
