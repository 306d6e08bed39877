"""Validation: does a program generate what its reference generates? (design section 7)

The rounds of the one are held against the other's (see `aropt.validate.replay`), case by case. A failing case is shrunk
before it is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from aropt.errors import AroptError, UsageError
from aropt.ir.control import Call, Control, calls, drawn, loops, rewrite
from aropt.ir.edit import expose
from aropt.ir.executor import Executor
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.loops.requests.cases import Case, cases
from aropt.loops.scheme import Mismatch
from aropt.validate import draws
from aropt.validate.localize import localize
from aropt.validate.oracle import Oracle
from aropt.validate.replay import Trace, compare_rounds
from aropt.validate.shrink import shrink
from aropt.validate.slices import whole
from aropt.validate.stops import with_stops
from aropt.validate.verdict import TOLERANCE, Outcome, Verdict

__all__ = [
    "TOLERANCE", "Case", "Mismatch", "Oracle", "Outcome", "Trace", "Verdict", "cases", "compare", "fails", "shrink",
    "validate", "with_probe", "with_stops",
]  # fmt: skip


def validate(
    reference: Program | Oracle,
    candidate: Program,
    executor: Executor | None = None,
    chosen: Sequence[Case] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    explain: bool = True,
) -> Verdict:
    """Compares the candidate (with its probe, see `with_probe`) against the reference, up to the first case that fails.

    `explain`: the failing case is shrunk, and the first op to differ is looked for.
    """
    oracle = reference if isinstance(reference, Oracle) else Oracle(reference)
    executor, verdict = executor or Eager(candidate), Verdict()
    given, vocab = whole(oracle.requests, candidate) if chosen is None else chosen, oracle.program.meta["vocab"]
    for case in with_stops(given, verdict, oracle.answers, vocab):
        progress(case.name)
        outcome = compare(oracle, candidate, executor, case)
        verdict.outcomes.append(outcome)
        if outcome.problem and explain:
            small = shrink(lambda c: fails(oracle, candidate, executor, c), case)
            verdict.outcomes[-1] = outcome = compare(oracle, candidate, executor, small)
            verdict.diverges = localize(oracle, candidate, executor, small, outcome.row)
        if outcome.problem:
            break
    if verdict.passed and "distribution" in drawn(candidate.control):
        progress("draws")
        outcome, found = draws.compared(oracle, candidate, executor)
        verdict.outcomes.append(outcome)
        verdict.draws = found.metrics() if found else {}
    oracle.rest()
    return verdict


def fails(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> bool:
    """Whether a case that was made smaller fails; one that the program can't take (blocks, steps) does not."""
    try:
        return not compare(oracle, candidate, executor, case).passed
    except UsageError:
        return False


def compare(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> Outcome:
    """Runs one case on both and measures. A candidate that raises an error has failed."""
    outcome = Outcome(case)
    try:
        compare_rounds(oracle, candidate, executor, outcome)
    except Mismatch as mismatch:
        outcome.problem = str(mismatch)
    except AroptError:
        raise  # a missing tool, a wrong parameter: says nothing about the program
    except Exception as error:  # a program that fails is an outcome
        outcome.problem = f"the program raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return outcome


def probes(program: Program) -> set[str]:
    """The values that say what rounds decide from, where no call writes them for others to see."""
    written = {v for c in calls(program.control) for v in c.writes.values()}
    every = loops(program.control)
    return {role for loop in every for role in (loop.evidence, loop.at, *loop.drafts) if role} - written


def with_probe(program: Program) -> Program:
    """The program with what its rounds decide from as values, for validation only."""
    wanted = probes(program)
    if not wanted:
        return program
    graphs = dict(program.graphs)
    for name, graph in program.graphs.items():
        nodes = {node.meta["value"]: node for node in graph.fx.nodes if node.meta.get("value") in wanted}
        if nodes:
            graphs[name] = expose(graph, nodes)

    def shown(call: Call) -> list[Control]:
        more = {n: n for n in wanted & set(graphs[call.graph].outputs)}
        return [replace(call, writes={**call.writes, **more})]

    return program.replace(graphs=graphs, control=rewrite(program.control, shown))
