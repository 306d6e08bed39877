"""Replay: the reference's control on what a candidate decided, round by round (design section 7).

The candidate generates. The reference's control then runs for each sequence alone; what its round decides is compared
with what the candidate decided, and then replaced by it, so that one early difference does not hide later ones.
Evidence must agree within a multiple of the noise floor. A round may decide otherwise only where the reference's rule
does the same with the candidate's evidence, and this is within the tolerance. Which values these are, the loops' roles
say; what else a kind of loop has to be asked is in its scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aropt.ir.control import Loop, calls, loops
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import run
from aropt.ir.program import Program
from aropt.loops.requests.cases import Case
from aropt.loops.runtime import slots
from aropt.loops.scheme import Look, Mismatch, Round, scheme_of
from aropt.validate.oracle import AT_ONCE, EPS, Oracle, noise_floor
from aropt.validate.verdict import TOLERANCE, Outcome


class Trace:
    """A candidate's generation: for each prompt its rounds and its answer (ids without -1, or numbers)."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.rounds: list[list[Round]] = [[] for _ in case.prompts]
        self.answers: list[list[float]] = [[] for _ in case.prompts]
        scheme = scheme_of(candidate)
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)
            look, most = scheme.observe(candidate, inputs), scheme.most_rounds(inputs)

            def keep(loop: Loop, values: Values, group: list[int] = group, most: int = most, look: Look = look) -> None:
                for i, one in zip(group, look(loop, values) if loop.decides else ()):
                    self.rounds[i].append(one)
                if len(self.rounds[group[0]]) > most:
                    raise Mismatch(f"does not end after {most} rounds")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, values[candidate.outputs[0]], strict=True):
                self.answers[i] = answer_of(row)


@dataclass
class Answered:
    """What the reference makes of a round: evidence [N, ...] of the rows that count, which of the round's rows these
    are, and the noise floor. Where it decides otherwise: `theirs`, and the evidence of all rows and what each graph
    read, by graph.
    """

    evidence: Tensor
    own: Tensor
    floor: float
    off: float = 0.0  # how far decided floats are apart, in noise floors of their own
    theirs: Tensor | None = None
    whole: Tensor | None = None
    read: dict[str, Values] = field(default_factory=dict)


@dataclass
class Reply:
    """All rounds of a sequence, and the answer; or why it can't be the reference's."""

    problem: str = ""
    rounds: list[Answered] = field(default_factory=list)
    answer: list[float] = field(default_factory=list)

    @property
    def size(self) -> int:
        read = [v for one in self.rounds for values in one.read.values() for v in values.values()]
        return sum(x.nbytes for x in [*read, *(one.evidence for one in self.rounds)])


