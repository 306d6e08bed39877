"""Validation of unmasking programs: round by round, on the candidate's own canvases.

The candidate generates. The reference's control then runs for each prompt alone, on the same canvases: what its commit
wrote is compared with what the candidate wrote, and then replaced by it, so that one early difference does not hide
later ones. Logits of the masked rows at hand must agree within a multiple of the noise floor. A row may be written
otherwise only where the reference's rule does the same with the candidate's logits, and these are within the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aropt.ir.control import calls, loops
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import run
from aropt.ir.program import Program
from aropt.loops.runtime import slots
from aropt.validate.cases import Case
from aropt.validate.compare import TOLERANCE, Outcome
from aropt.validate.oracle import AT_ONCE, Mismatch, Oracle, noise_floor

RULES = ("greedy", "sample")


@dataclass
class Step:
    """A round of a sequence, padding left out: the canvas before and after it, the rows computed and their logits."""

    before: Tensor
    after: Tensor
    rows: Tensor
    logits: Tensor


class Trace:
    """A candidate's generation: for each prompt its rounds and its answer."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.steps: list[list[Step]] = [[] for _ in case.prompts]
        self.answers: list[list[int]] = [[] for _ in case.prompts]
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)
            sizes = inputs["lengths"].tolist()
            width = inputs["canvas"].shape[1]
            last = [inputs["canvas"]]

            def keep(values: Values, group: list[int] = group, sizes: list[int] = sizes, last: list[Tensor] = last,
                     width: int = width) -> None:  # fmt: skip
                for j, i in enumerate(group):
                    pad = width - sizes[j]
                    slots = values["slots"][j] if "slots" in values else torch.arange(width)
                    real = (slots >= pad) & (slots < width)
                    before, after = (x[j, pad:].clone() for x in (last[0], values["tokens"]))
                    self.steps[i].append(Step(before, after, slots[real] - pad, values["logits"][j][real].clone()))
                last[0] = values["tokens"].clone()
                if len(self.steps[group[0]]) > max(sizes):
                    raise Mismatch(f"does not end after {max(sizes)} rounds")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, values["generated"].tolist(), strict=True):
                self.answers[i] = [t for t in row if t >= 0]


@dataclass
class Round:
    """What the reference makes of a round: logits [N, V] of the masked rows at hand, which of the computed rows these
    are, the noise floor; and where it leaves another canvas, that one and what its graphs read, by graph."""

    logits: Tensor
    masked: Tensor
    floor: float
    theirs: Tensor | None = None
    rule: str = ""
    read: dict[str, Values] = field(default_factory=dict)


@dataclass
class Reply:
    """All rounds of a sequence, and the answer; or why it can't be the reference's."""

    problem: str = ""
    rounds: list[Round] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        read = [v for one in self.rounds for values in one.read.values() for v in values.values()]
        return sum(x.nbytes for x in [*read, *(one.logits for one in self.rounds)])


class Forced(Executor):
    """Runs the reference's control on the candidate's canvases."""

    def __init__(self, oracle: Oracle, steps: Sequence[Step]) -> None:
        self.oracle, self.steps = oracle, steps
        self.mask, self.shift = (int(oracle.program.meta.get(k) or 0) for k in ("mask", "shift"))
        self.rounds: list[Round] = []
        self.committed = 0
        self.rule = ""
        self.read: dict[str, Values] = {}  # what each graph read in this round
        self.state: Values = {}  # keys and values in fp64
        self.ahead: tuple[Values, Values] | tuple[()] = ()  # the forward's results for all rounds

    def call(self, graph: str, inputs: Values) -> Values:
        self.read[graph] = inputs
        if graph == self.oracle.model.graph:
            return self.forward(inputs)
        results = self.oracle.eager.call(graph, inputs)
        if graph in RULES:
            self.rule = graph
        if graph == "commit":
            results = self.overruled(results)
            self.committed += 1
        return results

    def forward(self, inputs: Values) -> Values:
        """The reference's forward; its logits of the rows that the candidate computed are kept."""
        number = self.committed
        if number >= len(self.steps):
            raise Mismatch(f"stops after {len(self.steps)} rounds, the reference goes on")
        single, double = self.computed(inputs)
        self.state = {n: v for n, v in double.items() if v.is_floating_point()}
        step = self.steps[number]
        if "slots" not in inputs:
            mine = step.rows
        elif torch.equal(inputs["slots"][0], step.rows):
            mine = torch.arange(len(step.rows))
        else:
            raise Mismatch(f"round {number} computes rows {step.rows.tolist()}, the schedule says "
                           f"{inputs['slots'][0].tolist()}")  # fmt: skip
        predicted = (step.rows + self.shift).clamp(max=len(step.before) - 1)
        masked = step.before[predicted] == self.mask
        rows = mine[masked]
        logits = single["logits"][0, rows]
        self.rounds.append(Round(logits, masked, noise_floor(logits, double["logits"][0, rows])))
        return single

    def computed(self, inputs: Values) -> tuple[Values, Values]:
        """The forward in fp32 and fp64; of one that reads canvases alone, all rounds in one call."""
        befores = [step.before for step in self.steps]
        if set(inputs) != {"ids"} or not torch.equal(inputs["ids"][0], befores[self.committed]):
            return self.oracle.forward(inputs, self.state)
        if len(befores) * len(befores[0]) * int(self.oracle.program.meta["vocab"]) > AT_ONCE:
            return self.oracle.forward(inputs, self.state)
        if not self.ahead:
            self.ahead = self.oracle.forward({"ids": torch.stack(befores)})
        at = slice(self.committed, self.committed + 1)
        single, double = ({n: v[at] for n, v in values.items()} for values in self.ahead)
        return single, double

    def overruled(self, results: Values) -> Values:
        """The commit's results with the candidate's canvas in the place of its own."""
        actual, one = self.steps[self.committed].after, self.rounds[self.committed]
        if not torch.equal(results["tokens"][0], actual):
            one.theirs, one.rule, one.read = results["tokens"][0], self.rule, dict(self.read)
        return {**results, "tokens": actual[None], "finished": ~(actual == self.mask).any()}


