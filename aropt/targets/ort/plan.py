"""How an executor generates: a call a round, several rounds a call, or the whole loop in one call."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aropt.ir.executor import Executor, Way
from aropt.targets.ort.files import file
from aropt.targets.scratch import Scratch

SINGLE_CALL = "whole"  # the folder below models/ of the model that is a whole loop


@dataclass(frozen=True)
class Plan:
    """Models to generate with besides those of single rounds. Of two ways the single call is taken."""

    multi_step: Mapping[str, Path] = field(default_factory=dict)  # of several rounds, by graph
    single_call: Path | None = None
    kept: Scratch | None = field(default=None, compare=False)  # a temporary folder of theirs, which lives as long

    @property
    def way(self) -> Way:
        return "single-call" if self.single_call else "multi-step" if self.multi_step else "stepping"


class Planned(Executor):
    """An executor with a plan, and what planning asks of it."""

    folder: Path
    threads: int
    plan: Plan
    aliases: Mapping[str, dict[str, str]]
    ran = ""  # the graph of the last loop

    def with_plan(self, plan: Plan) -> Planned:
        """The same with another plan, and sessions of its own."""
        raise NotImplementedError

    def translated(self, graph: str) -> Any:
        """A graph's ONNX model as it was built for its session, or None."""
        raise NotImplementedError


def found(folder: Path, graphs: Collection[str]) -> Plan:
    """The plan that an artifact holds the models of."""
    rounds = {graph: sorted(file(folder, graph).parent.glob("rounds-*.onnx")) for graph in graphs}
    whole = file(folder, SINGLE_CALL)
    return Plan({graph: paths[0] for graph, paths in rounds.items() if paths}, whole if whole.exists() else None)