class Replay(Executor):
    """Runs the reference's control on the candidate's rounds."""

    def __init__(self, oracle: Oracle, rounds: Sequence[Round]) -> None:
        self.oracle, self.rounds = oracle, rounds
        self.program, self.scheme = oracle.program, scheme_of(oracle.program)
        self.deciding, self.showing = roles(self.program, "decides"), roles(self.program, "evidence")
        self.found: list[Answered] = []
        self.number = 0  # of rounds that are decided
        self.read: dict[str, Values] = {}  # what each graph read in this round
        self.state: Values = {}  # keys and values in fp64
        self.single: Values = {}  # the latest forward in fp32
        self.exact: Values = {}  # and in fp64
        self.ahead: tuple[Values, Values] | None = None  # the forward's results for all rounds

    def call(self, graph: str, inputs: Values) -> Values:
        self.read[graph] = inputs
        results = self.forward(inputs) if graph == self.oracle.model.graph else self.oracle.eager.call(graph, inputs)
        if graph in self.showing:
            self.show(graph, results[self.showing[graph]])
        return self.overruled(results, self.deciding[graph]) if graph in self.deciding else results

    def forward(self, inputs: Values) -> Values:
        """The reference's forward, in fp32; in fp64 beside it."""
        if self.number >= len(self.rounds):
            raise Mismatch(f"stops after {len(self.rounds)} rounds, the reference goes on")
        self.single, self.exact = self.computed(inputs)
        self.state = {n: v for n, v in self.exact.items() if v.is_floating_point()}
        return self.single

    def computed(self, inputs: Values) -> tuple[Values, Values]:
        """The forward in fp32 and fp64; of one that reads foreseen ids alone, all rounds in one call."""
        ahead = self.scheme.foreseen(self.program, self.rounds) if set(inputs) == {"ids"} else None
        vocab = int(self.program.meta["vocab"])
        if ahead is None or ahead.numel() * vocab > AT_ONCE or not torch.equal(inputs["ids"][0], ahead[self.number]):
            return self.oracle.forward(inputs, self.state)
        self.ahead = self.ahead or self.oracle.forward({"ids": ahead})
        at = slice(self.number, self.number + 1)
        single, double = ({n: v[at] for n, v in values.items()} for values in self.ahead)
        return single, double

    def show(self, graph: str, evidence: Tensor) -> None:
        """Keeps what the reference's round decides from."""
        round, inputs = self.rounds[self.number], self.read[self.oracle.model.graph]
        rows, own = self.scheme.compared(self.program, inputs, round, self.number)
        if graph == self.oracle.model.graph:
            floor = noise_floor(evidence[0, rows], self.exact[self.showing[graph]][0, rows])
        else:
            floor = max(noise_floor(v, self.exact[n]) for n, v in self.single.items() if v.is_floating_point())
        self.found.append(Answered(evidence[0, rows], own, floor, whole=evidence))

    def overruled(self, results: Values, output: str) -> Values:
        """The deciding call's results with the candidate's decision in the place of its own."""
        round, one, theirs = self.rounds[self.number], self.found[self.number], results[output][0]
        if theirs.shape != round.decided.shape:
            shapes = list(round.decided.shape), list(theirs.shape)
            raise Mismatch(f"round {self.number} decides {shapes[0]}, the reference {shapes[1]}")
        if not round.ids:
            floor = max(one.floor, 4 * EPS * float(theirs.abs().max()))
            one.off = float((theirs - round.decided).abs().max()) / floor
        elif not torch.equal(theirs, round.decided):
            one.theirs, one.read = theirs, dict(self.read)
        one.whole = one.whole if one.theirs is not None else None
        self.number += 1
        return self.scheme.overrule(self.program, results, output, round)


def roles(program: Program, role: str) -> dict[str, str]:
    """Graphs that write the values of a role in loops that are watched, and their outputs of it."""
    watched = [loop for loop in loops(program.control) if not loop.internal and loop.decides]
    return {
        c.graph: o
        for loop in watched
        for c in calls(loop.body)
        for o, v in c.writes.items()
        if v == getattr(loop, role)
    }


def measure(oracle: Oracle, number: int, one: Answered, round: Round, outcome: Outcome) -> str:
    """Adds a round's distance of evidence to the outcome; returns what is wrong, or nothing."""
    mine, problem = round.evidence[one.own], ""
    if mine.shape != one.evidence.shape:
        return f"round {number} shows {list(mine.shape)}, the reference {list(one.evidence.shape)}"
    distance = torch.where(mine == one.evidence, 0.0, (mine - one.evidence).abs())
    error = float(distance.max()) if distance.numel() else 0.0
    if not error <= TOLERANCE * one.floor:
        times = f"{error / one.floor:.0f} times the noise floor"
        problem = f"{'logits' if round.ids else 'values'} of round {number} differ by {error:.3g}, {times}"
    if not problem and not one.off <= TOLERANCE:  # NaN too
        problem = f"what round {number} decides is {one.off:.0f} noise floors from the reference's"
    if not error / one.floor <= outcome.ratio:
        outcome.error, outcome.floor = error, one.floor
    if one.theirs is not None:
        if ties(oracle, one, round):
            outcome.ties += 1
        elif not problem:
            where = (one.theirs != round.decided).nonzero()[0].tolist()
            left, theirs = int(round.decided[tuple(where)]), int(one.theirs[tuple(where)])
            problem = f"round {number} leaves {left} at {', '.join(map(str, where))}, the reference {theirs}"
    return problem


