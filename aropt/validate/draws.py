"""Draws that are others than the reference's: whether they have its distribution (see `Loop.drawn`).

A draw x by chances p has the place (what p gives the ids before x) + v p(x), where ids stand in the order of their
chances and v is uniform. Whatever p is, the places of ids with the reference's distribution are uniform, each whatever
the others are (Rosenblatt 1952). So all ids that a program draws are measured together: the largest distance between
the distribution of their places and the uniform one (Kolmogorov and Smirnov's) is the part of the mass that is shifted
to likelier or less likely ids. Of n ids a distance above d comes by chance with a probability of at most
2 exp(-2 n d^2) (Massart 1990), so that of 4096 ids one of 0.043 is seen for certain, and far smaller ones are not.

The mechanism is replayed too: what a round drew by, its drafts and their chances, are values of it (`Loop.drafts`), and
its ids are those that the rule gives of them (`Scheme.redrawn`). That sees what a shift is too small to show.

Requests that share streams, seed and places draw by the same noise: these here have streams of their own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aropt.ir.control import drawn
from aropt.ir.executor import Executor
from aropt.ir.program import Program
from aropt.loops.request import fitted, room
from aropt.loops.requests.cases import Case
from aropt.loops.requests.prompts import prompt
from aropt.loops.scheme import Mismatch, scheme_of
from aropt.validate.oracle import Oracle
from aropt.validate.replay import Trace, answer, otherwise
from aropt.validate.verdict import Outcome

IDS, NEW = 4096, 64  # that are drawn, and those of a sequence at most
BATCHES = (8, 1)  # sequences at once, as rounds check drafts of small batches
RARE = 1e-6  # a distance that comes by chance less often is none of chance
SEED, LEAST, MOST = 5, 4, 512  # ids of a random prompt; sequences


@dataclass(frozen=True)
class Draws:
    """`shift`: the distance of the places of `count` ids from uniform ones, 0 to 1. Of `redrawn` rounds of a sequence,
    `others` have other ids than the rule gives of what they drew by; `wrong`: that these are too many, in words.
    """

    shift: float
    count: int
    redrawn: int = 0
    others: int = 0
    wrong: str = ""

    def metrics(self) -> dict[str, float]:
        return {
            "drawn": self.count,
            "shift": self.shift,
            "shift_chance": self.chance,
            "redrawn": self.redrawn,
            "others": self.others,
        }

    @property
    def chance(self) -> float:
        """How often a distance as large comes by chance, at most."""
        return min(1.0, 2 * math.exp(-2 * self.count * self.shift**2))


def measure(oracle: Oracle, candidate: Program, executor: Executor) -> Draws | None:
    """What a candidate draws by other rules than the reference; None where it does not.

    Raises Mismatch where the reference can't follow, and where no id is drawn so.
    """
    if not drawn(candidate.control):
        return None
    for batch in BATCHES:
        found, redrawn = list[float](), list[bool]()
        for case in workload(oracle.program, batch):
            trace = Trace(candidate, case, executor)
            found += places(oracle, trace, case)
            redrawn += trace.redrawn
        if found:
            shift = shifted(torch.tensor(found, dtype=torch.float64))
            return Draws(shift, len(found), len(redrawn), redrawn.count(False), otherwise(redrawn))
    raise Mismatch("no id is drawn by the rules of acceptance that the program has")


def shifted(places: Tensor) -> float:
    """The largest distance between the distribution of these places and the uniform one."""
    ordered, count = places.sort().values, len(places)
    steps = torch.arange(count + 1, dtype=torch.float64) / count
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())


def workload(program: Program, batch: int) -> Iterator[Case]:
    """Requests that draw with streams of their own: after the model's prompts, or random ones where these are short."""
    chance = random.Random(SEED)
    given = [tuple(fitted(program, p)) for p in program.meta.get("prompts", ())]
    given = [p for p in given if len(p) >= LEAST]
    given = given or [prompt(program, LEAST, 0, chance) for _ in range(MOST)]
    new = min(NEW, *(room(program, p) for p in given))
    for start in range(0, min(MOST, IDS // max(1, new)), batch):
        streams, params = tuple(range(start, start + batch)), (("temperature", 1.0),)
        prompts = tuple(given[i % len(given)] for i in streams)
        yield Case(prompts, new, SEED, params, streams=streams, name="draws", kind="sampled")


def places(oracle: Oracle, trace: Trace, case: Case) -> Iterator[float]:
    """The place of each id that is drawn otherwise. Raises Mismatch where the reference can't follow."""
    scheme = scheme_of(oracle.program)
    uniform = random.Random(case.streams[0])
    for i, rounds in enumerate(trace.rounds):
        inputs = case.inputs(oracle.program, [i])
        reply = answer(oracle, inputs, rounds)
        if reply.problem:
            raise Mismatch(reply.problem)
        for one, round in zip(reply.rounds, rounds):
            if round.drawn:
                logits = scheme.counting(oracle.program, inputs, round, one.evidence)
                p = scheme.chances(oracle.program, inputs, logits)[0]
                yield place(p, int(round.decided), uniform.random())


def place(p: Tensor, token: int, uniform: float) -> float:
    """Where a draw of the chances [V] stands."""
    before = (p > p[token]) | ((p == p[token]) & (torch.arange(len(p)) < token))
    return float(torch.where(before, p, 0.0).sum() + uniform * p[token])


def compared(oracle: Oracle, candidate: Program, executor: Executor) -> tuple[Outcome, Draws | None]:
    """The case of a candidate whose draws are to have the reference's distribution, and what was measured."""
    outcome = Outcome(next(workload(oracle.program, BATCHES[0])))
    try:
        found = measure(oracle, candidate, executor)
    except Mismatch as mismatch:
        outcome.problem, found = str(mismatch), None
    if found is not None:
        outcome.tokens, outcome.problem = found.count, found.wrong
        if found.chance < RARE:
            outcome.problem = (
                f"{found.count} ids that are drawn do not have the reference's distribution: "
                f"they are shifted by {found.shift:.3f}, which comes by chance with a probability of {found.chance:.0e}"
            )
    return outcome, found
