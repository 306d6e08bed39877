"""Replay: the reference's control on what a candidate decided, round by round (design section 7).

The candidate generates. The reference's control then runs for each sequence alone; what its round decides is compared
with what the candidate decided, and then replaced by it, so that one early difference does not hide later ones.
Evidence must agree within a multiple of the noise floor. A round may decide otherwise only where the reference's rule
does the same with the candidate's evidence, and this is within the tolerance. Which values these are, the loops' roles
say; what else a kind of loop has to be asked is in its scheme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aropt.ir.control import Loop, calls, loops
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import run
from aropt.ir.program import Program, Spec
from aropt.loops.requests.cases import Case
from aropt.loops.runtime import slots
from aropt.loops.scheme import NOTHING, Look, Mismatch, Round, scheme_of
from aropt.validate.oracle import EPS, Forward, Oracle, noise_floor
from aropt.validate.verdict import TOLERANCE, Outcome


class Trace:
    """A candidate's generation: for each prompt its rounds and its answer (ids without -1, or numbers).

    `redrawn`: of each sequence of a round that draws by another rule, whether its ids are the ones of that rule.
    """

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.rounds: list[list[Round]] = [[] for _ in case.prompts]
        self.answers: list[list[float]] = [[] for _ in case.prompts]
        self.redrawn: list[bool] = []
        scheme = scheme_of(candidate)
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)
            look, most = scheme.observe(candidate, inputs), scheme.most_rounds(inputs)

            def keep(
                loop: Loop, values: Values, group: list[int] = group, most: int = most, look: Look = look,
                inputs: Values = inputs,
            ) -> None:  # fmt: skip
                for i, found in zip(group, look(loop, values) if loop.decides else ()):
                    self.rounds[i] += found
                self.redrawn += scheme.redrawn(candidate, inputs, loop, values) if loop.drawn else ()
                if len(self.rounds[group[0]]) > most:
                    raise Mismatch(f"does not end after {scheme.counted(candidate, most)}")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, values[candidate.outputs[0]], strict=True):
                self.answers[i] = answer_of(row)
                while self.rounds[i] and self.rounds[i][-1].empty:  # it had ended, and others had not
                    self.rounds[i].pop()


@dataclass
class Answered:
    """What the reference makes of a round: the evidence [N, ...] that is compared, which of the round's rows it is of,
    and the noise floor. Where it decides otherwise: `theirs`, all of the evidence, and what each graph read, by graph.
    """

    evidence: Tensor
    own: Tensor
    floor: float
    whole: Tensor | None
    off: float = 0.0  # how far decided floats are apart, in noise floors of their own
    theirs: Tensor | None = None
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
    """Runs the reference's control on the candidate's rounds, for the request with these inputs."""

    def __init__(self, oracle: Oracle, inputs: Values, rounds: Sequence[Round]) -> None:
        self.oracle, self.inputs, self.rounds = oracle, inputs, rounds
        self.program, self.scheme = oracle.program, scheme_of(oracle.program)
        self.deciding, self.showing = roles(self.program, "decides"), roles(self.program, "evidence")
        self.found: list[Answered] = []
        self.waiting: dict[str, tuple[Any, ...] | None] = {}  # shapes of what graphs decide that may wait
        self.later: dict[str, list[int]] = {}  # rounds in which a graph is asked at the end, all at once
        self.number = 0  # of rounds that are decided
        self.read: dict[str, Values] = {}  # what each graph read in this round
        self.forwards: list[Forward] = []  # of this round
        self.exact: Values = {}  # what the latest gives in fp64
        self.ahead: list[Forward] | None = None  # those that answer all rounds

    def call(self, graph: str, inputs: Values) -> Values:
        self.read[graph] = inputs
        if graph == self.oracle.model.graph:
            results = self.forward(inputs)
        else:
            results = {} if self.waits(graph) else self.oracle.eager.call(graph, inputs)
        if graph in self.showing:
            self.show(graph, results[self.showing[graph]])
        return self.overruled(graph, results) if graph in self.deciding else results

    def forward(self, inputs: Values) -> Values:
        """The reference's forward, in fp32; in fp64 beside it."""
        if self.number >= len(self.rounds):
            raise Mismatch(f"stops after {self.scheme.counted(self.program, self.number)}, the reference goes on")
        ids = inputs["ids"][0] if set(inputs) == {"ids"} else NOTHING
        made = self.foreseen(ids)
        if made is None:
            state = {n: v for n, v in self.exact.items() if v.is_floating_point()}
            made = Forward(ids, *self.oracle.forward(inputs, state))
        self.forwards.append(made)
        part = made.until(ids)
        self.exact = part.double
        return part.single

    def foreseen(self, ids: Tensor) -> Forward | None:
        """The forward on the ids, if one that answers all rounds begins with them."""
        if self.ahead is None:
            self.ahead = self.oracle.foresee(foreseen(self.oracle, self.inputs, self.rounds))
        likely = self.ahead[self.number : self.number + 1]
        return next((made for made in [*likely, *self.ahead] if made.begins(ids, self.oracle.causal)), None)

    def show(self, graph: str, evidence: Tensor) -> None:
        """Keeps what the reference's round decides from."""
        round, inputs = self.rounds[self.number], {**self.inputs, **self.read[self.oracle.model.graph]}
        at, own = self.scheme.compared(self.program, inputs, round, self.number)
        if graph == self.oracle.model.graph:
            floor = noise_floor(evidence[at], self.exact[self.showing[graph]][at])
        else:
            floor = max(made.floor for made in self.forwards)
        self.found.append(Answered(evidence[at], own, floor, evidence))
        self.read, self.forwards = {}, []

    def waits(self, graph: str) -> bool:
        """Whether the graph does nothing but decide, row by row, what the round has decided already."""
        if graph not in self.waiting:
            specs = self.program.graphs[graph]
            rows = [*specs.outputs.values(), *(spec for spec in specs.inputs.values() if batched(spec))]
            alone = graph not in self.showing and list(specs.outputs) == [self.deciding.get(graph)]
            fixed = alone and all(type(d) is int for spec in rows for d in spec.dims[1:])
            self.waiting[graph] = tuple(rows[0].dims[1:]) if fixed else None
        if self.waiting[graph] is None:
            return False
        round = self.rounds[self.number]
        return round.ids and self.waiting[graph] == tuple(round.decided.shape) and int(round.decided.min()) >= 0

    def overruled(self, graph: str, results: Values) -> Values:
        """The deciding call's results with the candidate's decision in the place of its own."""
        output, round, one = self.deciding[graph], self.rounds[self.number], self.found[self.number]
        one.read = dict(self.read)
        if results:
            theirs = results[output][0]
            self.decide(self.number, theirs)
            if round.ids and bool((round.decided < 0).any()):  # of a row that a stop id cut, the rest is its own
                round = replace(round, decided=torch.where(round.decided < 0, theirs, round.decided))
        else:
            self.later.setdefault(graph, []).append(self.number)
        self.number += 1
        return self.scheme.overrule(self.program, results, output, round)

    def decide(self, number: int, theirs: Tensor) -> None:
        """Compares what the reference decides in a round."""
        round, one = self.rounds[number], self.found[number]
        if theirs.shape != round.decided.shape:
            shapes, place = (list(round.decided.shape), list(theirs.shape)), self.scheme.placed(self.program, number)
            raise Mismatch(f"{place} decides {shapes[0]}, the reference {shapes[1]}")
        if not round.ids:
            floor = max(one.floor, 4 * EPS * float(theirs.abs().max()))
            one.off = float((theirs - round.decided).abs().max()) / floor
        elif bool(round.differs(theirs).any()):
            one.theirs = theirs
            return
        one.whole, one.read = None, {}

    def settle(self) -> None:
        """Asks what waited: in one call all rounds that differ in nothing but their rows."""
        for graph, numbers in self.later.items():
            specs, groups = self.program.graphs[graph].inputs, dict[tuple[int, ...], list[int]]()
            for number in numbers:
                read = self.found[number].read[graph]
                groups.setdefault(tuple(id(read[n]) for n, s in specs.items() if not batched(s)), []).append(number)
            for group in groups.values():
                largest = max(v.numel() for n, v in self.found[group[0]].read[graph].items() if batched(specs[n]))
                for start in range(0, len(group), most := self.oracle.at_once(largest)):
                    self.ask(graph, group[start : start + most])

    def ask(self, graph: str, numbers: list[int]) -> None:
        """One call for these rounds, as a batch: of each branch the rows of all."""
        reads, specs = [self.found[n].read[graph] for n in numbers], self.program.graphs[graph].inputs
        inputs = {n: torch.stack([v[n] for v in reads], 1).flatten(0, 1) if batched(s) else reads[0][n]
                  for n, s in specs.items()}  # fmt: skip
        decided = self.oracle.eager.call(graph, inputs)[self.deciding[graph]]
        for number, theirs in zip(numbers, decided, strict=True):
            self.decide(number, theirs)


