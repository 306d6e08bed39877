"""Validation: does a program generate what its reference generates? (design section 7)

The candidate generates; the reference then sees the same tokens in one full forward (teacher forcing), so one early
difference does not hide later ones. Logits must agree within a multiple of the noise floor: the distance between the
reference in fp32 and in fp64. Tokens must be those of the reference's own rule; a token may differ only where the
reference's rule picks it too, given logits within the tolerance of its own (a tie). A failing case is shrunk before it
is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from aropt.errors import AroptError, UsageError
from aropt.ir.control import Loop, calls, loops, rewrite
from aropt.ir.edit import expose
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program
from aropt.ir.units import flat, ids_of, rows_for, window
from aropt.loops.requests.cases import Case, cases
from aropt.loops.runtime import slots
from aropt.loops.scheme import Mismatch, scheme_of
from aropt.validate.localize import localize
from aropt.validate.oracle import Oracle, Reply
from aropt.validate.replay import compare_rounds
from aropt.validate.shrink import shrink
from aropt.validate.slices import whole
from aropt.validate.stops import with_stops
from aropt.validate.verdict import TOLERANCE, Outcome, Verdict

__all__ = [
    "TOLERANCE", "Case", "Mismatch", "Oracle", "Outcome", "Trace", "Verdict", "cases", "compare", "fails", "probe",
    "shrink", "validate", "with_probe", "with_stops",
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
    given, vocab = whole(oracle.requests, candidate) if chosen is None else chosen, int(oracle.program.meta["vocab"])
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
    oracle.rest()
    return verdict


def fails(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> bool:
    """Whether a case that was made smaller fails; one that the program can't take (blocks, steps) does not."""
    try:
        return not compare(oracle, candidate, executor, case).passed
    except UsageError:
        return False


