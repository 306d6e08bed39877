"""Validation of unmasking programs: round by round, on the candidate's own canvases.

The candidate generates. The reference's control then runs for each prompt alone, on the same canvases: what its commit
wrote is compared with what the candidate wrote, and then replaced by it, so that one early difference does not hide
later ones. Logits of the masked rows at hand must agree within a multiple of the noise floor. A row may be written
otherwise only where the reference's rule does the same with the candidate's logits, and these are within the tolerance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aropt.cases import Case
from aropt.interpreter import Executor, Values, run
from aropt.oracle import Mismatch, Oracle, noise_floor
from aropt.passbase import loops
from aropt.program import Program, calls
from aropt.runtime import slots
from aropt.validate import TOLERANCE, Outcome

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


class Forced:
    """Runs the reference's control on the candidate's canvases, and measures."""

    def __init__(self, oracle: Oracle, steps: Sequence[Step], outcome: Outcome) -> None:
        self.oracle, self.steps, self.outcome = oracle, steps, outcome
        self.mask, self.shift = (int(oracle.program.meta.get(k) or 0) for k in ("mask", "shift"))
        self.round, self.problem, self.floor = 0, "", 0.0
        self.rule = ""
        self.read: dict[str, Values] = {}  # what each graph read in this round
        self.state: Values = {}  # keys and values in fp64

    def call(self, graph: str, inputs: Values) -> Values:
        self.read[graph] = inputs
        if graph == self.oracle.model.graph:
            return self.forward(inputs)
        results = self.oracle.eager.call(graph, inputs)
        if graph in RULES:
            self.rule = graph
        if graph == "commit":
            results = self.overruled(inputs, results)
            self.round += 1
        return results

    def forward(self, inputs: Values) -> Values:
        """The reference's forward; its logits are compared with the candidate's."""
        if self.round >= len(self.steps):
            raise Mismatch(f"stops after {len(self.steps)} rounds, the reference goes on")
        single, double = self.oracle.forward(inputs, self.state)
        self.state = {n: v for n, v in double.items() if v.is_floating_point()}
        step = self.steps[self.round]
        if "slots" not in inputs:
            mine = step.rows
        elif torch.equal(inputs["slots"][0], step.rows):
            mine = torch.arange(len(step.rows))
        else:
            raise Mismatch(f"round {self.round} computes rows {step.rows.tolist()}, the schedule says "
                           f"{inputs['slots'][0].tolist()}")  # fmt: skip
        predicted = (step.rows + self.shift).clamp(max=len(step.before) - 1)
        masked = step.before[predicted] == self.mask
        rows = mine[masked]
        self.measure(single["logits"][0, rows], double["logits"][0, rows], step.logits[masked])
        return single

    def measure(self, single: Tensor, double: Tensor, mine: Tensor) -> None:
        """Adds this round's distance of logits to the outcome."""
        floor = self.floor = noise_floor(single, double)
        distance = torch.where(mine == single, 0.0, (mine - single).abs())
        error = float(distance.max()) if distance.numel() else 0.0
        if not error <= TOLERANCE * floor and not self.problem:
            times = f"{error / floor:.0f} times the noise floor"
            self.problem = f"logits of round {self.round} differ by {error:.3g}, {times}"
        if not error / floor <= self.outcome.ratio:
            self.outcome.error, self.outcome.floor = error, floor

    def overruled(self, inputs: Values, results: Values) -> Values:
        """The commit's results with the candidate's canvas in the place of its own."""
        actual = self.steps[self.round].after
        if not torch.equal(results["tokens"][0], actual):
            if self.ties(results["tokens"][0], actual):
                self.outcome.ties += 1
            elif not self.problem:
                where = int((results["tokens"][0] != actual).nonzero()[0])
                theirs = int(results["tokens"][0, where])
                self.problem = f"round {self.round} leaves {int(actual[where])} at {where}, the reference {theirs}"
        return {**results, "tokens": actual[None], "finished": ~(actual == self.mask).any()}

    def ties(self, theirs: Tensor, actual: Tensor) -> bool:
        """Whether the rule writes what the candidate wrote, given its logits, or some within the tolerance."""
        step = self.steps[self.round]
        own = self.read[self.rule]["logits"]
        at = {int(row): i for i, row in enumerate(step.rows if own.shape[1] == len(step.rows) else range(own.shape[1]))}
        mine, nudged = own.clone(), own.clone()
        mine[0, [at[int(row)] for row in step.rows]] = step.logits.to(own.dtype)
        by = 2 * TOLERANCE * self.floor  # two logits, each off by the tolerance
        for row in (actual != theirs).nonzero().flatten().tolist():
            source, token = at.get(max(row - self.shift, 0)), int(actual[row])
            if source is None:  # not computed, so filled after a stop token
                continue
            if token != self.mask:
                nudged[0, source, token] += by
            else:
                nudged[0, source, nudged[0, source].argmax()] -= by
        return any(torch.equal(self.written(logits), actual) for logits in (mine, nudged))

    def written(self, logits: Tensor) -> Tensor:
        """The canvas [T] that the reference's rule leaves, given these logits: its round from the rule on."""
        bodies = [list(calls(loop.body)) for loop in loops(self.oracle.program.control, "unmask")]
        body, at = next((b, i) for b in bodies for i, call in enumerate(b) if call.graph == self.rule)
        values: Values = {body[at].reads["logits"]: logits}
        for call in body[at:]:
            given = {n: values.get(v, self.read[call.graph][n]) for n, v in call.reads.items()}
            found = self.oracle.eager.call(call.graph, given)
            values |= {v: found[o] for o, v in call.writes.items()}
        return values["tokens"][0]


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
    forced, rounds = Forced(oracle, trace.steps[i], outcome), trace.steps[i]
    try:
        values = run(oracle.program, outcome.case.inputs(oracle.program, [i]), 0, forced)
    except Mismatch as mismatch:
        return str(mismatch)
    expected = [t for t in values["generated"][0].tolist() if t >= 0]
    if not forced.problem and any(not torch.equal(s.before, s.after) for s in rounds[forced.round :]):
        return f"changes the canvas in round {forced.round} of {len(rounds)}, after the reference's end"
    if not forced.problem and expected != trace.answers[i]:
        return f"answers {trace.answers[i][:8]}..., the reference {expected[:8]}..."
    return forced.problem