def batched(spec: Spec) -> bool:
    """Whether a value has rows of each sequence of a batch."""
    first = str(spec.dims[0]) if spec.dims else ""
    return first == "B" or first.endswith("*B")


def foreseen(oracle: Oracle, inputs: Values, rounds: Sequence[Round]) -> list[Tensor]:
    """Ids that the forward reads in these rounds, if it reads nothing else, and there is room for its results."""
    if [spec.dtype for spec in oracle.program.graphs[oracle.model.graph].inputs.values()] != [torch.int64]:
        return []
    rows = scheme_of(oracle.program).foreseen(oracle.program, inputs, rounds)
    return rows if len(rows) <= oracle.branches or oracle.fits(rows) else []  # what one round reads is needed whole


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
    mine, program, scheme = round.evidence[one.own], oracle.program, scheme_of(oracle.program)
    place, kind = scheme.placed(program, number), "logits" if round.ids else "values"
    if mine.shape != one.evidence.shape:
        return f"{place} shows {list(mine.shape)}, the reference {list(one.evidence.shape)}"
    distance = torch.where(mine == one.evidence, 0.0, (mine - one.evidence).abs())
    error = float(distance.max()) if distance.numel() else 0.0
    if not math.isfinite(error):
        return f"{kind} of {place} are not finite"
    if error / one.floor >= outcome.ratio:
        outcome.error, outcome.floor = error, one.floor
    problem = ""
    if error > TOLERANCE * one.floor:
        problem = f"{kind} differ by {error:.3g}, {error / one.floor:.0f} times the noise floor"
    elif not one.off <= TOLERANCE:  # NaN too
        return f"what {place} decides is {one.off:.0f} noise floors from the reference's"
    if one.theirs is None:
        return problem and f"{problem}, at {place}"
    if not problem and round.drawn and possible(oracle, one, round):
        return ""
    if not problem and not round.drawn and ties(oracle, one, round):
        outcome.ties += 1
        return ""
    where = round.differs(one.theirs).nonzero()[0].tolist()
    mine, theirs = round.decided[tuple(where)], one.theirs[tuple(where)]
    other = f"{scheme.placed(program, number, where)} is {int(mine)}, the reference's rule picks {int(theirs)}"
    return f"{problem}; {other}" if problem else other


