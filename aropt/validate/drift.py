"""Drift: what a lossy pass changes, measured against the exact program, and held against a budget.

The candidate generates. On the very canvases that it came by, the exact forward says what each masked row of the block
at hand should have predicted; of a loop over positions, what each new row should have after the candidate's own ids
(teacher forcing: an early difference does not hide later ones). Then whole generations are compared, which says what a
user sees. Where the model has examples of a task, both do it (`aropt.validate.quality`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir import units
from aropt.ir.executor import Executor
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program
from aropt.loops.requests.cases import Case
from aropt.loops.runtime import workload as own_prompts
from aropt.loops.scheme import Round, scheme_of
from aropt.loops.unmask.blocks import current_block
from aropt.loops.unmask.smoothing import forward
from aropt.validate import compare as validate
from aropt.validate import quality
from aropt.validate.oracle import Forced, Oracle
from aropt.validate.replay import Trace

AT_MOST, AT_LEAST, SHARES = ("kl", "kl_max", "quality"), ("top1", "agreement"), ("top1", "agreement", "quality")
TOKENS, PROMPTS, AT_ONCE = 64, 4, 16  # new tokens, prompts, canvases of one exact forward


@dataclass(frozen=True)
class Drift:
    """`kl`: mean of KL(exact || candidate) in nats over all measured rows, `kl_max` the largest; `top1`: share of these
    with the same most likely id; `agreement`: share of the answers' ids that the exact program writes too; `first`: the
    first answer's position that differs (-1: none). `forwards` and `rows` of the candidate, `exact_forwards` and
    `exact_rows` of the exact program; `tokens`: of the answers. `steps`: [mean KL, top-1] of each round. `quality`,
    `exact_quality`: share of the `judged` ids of a task that both get right; None without examples.
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

    def metrics(self) -> dict[str, float]:
        """All that was measured but the curve."""
        return {k: v for k, v in asdict(self).items() if k != "steps" and v is not None}

    def misses(self, budget: Mapping[str, float]) -> str:
        """What is over the budget, in words; empty if nothing is. The bound of `quality` is on its loss."""
        lost = float("inf") if self.quality is None or self.exact_quality is None else self.exact_quality - self.quality
        found = {**self.metrics(), "quality": lost}
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
    if not scheme_of(program).fills:  # images are drawn: the likeliest ids of one are hardly any
        drawn = program.meta.get("modality") == "image" and "temperature" in program.inputs
        alone = "negative" in program.inputs and program.meta.get("null") is None
        return Case("drift", "greedy", tuple(prompts), n, params=(("temperature", 1.0),) if drawn else (),
                    negative=tuple(p[::-1] for p in prompts) if alone else ())  # fmt: skip
    block = int(program.meta.get("block") or 0)
    own = min(int(program.inputs["block"].default or n), n)
    params = () if block else (("block", float(own)),)
    return Case("drift", "greedy", tuple(prompts), n if block else n - n % own, params=params)


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
    case = case or workload(exact)
    if scheme_of(exact).forced:
        return positions(exact, candidate, executor, case)
    eager = Eager(exact)
    mine, theirs = Trace(candidate, case, executor or Eager(candidate)), Trace(exact, case, eager)
    rounds: list[list[tuple[Tensor, Tensor]]] = []
    for i in range(len(case.prompts)):
        inputs = case.inputs(exact, [i])
        for number, found in enumerate(sequence(exact, eager, inputs, mine.rounds[i])):
            if number == len(rounds):
                rounds.append([])
            rounds[number].append(found)
    kl, same = (torch.cat([x[k] for r in rounds for x in r]) for k in (0, 1))
    per_round = [(mean([x[0] for x in r]), mean([x[1] for x in r])) for r in rounds]
    forwards, exact_forwards = (sum(map(len, trace.rounds)) for trace in (mine, theirs))
    computed, all_rows = (sum(len(s.rows) for rounds in t.rounds for s in rounds) for t in (mine, theirs))
    scored: tuple[Any, ...] = ()
    if exact.meta.get("examples"):
        best, judged = known or quality.measure(exact, eager)
        scored = (quality.measure(candidate, executor)[0], best, judged)
    return Drift(
        float(kl.mean()),
        float(kl.max()),
        float(same.double().mean()),
        *agreement(mine.answers, theirs.answers),
        len(kl),
        sum(map(len, mine.answers)),
        forwards,
        exact_forwards,
        computed,
        all_rows,
        per_round,
        *scored,
    )


