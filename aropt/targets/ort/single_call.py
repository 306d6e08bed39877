"""The whole loop in one call: the model that `aropt.exporters.whole_loop` writes, as the onnxruntime target runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.ir.executor import Values
from aropt.ir.interpreter import most_rounds
from aropt.ir.program import Program
from aropt.targets.ort import run_loop
from aropt.targets.ort.plan import Planned


class SingleCall:
    """The whole loop's session, made at its first call."""

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self.threads = path, threads
        self.session: Any = None

    def generate(self, inputs: Values) -> Tensor:
        """The generated rows, int64 [B, N] or [B, N, W], -1 after a sequence's end."""
        if self.session is None:
            self.session = run_loop.session(self.path, self.threads)
        values = {**inputs, "chunk": torch.tensor(most_rounds(inputs))}
        (rows,) = self.session.run(["generated"], {n: v.numpy() for n, v in values.items()})
        return torch.from_numpy(rows)


def build(program: Program, stepping: Planned, path: Path) -> dict[str, Any]:
    """Writes the model to `path`, and returns what comparing it with stepping found."""
    from aropt.exporters.whole_loop import export_program

    export_program(program, path, contrib=True, graphs=stepping.translated)
    return run_loop.compare(path, program, stepping)


def discard(path: Path) -> None:
    """Removes the model, its data and its folders."""
    for one in (path, path.with_name(path.name + ".data")):
        one.unlink(missing_ok=True)
    for folder in (path.parent, path.parent.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