def nudged(oracle: Oracle, one: Answered, round: Round) -> list[Tensor]:
    """The candidate's evidence, and some within the tolerance in which the candidate's ids are likelier."""
    assert one.theirs is not None and one.whole is not None
    by = 2 * TOLERANCE * one.floor  # two logits, each off by the tolerance
    return scheme_of(oracle.program).nudged(oracle.program, one.whole, round, one.theirs, by)


def ties(oracle: Oracle, one: Answered, round: Round) -> bool:
    """Whether the rule decides what the candidate decided, given its evidence, or some within the tolerance."""
    return any(not round.differs(decided_from(oracle, one, round, x)).any() for x in nudged(oracle, one, round))


def possible(oracle: Oracle, one: Answered, round: Round) -> bool:
    """Whether the rule may draw the candidate's id, given such evidence."""
    scheme, program = scheme_of(oracle.program), oracle.program
    given = {n: v for values in one.read.values() for n, v in values.items()}
    counted = (scheme.counting(program, given, round, x) for x in nudged(oracle, one, round))
    return any(bool(scheme.chances(program, given, x)[0, int(round.decided)] > 0) for x in counted)


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
            if loop.decides in values:
                break
    return values[loop.decides][0]


def none(program: Program, rounds: Sequence[Round]) -> str:
    """Which id a round decided that is none: outside the vocabulary, or -1 and more of them come after it."""
    numbers = [n for n, one in enumerate(rounds) if one.ids and not one.before.numel()]
    found = torch.cat([torch.zeros(0, dtype=torch.int64), *(rounds[n].decided.flatten() for n in numbers)])
    late = (found >= 0).flip(0).cumsum(0).flip(0) > 0  # an id is there, or comes
    wrong = (found < torch.where(late, 0, -1)) | (found >= program.meta["vocab"])
    if not bool(wrong.any()):
        return ""
    first = int(wrong.nonzero()[0])
    number, place = [(n, i) for n in numbers for i in range(rounds[n].decided.numel())][first]
    return f"{scheme_of(program).placed(program, number, [place])} is {int(found[first])}, which is none"


