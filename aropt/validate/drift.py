"""Drift: what a lossy pass changes, measured against the exact program, and held against a budget.

The candidate generates. The exact program's control runs on its rounds (see `aropt.validate.replay`: an early
difference does not hide later ones), which says what each row that counts should have predicted: the masked ones of the
block at hand, the new one of a loop over positions. Then whole generations are compared, which says what a user sees.
Where the model has examples of a task, both do it (`aropt.validate.quality`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.loops.given import needs_negative, usual
from aropt.loops.request import workload as own_prompts
from aropt.loops.requests.cases import Case
from aropt.loops.scheme import Mismatch, Round, scheme_of
from aropt.validate import draws, quality
from aropt.validate.oracle import Oracle
from aropt.validate.replay import Trace, answer

AT_MOST, AT_LEAST = ("kl", "kl_max", "quality", "shift"), ("top1", "agreement")
SHARES = (*AT_LEAST, "quality", "shift")
TOKENS, PROMPTS = 64, 4  # new tokens, prompts


@dataclass(frozen=True)
class Drift:
    """`kl`: mean of KL(exact || candidate) in nats over all measured rows, `kl_max` the largest; `top1`: share of these
    with the same most likely id; `agreement`: share of the answers' ids that the exact program writes too; `first`: the
    first answer's position that differs (-1: none). `forwards` and `rows` of the candidate, `exact_forwards` and
    `exact_rows` of the exact program; `tokens`: of the answers. `steps`: [mean KL, top-1] of each round. `quality`,
    `exact_quality`: share of the `judged` ids of a task that both get right; None without examples. `shift`: how far
    `drawn` ids are shifted from the exact program's distribution (see validate/draws.py); None where it draws the same.
    """

    kl: float
    kl_max: float
    top1: float
    agreement: float
    first: int
    measured: int
    tokens: int
    forwards: int
    exact_forwards: int
    rows: int
    exact_rows: int
    steps: list[tuple[float, float]]
    quality: float | None = None
    exact_quality: float | None = None
    judged: int = 0
    shift: float | None = None
    drawn: int = 0

    def metrics(self) -> dict[str, float]:
        """All that was measured but the curve."""
        return {k: v for k, v in asdict(self).items() if k != "steps" and v is not None}

    def misses(self, budget: Mapping[str, float]) -> str:
        """What is over the budget, in words; empty if nothing is. The bound of `quality` is on its loss."""
        lost = float("inf") if self.quality is None or self.exact_quality is None else self.exact_quality - self.quality
        found = {**self.metrics(), "quality": lost, "shift": self.shift or 0.0}
        over = [
            f"{m} {found[m]:.4g}, at most {budget[m]:g}" for m in AT_MOST if m in budget and not found[m] <= budget[m]
        ]
        under = [
            f"{m} {found[m]:.4g}, at least {budget[m]:g}" for m in AT_LEAST if m in budget and not found[m] >= budget[m]
        ]
        return "; ".join(over + under)


def budget(text: str) -> dict[str, float]:
    """ "kl=0.05,top1=0.95" as {metric: bound}. Raises UsageError."""
    pairs = [part.partition("=") for part in filter(None, text.split(","))]
    return check_budget({name: value for name, _, value in pairs})


def check_budget(given: Mapping[str, Any]) -> dict[str, float]:
    """A budget, its bounds as numbers. Raises UsageError for a metric or a bound that there is not."""
    found: dict[str, float] = {}
    for name, value in given.items():
        if name not in (*AT_MOST, *AT_LEAST):
            raise UsageError(
                what=f"unknown metric '{name}'",
                where="--budget, budget= in Python",
                hint=f"at most: {', '.join(AT_MOST)}; at least: {', '.join(AT_LEAST)}",
            )
        try:
            found[name] = float(value)
        except (TypeError, ValueError):
            found[name] = -1.0
        if not 0 <= found[name] <= (1 if name in SHARES else float("inf")):
            raise UsageError(
                what=f"'{value}' is no bound for {name}",
                where="--budget, budget= in Python",
                hint=f"write a share, as {name}=0.95" if name in AT_LEAST else f"write a loss, as {name}=0.05",
            )
    return found


def workload(program: Program) -> Case:
    """The model's own prompts, as one batch, with the rule's default parameters. Raises UsageError without any."""
    found, n = own_prompts(program, PROMPTS, TOKENS)
    prompts, n = [tuple(p) for p in found], max(1, n)
    if not prompts:
        raise UsageError(what="there are no prompts to measure drift on", hint="give some: --prompts FILE, or prompts=")
    if not scheme_of(program).fills:
        negative = tuple(p[::-1] for p in prompts) if needs_negative(program) else ()
        return Case(tuple(prompts), n, params=tuple(usual(program).items()), negative=negative, name="drift")
    block = int(program.meta.get("block") or 0)
    own = min(int(program.inputs["block"].default or n), n)
    params = () if block else (("block", float(own)),)
    return Case(tuple(prompts), n if block else n - n % own, params=params, name="drift")


def measure(
    exact: Program,
    candidate: Program,
    executor: Executor | None = None,
    case: Case | None = None,
    known: tuple[float, int] | None = None,
) -> Drift:
    """The drift of a candidate (with its probe, see `validate.with_probe`) from the exact plain program.

    `known`: the exact program's quality, where it has been measured. Raises UsageError for examples that are none.
    """
    case, executor = case or workload(exact), executor or Eager(candidate)
    mine, theirs = Trace(candidate, case, executor), Trace(exact, case, Eager(exact))
    oracle, rounds = Single(exact), list[list[tuple[Tensor, Tensor]]]()
    for i in range(len(case.prompts)):
        for number, found in enumerate(sequence(oracle, case.inputs(exact, [i]), mine.rounds[i])):
            rounds += [[]] if number == len(rounds) else []
            rounds[number].append(found)
    kl, same = (torch.cat([x[k] for r in rounds for x in r]) for k in (0, 1))
    per_round = [(mean([x[0] for x in r]), mean([x[1] for x in r])) for r in rounds]
    forwards, exact_forwards = (sum(map(len, trace.rounds)) for trace in (mine, theirs))
    computed, all_rows = (sum(len(s.rows) for rounds in t.rounds for s in rounds) for t in (mine, theirs))
    others, scored = draws.measure(oracle, candidate, executor), dict[str, Any]()
    if exact.meta.get("examples"):
        best, judged = known or quality.measure(exact, Eager(exact))
        scored = {"quality": quality.measure(candidate, executor)[0], "exact_quality": best, "judged": judged}
    if others:
        scored |= {"shift": others.shift, "drawn": others.count}
    return Drift(
        float(kl.mean()), float(kl.max()), float(same.double().mean()), *agreement(mine.answers, theirs.answers),
        len(kl), sum(map(len, mine.answers)), forwards, exact_forwards, computed, all_rows, per_round, **scored,
    )  # fmt: skip


class Single(Oracle):
    """The exact program, of which nobody asks how noisy it is: fp32 alone."""

    def forward(self, inputs: Values, state: Values | None = None) -> tuple[Values, Values]:
        found = self.eager.call(self.model.graph, inputs)
        return found, found


def sequence(oracle: Oracle, inputs: Values, rounds: Sequence[Round]) -> list[tuple[Tensor, Tensor]]:
    """For each round of a sequence: KL and agreement of the rows that count.

    Raises Mismatch where the exact program can't follow.
    """
    scheme, program, found = scheme_of(oracle.program), oracle.program, []
    hidden = torch.zeros(program.meta["vocab"], dtype=torch.bool)
    hidden[list(scheme.hidden(program.meta))] = True
    reply = answer(oracle, inputs, rounds)
    if reply.problem:
        raise Mismatch(reply.problem)
    for one, round in zip(reply.rounds, rounds):
        exact = torch.zeros_like(round.evidence)
        exact[one.own] = one.evidence
        p, q = (scheme.counting(program, inputs, round, evidence) for evidence in (exact, round.evidence))
        found.append(distance(p, q, hidden))
    return found


def agreement(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The share of equal ids of answers, and the first position where one differs (-1: none)."""
    pairs = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    found = [[a != b for a, b in zip(x, y, strict=False)] for x, y in zip(mine, theirs, strict=True)]
    firsts = [differs.index(True) for differs in found if True in differs]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1), min(firsts, default=-1)


def mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def distance(exact: Tensor, cached: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """KL(exact || cached) in nats and whether the most likely ids agree, hidden ones left out: logits [N, V] -> [N]."""
    p, q = (torch.where(hidden, -torch.inf, x.double()).log_softmax(-1) for x in (exact, cached))
    terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
    return terms.sum(-1).clamp(min=0), p.argmax(-1) == q.argmax(-1)


def ledger(steps: Sequence[Round]) -> Tensor:
    """Which version of each row's keys and values each round of a sequence read: the round that computed them, -1 for
    none, int64 [rounds, T]."""
    versions = torch.full((len(steps), len(steps[0].before)), -1)
    for number, step in enumerate(steps):
        if number:
            versions[number] = versions[number - 1]
        versions[number, step.rows] = number
    return versions
