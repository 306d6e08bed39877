"""Validation of unmasking programs: round by round, on the candidate's own canvases.

The candidate generates. The reference's control then runs for each prompt alone, on the same canvases: what its commit
wrote is compared with what the candidate wrote, and then replaced by it, so that one early difference does not hide
later ones. Logits of the masked rows at hand must agree within a multiple of the noise floor. A row may be written
otherwise only where the reference's rule does the same with the candidate's logits, and these are within the tolerance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from aropt.interpreter import Executor, Values, run
from aropt.program import Program
from aropt.runtime import slots
from aropt.validate import TOLERANCE, Case, Mismatch, Oracle, Outcome, noise_floor

Params = Mapping[str, float]
RULES = ("greedy", "sample")


def cases(program: Program, seed: int = 0, quick: bool = False) -> list[Case]:
    """Boundary lengths, ragged batches, several blocks, greedy and sampled, the rule's parameters."""
    capacity, vocab, mask = (int(program.meta[k]) for k in ("capacity", "vocab", "mask"))
    own = bool(program.meta.get("block"))
    generator = torch.Generator().manual_seed(seed)
    made: list[Case] = []

    def prompt(length: int) -> tuple[int, ...]:
        ids = torch.randint(0, vocab - 1, (length,), generator=generator)
        return tuple((ids + (ids >= mask)).tolist())

    def case(
        name: str, kind: str, lengths: Sequence[int], n: int, given: Mapping[str, float] = {}, seed: int = 0
    ) -> None:
        room, params = max(1, min(n, capacity - max(lengths))), dict(given)
        block = int(min(params.pop("block", 8), room))
        if not own:
            room, params["block"] = room - room % block, block
        made.append(Case(name, kind, tuple(map(prompt, lengths)), room, seed, tuple(params.items())))

    usual = {"steps": 8.0, "threshold": 0.05, "factor": 1.0}
    several = {n: v for n, v in usual.items() if n in program.inputs}
    once = {n: 1.0 if n == "steps" else v for n, v in several.items()}
    third = max(1, min(9, capacity // 3))
    case("one token", "boundary", [1], 1)
    case("one block", "greedy", [3], 8, several)
    case("ragged greedy", "ragged", [third, 1, 2], 16, several)
    case("sampled", "sampled", [3], 16, {"temperature": 1.0}, seed + 1)
    case("ragged sampled", "ragged", [1, third], 16, {"temperature": 0.8, **several}, seed + 2)
    case("to capacity", "boundary", [max(1, capacity - 8)], 8, once)
    if not quick:
        case("one token a round", "greedy", [2], 24)
        case("blocks of two", "ragged", [4, 2], 12, {"block": 2})
        case("other seed", "sampled", [2, 2], 16, {"temperature": 1.3, **several}, 2**40 + seed)
    return made


class Trace:
    """A candidate's generation: for each prompt its canvas and logits [T, V] of each round, and its answer."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.canvases: list[list[Tensor]] = [[] for _ in case.prompts]
        self.logits: list[list[Tensor]] = [[] for _ in case.prompts]
        self.answers: list[list[int]] = [[] for _ in case.prompts]
        self.computed: list[list[Tensor]] = [[] for _ in case.prompts]  # which rows' logits these are
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)
            sizes = inputs["lengths"].tolist()

            def keep(values: Values, group: list[int] = group, sizes: list[int] = sizes) -> None:
                everything = torch.ones_like(values["tokens"], dtype=torch.bool)
                rows = (~everything).scatter(1, values["slots"], True) if "slots" in values else everything
                for j, i in enumerate(group):
                    self.computed[i].append(rows[j, -sizes[j] :].clone())
                    self.canvases[i].append(values["tokens"][j, -sizes[j] :].clone())
                    self.logits[i].append(values["logits"][j, -sizes[j] :].clone())
                if len(self.logits[group[0]]) > max(sizes):
                    raise Mismatch(f"does not end after {max(sizes)} rounds")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, values["generated"].tolist(), strict=True):
                self.answers[i] = [t for t in row if t >= 0]


class Forced:
    """Runs the reference's control on the candidate's canvases, and measures."""

    def __init__(self, oracle: Oracle, trace: Trace, row: int, outcome: Outcome) -> None:
        self.oracle, self.trace, self.row, self.outcome = oracle, trace, row, outcome
        self.round, self.problem, self.floor = 0, "", 0.0
        self.picked: tuple[str, Values] = ("", {})

    def call(self, graph: str, inputs: Values) -> Values:
        trace, canvases = self.trace, self.trace.canvases[self.row]
        if graph == self.oracle.model.graph:
            if self.round >= len(canvases):
                raise Mismatch(f"stops after {len(canvases)} rounds, the reference goes on")
            single, double = self.oracle.logits(inputs["ids"])
            masked = (inputs["ids"][0] == int(self.oracle.program.meta["mask"])) & trace.computed[self.row][self.round]
            self.measure(single[0, masked], double[0, masked], trace.logits[self.row][self.round][masked])
            return {"logits": single}
        results = self.oracle.eager.call(graph, inputs)
        if graph in RULES:
            self.picked = graph, inputs
        if graph == "commit":
            results = self.overruled(inputs, results, canvases[self.round])
            self.round += 1
        return results

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

    def overruled(self, inputs: Values, results: Values, actual: Tensor) -> Values:
        """The commit's results with the candidate's canvas in the place of its own."""
        if not torch.equal(results["tokens"][0], actual):
            if self.ties(inputs, results["tokens"][0], actual):
                self.outcome.ties += 1
            elif not self.problem:
                where = int((results["tokens"][0] != actual).nonzero()[0])
                theirs = int(results["tokens"][0, where])
                self.problem = f"round {self.round} leaves {int(actual[where])} at {where}, the reference {theirs}"
        left = (actual == int(self.oracle.program.meta["mask"])).any()
        return {**results, "tokens": actual[None], "finished": ~left}

    def ties(self, inputs: Values, theirs: Tensor, actual: Tensor) -> bool:
        """Whether the rule writes what the candidate wrote, given its logits, or some within the tolerance."""
        (graph, read), mask = self.picked, int(self.oracle.program.meta["mask"])
        nudged, masked = read["logits"].clone(), inputs["tokens"][0] == mask
        step = 2 * TOLERANCE * self.floor  # two logits, each off by the tolerance
        for row in (masked & (actual != theirs)).nonzero().flatten().tolist():
            source = max(row - bool(self.oracle.program.meta.get("shift")), 0)
            token = int(actual[row])
            if token != mask:
                nudged[0, source, token] += step
            else:
                nudged[0, source, nudged[0, source].argmax()] -= step
        for logits in (self.trace.logits[self.row][self.round][None], nudged):
            again = self.oracle.eager.call(graph, {**read, "logits": logits})
            if torch.equal(self.oracle.eager.call("commit", {**inputs, **again})["tokens"][0], actual):
                return True
        return False


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
    forced, canvases = Forced(oracle, trace, i, outcome), trace.canvases[i]
    try:
        values = run(oracle.program, outcome.case.inputs(oracle.program, [i]), 0, forced)
    except Mismatch as mismatch:
        return str(mismatch)
    expected = [t for t in values["generated"][0].tolist() if t >= 0]
    if not forced.problem and any(not torch.equal(c, canvases[forced.round - 1]) for c in canvases[forced.round :]):
        return f"changes the canvas in round {forced.round} of {len(canvases)}, after the reference's end"
    if not forced.problem and expected != trace.answers[i]:
        return f"answers {trace.answers[i][:8]}..., the reference {expected[:8]}..."
    return forced.problem
