"""One builder of generation loops: what a level says of its rounds becomes a whole program.

    the graphs of the prologue     once each, in their order
    If greedy                      rounds that choose, else rounds that draw; of a level with one rule, its rounds
    the graphs of the epilogue     once each, in their order

A round is the level's own: calls, or loops of levels inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from aropt.ir.control import Control, If, Loop, Seq
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Input, Meta, Program, StateSpec


@dataclass(frozen=True)
class Level:
    """A level of a loop nest, whose rounds run while the value `until` is false.

    `body`: what a round does, from the name of the graph that decides, one of `rules`. `emits`, `params`, `decides` and
    `evidence` are what `Loop` has of these names.
    """

    kind: str
    graphs: Mapping[str, Graph]
    inputs: Mapping[str, Input]
    state: Mapping[str, StateSpec]
    outputs: tuple[str, ...]
    body: Callable[[str], Sequence[Control]]
    rules: tuple[str, ...] = ("greedy", "sample")
    until: str = "finished"
    emits: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    decides: str = ""
    evidence: str = ""

    def rounds(self, rule: str) -> Loop:
        """The loop of rounds that one of the rules decides."""
        body = Seq(tuple(self.body(rule)))
        return Loop(self.kind, self.until, body, dict(self.emits), dict(self.params), self.decides, self.evidence)


def nest(level: Level, weights: dict[str, Tensor], meta: Meta) -> Program:
    """The program of a level: the plain loop, as the model is."""
    before, after = (
        [call_by_name(g) for g in level.graphs.values() if g.role == role] for role in ("prologue", "epilogue")
    )
    rounds = [level.rounds(rule) for rule in level.rules]
    ways: Control = If("greedy", *rounds) if len(rounds) > 1 else rounds[0]
    return Program(
        str(meta.get("name", "program")),
        dict(level.graphs),
        dict(level.inputs),
        dict(level.state),
        Seq((*before, ways, *after)),
        level.outputs,
        weights,
        meta,
    )