def ties(oracle: Oracle, one: Answered, round: Round) -> bool:
    """Whether the rule decides what the candidate decided, given its evidence, or some within the tolerance."""
    assert one.theirs is not None and one.whole is not None
    by = 2 * TOLERANCE * one.floor  # two logits, each off by the tolerance
    tried = scheme_of(oracle.program).nudged(oracle.program, one.whole, round, one.theirs, by)
    return any(torch.equal(decided_from(oracle, one, round, evidence), round.decided) for evidence in tried)


def decided_from(oracle: Oracle, one: Answered, round: Round, evidence: Tensor) -> Tensor:
    """What the reference decides for its one sequence, given this evidence: its round from there on."""
    alike = [loop for loop in loops(oracle.program.control) if loop.decides == round.loop and not loop.internal]
    loop = max(alike, key=lambda loop: sum(c.graph in one.read for c in calls(loop.body)))  # the one that ran
    body = list(calls(loop.body))
    start = next(i for i, call in enumerate(body) if loop.evidence in call.writes.values())
    values: Values = {loop.evidence: evidence}
    for call in body[start + 1 :]:
        if call.graph in one.read:
            given = {n: values.get(v, one.read[call.graph][n]) for n, v in call.reads.items()}
            found = oracle.eager.call(call.graph, given)
            values |= {v: found[o] for o, v in call.writes.items()}
    return values[loop.decides][0]


def answer_of(row: Tensor) -> list[float]:
    """A sequence's answer: ids without -1, or numbers."""
    found: list[float] = row.flatten().tolist()
    return found if row.is_floating_point() else [t for t in found if t >= 0]


def answer(oracle: Oracle, case: Case, i: int, rounds: Sequence[Round]) -> Reply:
    """Runs the reference's control for prompt `i` on the candidate's rounds."""
    replay, program = Replay(oracle, rounds), oracle.program
    try:
        values = run(program, case.inputs(program, [i]), 0, replay)
    except Mismatch as mismatch:
        return Reply(str(mismatch))
    return Reply("", replay.found, answer_of(values[program.outputs[0]][0]))


def compare_rounds(oracle: Oracle, candidate: Program, executor: Executor, outcome: Outcome) -> None:
    """Generates with the candidate, then measures prompt by prompt."""
    case = outcome.case
    trace = Trace(candidate, case, executor)
    outcome.generated = [[t for t in answer if isinstance(t, int)] for answer in trace.answers]  # ids, no floats
    for i in range(len(case.prompts)):
        outcome.tokens += len(trace.answers[i])
        problem = compare_sequence(oracle, trace, i, outcome)
        if problem and not outcome.problem:
            outcome.problem, outcome.row = f"prompt {i}: {problem}", i


def compare_sequence(oracle: Oracle, trace: Trace, i: int, outcome: Outcome) -> str:
    """Measures one prompt; returns what is wrong, or nothing."""
    rounds, case, scheme = trace.rounds[i], outcome.case, scheme_of(oracle.program)
    seen = [x for one in rounds for x in (one.decided, one.rows, one.before)]
    key = (*case.row(i), *(tuple(x.flatten().tolist()) for x in seen))
    reply: Reply = oracle.once(key, lambda: answer(oracle, case, i, rounds))
    if reply.problem:
        return reply.problem
    found = [measure(oracle, n, one, round, outcome) for n, (one, round) in enumerate(zip(reply.rounds, rounds))]
    problem = next((p for p in found if p), "")
    if not problem and not all(scheme.idle(one) for one in rounds[len(found) :]):
        return f"changes the canvas in round {len(found)} of {len(rounds)}, after the reference's end"
    if not problem and reply.answer != trace.answers[i]:
        return f"answers {trace.answers[i][:8]}..., the reference {reply.answer[:8]}..."
    return problem