def positions(exact: Program, candidate: Program, executor: Executor | None, case: Case) -> Drift:
    """The drift of a loop over positions: of each new row of each prompt."""
    oracle = Oracle(exact)
    mine, theirs = (
        validate.Trace(p, case, e) for p, e in ((candidate, executor or Eager(candidate)), (exact, Eager(exact)))
    )
    rounds: list[list[tuple[Tensor, Tensor]]] = []
    for i, prompt in enumerate(case.prompts):
        forced = Forced(oracle, mine.tokens[i])
        run(exact, case.inputs(exact, [i]), 0, forced)
        want, before = torch.cat([single for single, _ in forced.forwards]), len(units.rows(exact.meta, prompt)) - 1
        for number, got in enumerate(mine.logits[i][: units.rows_for(exact.meta, len(mine.tokens[i]))]):
            rounds += [[]] if number == len(rounds) else []
            p, q = (guided(exact, x).reshape(-1, x.shape[-1]) for x in (want[: len(got), before + number], got))
            rounds[number].append(distance(p, q))  # a window's ids are rows
    kl, same = (torch.cat([x[k] for r in rounds for x in r]) for k in (0, 1))
    steps = [(mean([x[0] for x in r]), mean([x[1] for x in r])) for r in rounds]
    tokens, own = sum(map(len, mine.tokens)), sum(map(len, theirs.tokens))
    return Drift(
        float(kl.mean()), float(kl.max()), float(same.double().mean()), *agreement(mine.tokens, theirs.tokens), len(kl),
        tokens, len(rounds), max(map(len, theirs.logits)), tokens, own, steps,
    )  # fmt: skip


def guided(program: Program, logits: Tensor) -> Tensor:
    """What the rule draws from: of two branches [2, ...] by the default scale of guidance, of one [1, ...] itself."""
    if len(logits) == 1:
        return logits[0]
    scale = program.inputs["guidance"].default
    assert scale is not None
    return logits[1] + float(scale) * (logits[0] - logits[1])


def agreement(mine: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The share of equal ids of answers, and the first position where one differs (-1: none)."""
    pairs = [(a, b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=False)]
    found = [[a != b for a, b in zip(x, y, strict=False)] for x, y in zip(mine, theirs, strict=True)]
    firsts = [differs.index(True) for differs in found if True in differs]
    return sum(a == b for a, b in pairs) / max(len(pairs), 1), min(firsts, default=-1)


def mean(parts: list[Tensor]) -> float:
    return float(torch.cat(parts).double().mean())


def sequence(
    exact: Program, eager: Eager, inputs: Mapping[str, Any], steps: Sequence[Round]
) -> list[tuple[Tensor, Tensor]]:
    """For each round of a sequence: KL and agreement of the rows that predict the masks of the block at hand."""
    mask, shift = int(exact.meta["mask"]), int(bool(exact.meta.get("shift")))
    alive, values = [s for s in steps if bool((s.before == mask).any())], dict(inputs)
    if "expected" in exact.state:
        values["cursor"] = inputs["lengths"] - inputs["lengths"] - 1
        values["expected"] = exact.state["expected"].create({"B": 1, "T": len(steps[0].before)})
    found: list[tuple[Tensor, Tensor]] = []
    count = 1 if "expected" in values else AT_ONCE
    for start in range(0, len(alive), count):
        some = alive[start : start + count]
        canvases = torch.stack([s.before for s in some])
        if "expected" in values:  # a forward that reads what the one before found
            values |= forward(eager, exact.graphs, {**values, "tokens": canvases, "rounds": torch.tensor(start)})
            values["cursor"] = current_block(canvases, values["lengths"], values["origin"], values["block"], mask)[1]
        else:
            values |= eager.call("model", {"ids": canvases})
        logits = values["logits"]
        for step, canvas, want in zip(some, canvases, logits, strict=True):
            active = current_block(canvas[None], inputs["lengths"], inputs["origin"], inputs["block"], mask)[0][0]
            sources = (active.nonzero().flatten() - shift).clamp(min=0)
            at = {int(row): i for i, row in enumerate(step.rows)}
            found.append(distance(want[sources], step.evidence[[at[int(s)] for s in sources]], mask))
    return found


def distance(exact: Tensor, cached: Tensor, mask: int = -1) -> tuple[Tensor, Tensor]:
    """KL(exact || cached) in nats and whether the most likely ids agree, the mask id left out: logits [N, V] -> [N]."""
    hidden = torch.arange(exact.shape[-1]) == mask
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
