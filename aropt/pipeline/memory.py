"""What a program takes in memory: weights, the state of one sequence by kind, and the values that a round leaves."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from aropt.ir.executor import Executor
from aropt.ir.program import Program
from aropt.loops import runtime
from aropt.loops.request import workload
from aropt.pipeline.schema import Memory

TOKENS = 32  # new ids of the answer in which values are counted: enough for drafts that count and for ones that don't


def memory(program: Program) -> Memory:
    """The bytes that the program declares, for one sequence with all rows of the capacity."""
    sizes = defaultdict(lambda: 1, S=int(program.meta["capacity"]))  # one of whatever else a loop counts
    state: dict[str, int] = {}
    for one in program.state.values():
        state[one.kind] = state.get(one.kind, 0) + one.nbytes(sizes)
    return Memory(weights=sum(w.nbytes for w in program.weights.values()), state=state)


def measured(program: Program, executor: Executor) -> dict[str, int]:
    """The most bytes of values after a round of an answer to the model's first prompt; {} if it has none."""
    prompts, tokens = workload(program, 1, TOKENS)
    peak = 0

    def count(values: dict[str, Tensor]) -> None:
        nonlocal peak
        held = {v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in values.values()}
        peak = max(peak, sum(held.values()))

    if not prompts or tokens < 1:
        return {}
    runtime.generate(program, prompts, tokens, executor=executor, on_round=count, plain=True)
    return {"peak": peak, "tokens": tokens}