class Trace:
    """A candidate's generation: tokens of each prompt, and the logits [branches, V] that each round's rule saw."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.tokens: list[list[int]] = [[] for _ in case.prompts]
        self.logits: list[list[Tensor]] = [[] for _ in case.prompts]
        self.alone, self.row = 0, len(window(candidate.meta))
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)

            def keep(loop: Loop, values: Values, group: list[int] = group) -> None:
                decided, seen = values[loop.shown], values[loop.evidence]
                if decided.dim() == 1 + self.row:
                    self.alone = len(seen)  # rows of a round without drafts
                elif len(seen) > self.alone:  # a row for each draft, of each branch
                    drafted = seen.reshape(self.alone, -1, *seen.shape[1:])
                    rounds = decided[0, : drafted.shape[1]].reshape(drafted.shape[1], -1)
                    counted = rounds.amax(1) >= 0
                    self.logits[group[0]] += drafted[:, counted].transpose(0, 1).clone().unbind()
                    return
                branches = seen.reshape(-1, len(group), *seen.shape[1:])
                for j, i in enumerate(group):
                    self.logits[i].append(branches[:, j].clone())
                if len(self.logits[group[0]]) > rows_for(candidate.meta, case.n):
                    raise Mismatch(f"does not end after {case.n} tokens")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, flat(values["generated"]), strict=True):
                self.tokens[i] = [t for t in row if t >= 0]
                if any(t >= 0 for t in row[len(self.tokens[i]) :]):
                    self.tokens[i].append(-1)  # tokens after the end: never equal to the reference's


def compare(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> Outcome:
    """Runs one case on both and measures. A candidate that raises an error has failed."""
    outcome = Outcome(case)
    measure = compare_rows if scheme_of(oracle.program).forced else compare_rounds
    try:
        measure(oracle, candidate, executor, outcome)
    except Mismatch as mismatch:
        outcome.problem = str(mismatch)
    except AroptError:
        raise  # a missing tool, a wrong parameter: says nothing about the program
    except Exception as error:  # a program that fails is an outcome
        outcome.problem = f"the program raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return outcome


def compare_rows(oracle: Oracle, candidate: Program, executor: Executor, outcome: Outcome) -> None:
    """Generates with the candidate, then measures prompt by prompt."""
    case = outcome.case
    trace = Trace(candidate, case, executor)
    outcome.generated = trace.tokens
    oracle.look_ahead(case, trace.tokens)
    for i in range(len(case.prompts)):
        outcome.tokens += len(trace.tokens[i])
        problem = compare_row(oracle, trace, i, outcome)
        if problem and not outcome.problem:
            outcome.problem, outcome.row = f"prompt {i}: {problem}", i


def compare_row(oracle: Oracle, trace: Trace, i: int, outcome: Outcome) -> str:
    """Measures one prompt; returns what is wrong, or nothing."""
    tokens, rounds, meta = trace.tokens[i], trace.logits[i], oracle.program.meta
    if len(tokens) > ids_of(meta, len(rounds)):
        return f"returns {len(tokens)} tokens after {len(rounds)} rounds"
    wrong = [t for t in tokens if not 0 <= t < int(meta["vocab"])]
    if wrong:
        return f"new token {tokens.index(wrong[0])} is {wrong[0]}, which is none"
    reply = oracle.reply(outcome.case, i, tokens)
    if reply.problem or reply.logits is None:
        return reply.problem
    error, problem, most = 0.0, "", TOLERANCE * reply.floor
    for number, (mine, theirs) in enumerate(zip(rounds, reply.logits.unbind(1))):
        if not reply.read[number] <= len(mine) <= len(theirs):
            return f"the rule of new token {number * ids_of(meta, 1)} sees {len(mine)} branches of {len(theirs)}"
        theirs = theirs[: len(mine)]
        distance = float(torch.where(mine == theirs, 0.0, (mine - theirs).abs()).max())
        if not math.isfinite(distance):
            return f"logits of new token {number * ids_of(meta, 1)} are not finite"
        error = max(error, distance)
        places = range(number * ids_of(meta, 1), min((number + 1) * ids_of(meta, 1), len(tokens)))
        for place, step in enumerate(places):
            if reply.decided[step] == tokens[step] or problem:
                continue
            if error <= most and ties(oracle, reply, number, mine, tokens[step], place):
                outcome.ties += 1
            else:
                problem = f"new token {step} is {tokens[step]}, the reference's rule picks {reply.decided[step]}"
    outcome.error, outcome.floor = max(outcome.error, error), max(outcome.floor, reply.floor)
    if error > most:
        times = f"{error / reply.floor:.0f} times the noise floor"
        problem = f"logits differ by {error:.3g}, {times}" + (f"; {problem}" if problem else "")
    return problem


def ties(oracle: Oracle, reply: Reply, number: int, mine: Tensor, token: int, place: int = 0) -> bool:
    """Whether the reference's rule picks the token too, from the candidate's logits or with a slightly higher logit.

    `place`: which of a window's ids it is.
    """
    assert reply.logits is not None
    graph, read = reply.rules[number]
    nudged = reply.logits[:, number].clone()
    mine = torch.cat([mine, nudged[len(mine) :]])  # a branch that the rule does not read may be missing
    # two logits, each off by the tolerance
    nudged[(0, place, token) if nudged.dim() == 3 else (0, token)] += 2 * TOLERANCE * reply.floor
    picks = [oracle.eager.call(graph, {**read, "logits": x})["token"].flatten()[place] for x in (mine, nudged)]
    return any(int(picked) == token for picked in picks)


def probe(program: Program) -> str:
    """The value that holds what the rounds decide from."""
    return next(loop.evidence for loop in loops(program.control) if loop.evidence)


def with_probe(program: Program) -> Program:
    """The program with what its rounds decide from as the value `probe(program)`, for validation only."""
    name_of = probe(program)
    if any(name_of in c.writes.values() for c in calls(program.control)):
        return program
    graphs = dict(program.graphs)
    for name, graph in program.graphs.items():
        node = next((n for n in graph.fx.nodes if n.meta.get("value") == name_of), None)
        if node is not None:
            graphs[name] = expose(graph, {name_of: node})
    control = rewrite(program.control, lambda c: [replace(c, writes={**c.writes, name_of: name_of})
                                                  if name_of in graphs[c.graph].outputs else c])  # fmt: skip
    return program.replace(graphs=graphs, control=control)