def answer(oracle: Oracle, inputs: Values, rounds: Sequence[Round]) -> Reply:
    """Runs the reference's control on the candidate's rounds for a sequence with these inputs."""
    replay, program = Replay(oracle, inputs, rounds), oracle.program
    try:
        values = run(program, inputs, 0, replay)
        replay.settle()
    except Mismatch as mismatch:
        return Reply(str(mismatch))
    return Reply("", replay.found, answer_of(values[program.outputs[0]][0]))


def compare_rounds(oracle: Oracle, candidate: Program, executor: Executor, outcome: Outcome) -> None:
    """Generates with the candidate, then measures prompt by prompt."""
    case = outcome.case
    trace = Trace(candidate, case, executor)
    outcome.generated = [[t for t in answer if isinstance(t, int)] for answer in trace.answers]  # ids, no floats
    asked = [Asked(case, i, oracle.program, rounds) for i, rounds in enumerate(trace.rounds)]
    look_ahead(oracle, [one for one in asked if not one.problem and one.key not in oracle.known])
    for one, answer in zip(asked, trace.answers, strict=True):
        outcome.tokens += len(answer)
        problem = one.problem or compare_sequence(oracle, one, answer, outcome)
        if problem and not outcome.problem:
            outcome.problem, outcome.row = f"prompt {one.row}: {problem}", one.row
    outcome.problem = outcome.problem or otherwise(trace.redrawn)


def otherwise(redrawn: Sequence[bool]) -> str:
    """What is wrong with rounds that draw by another rule, of which some have its ids; "" if nothing is.

    A draw may be as near to another one as rounding goes: one round of 200, and one more, are taken for that.
    """
    others = redrawn.count(False)
    wrong = f"{others} of {len(redrawn)} rounds have other ids than their rule gives of drafts, chances and noise"
    return wrong if others > 1 + len(redrawn) // 200 else ""


class Asked:
    """A prompt of a case and its rounds: the request's inputs, and all that the reference's answer depends on."""

    def __init__(self, case: Case, row: int, program: Program, rounds: Sequence[Round]) -> None:
        self.row, self.rounds, self.inputs = row, rounds, case.inputs(program, [row])
        self.problem = none(program, rounds)
        seen = [x for one in rounds for x in (one.decided, one.rows, one.before)]
        self.key = (case.part([row]), *(tuple(x.flatten().tolist()) for x in seen))


def look_ahead(oracle: Oracle, asked: Sequence[Asked]) -> None:
    """Runs the forward once for all of these prompts of a case, if there is room."""
    oracle.begin()
    rows = [ids for one in asked for ids in foreseen(oracle, one.inputs, one.rounds)]
    if oracle.fits(rows):
        oracle.foresee(rows)


def compare_sequence(oracle: Oracle, asked: Asked, mine: list[float], outcome: Outcome) -> str:
    """Measures one prompt, which the candidate gave that answer; returns what is wrong, or nothing."""
    rounds, program, scheme = asked.rounds, oracle.program, scheme_of(oracle.program)
    reply: Reply = oracle.once(asked.key, lambda: answer(oracle, asked.inputs, rounds))
    if reply.problem:
        return reply.problem
    found = [measure(oracle, n, one, round, outcome) for n, (one, round) in enumerate(zip(reply.rounds, rounds))]
    problem = next((p for p in found if p), "")
    ends = max((n for n, one in enumerate(rounds, 1) if not scheme.idle(one)), default=0)
    if not problem and ends > len(found):
        late, end = (scheme.counted(program, n) for n in (ends, len(found)))
        return f"ends after {late}, the reference after {end}"
    if not problem and reply.answer != mine:
        return f"answers {mine[:8]}..., the reference {reply.answer[:8]}..."
    return problem


def answer_of(row: Tensor) -> list[float]:
    """A sequence's answer: ids without -1, or numbers."""
    found: list[float] = row.flatten().tolist()
    return found if row.is_floating_point() else [t for t in found if t >= 0]