def measure(oracle: Oracle, number: int, one: Round, step: Step, outcome: Outcome) -> str:
    """Adds a round's distance of logits to the outcome; returns what is wrong, or nothing."""
    mine, problem = step.logits[one.masked], ""
    distance = torch.where(mine == one.logits, 0.0, (mine - one.logits).abs())
    error = float(distance.max()) if distance.numel() else 0.0
    if not error <= TOLERANCE * one.floor:
        times = f"{error / one.floor:.0f} times the noise floor"
        problem = f"logits of round {number} differ by {error:.3g}, {times}"
    if not error / one.floor <= outcome.ratio:
        outcome.error, outcome.floor = error, one.floor
    if one.theirs is not None:
        if ties(oracle, one, step):
            outcome.ties += 1
        elif not problem:
            where = int((one.theirs != step.after).nonzero()[0])
            left, theirs = int(step.after[where]), int(one.theirs[where])
            problem = f"round {number} leaves {left} at {where}, the reference {theirs}"
    return problem


def ties(oracle: Oracle, one: Round, step: Step) -> bool:
    """Whether the rule writes what the candidate wrote, given its logits, or some within the tolerance."""
    own, meta = one.read[one.rule]["logits"], oracle.program.meta
    mask, shift = (int(meta.get(k) or 0) for k in ("mask", "shift"))
    at = {int(row): i for i, row in enumerate(step.rows if own.shape[1] == len(step.rows) else range(own.shape[1]))}
    mine, nudged = own.clone(), own.clone()
    mine[0, [at[int(row)] for row in step.rows]] = step.logits.to(own.dtype)
    by = 2 * TOLERANCE * one.floor  # two logits, each off by the tolerance
    assert one.theirs is not None
    for row in (step.after != one.theirs).nonzero().flatten().tolist():
        source, token = at.get(max(row - shift, 0)), int(step.after[row])
        if source is None:  # not computed, so filled after a stop token
            continue
        if token != mask:
            nudged[0, source, token] += by
        else:
            nudged[0, source, nudged[0, source].argmax()] -= by
    return any(torch.equal(written(oracle, one, logits), step.after) for logits in (mine, nudged))


def written(oracle: Oracle, one: Round, logits: Tensor) -> Tensor:
    """The canvas [T] that the reference's rule leaves, given these logits: its round from the rule on."""
    bodies = [list(calls(loop.body)) for loop in loops(oracle.program.control, "unmask")]
    body, at = next((b, i) for b in bodies for i, call in enumerate(b) if call.graph == one.rule)
    values: Values = {body[at].reads["logits"]: logits}
    for call in body[at:]:
        given = {n: values.get(v, one.read[call.graph][n]) for n, v in call.reads.items()}
        found = oracle.eager.call(call.graph, given)
        values |= {v: found[o] for o, v in call.writes.items()}
    return values["tokens"][0]


def answer(oracle: Oracle, case: Case, i: int, steps: Sequence[Step]) -> Reply:
    """Runs the reference's control for prompt `i` on the candidate's canvases."""
    forced = Forced(oracle, steps)
    try:
        values = run(oracle.program, case.inputs(oracle.program, [i]), 0, forced)
    except Mismatch as mismatch:
        return Reply(str(mismatch))
    return Reply("", forced.rounds, [t for t in values["generated"][0].tolist() if t >= 0])


def compare_rows(oracle: Oracle, candidate: Program, executor: Executor, outcome: Outcome) -> None:
    """Generates with the candidate, then measures prompt by prompt."""
    case = outcome.case
    trace = Trace(candidate, case, executor)
    outcome.generated = trace.answers
    for i in range(len(case.prompts)):
        outcome.tokens += len(trace.answers[i])
        problem = compare_row(oracle, trace, i, outcome)
        if problem and not outcome.problem:
            outcome.problem, outcome.row = f"prompt {i}: {problem}", i


def compare_row(oracle: Oracle, trace: Trace, i: int, outcome: Outcome) -> str:
    """Measures one prompt; returns what is wrong, or nothing."""
    steps, case = trace.steps[i], outcome.case
    key = (*case.row(i), *(tuple(x.tolist()) for step in steps for x in (step.before, step.after, step.rows)))
    reply: Reply = oracle.once(key, lambda: answer(oracle, case, i, steps))
    if reply.problem:
        return reply.problem
    found = [measure(oracle, n, one, step, outcome) for n, (one, step) in enumerate(zip(reply.rounds, steps))]
    problem = next((p for p in found if p), "")
    if not problem and any(not torch.equal(s.before, s.after) for s in steps[len(found) :]):
        return f"changes the canvas in round {len(found)} of {len(steps)}, after the reference's end"
    if not problem and reply.answer != trace.answers[i]:
        return f"answers {trace.answers[i][:8]}..., the reference {reply.answer[:8]}..."
    return problem
