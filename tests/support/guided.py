"""Guided programs: passes that must apply, prompts and parameters, and how often forwards run."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from aropt.ir.executor import Values
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.pipeline.registry import make
from aropt.rewriting.contract import Skips, planned
from tests.conftest import VOCAB
from tests.support.run import generate
from tests.support.targets import ORT

RULES = ("repetition-penalty", "temperature", "top-k")
Prompts = list[list[int]]
PROMPTS = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), min_size=1, max_size=3)
PARAMS = st.fixed_dictionaries(
    {
        "guidance": st.floats(1, 8, width=32),
        "temperature": st.sampled_from([0.0, 1.0]),
        "seed": st.integers(0, 2**40),
        "repetition_penalty": st.sampled_from([1.0, 1.7]),
    }
)


def passed(program: Program, *names: str) -> Program:
    """The program after these passes, each of which must apply."""
    for name in names:
        one = make(name)
        assert not isinstance(plan := planned(one, program, ORT), Skips), plan
        program = one.run(program)
    return program


FUSED = ("kv-cache", "fuse-sampler", "prune")


class Counted(Eager):
    """Counts the sequences that each forward ran on, and its rows."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.forwards: list[tuple[int, int]] = []

    def call(self, graph: str, inputs: Values) -> Values:
        if "ids" in inputs:
            self.forwards.append((inputs["ids"].shape[0], inputs["ids"].shape[1]))
        return super().call(graph, inputs)


def counted(program: Program, prompts: Prompts, n: int, **options: Any) -> list[tuple[int, int]]:
    executor = Counted(program)
    generate(program, prompts, n, executor=executor, **options)
    return executor.forwards
