"""Commit rules: which masked ids of a canvas a round writes, as tensor functions that are captured like a model.

A rule is one confidence, one schedule or test, and options; `chosen` puts them together. Confidences are logarithms of
probabilities, computed so that they don't saturate near probability 1: -log1p(sum over the others of exp(x - max)).
Ties go to the lowest position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.program import Input, Spec
from aropt.loops.unmask.ar_verifier import JUDGES

F32, I64 = torch.float32, torch.int64


def probability(logits: Tensor) -> Tensor:
    """Log-probability of the most likely token: logits [B, T, V] -> [B, T] (LLaDA, Nie et al. 2025, section 2.4)."""
    best, at = logits.max(-1, keepdim=True)
    others = torch.where(torch.arange(logits.shape[-1]) == at, 0.0, torch.exp(logits - best))
    return -torch.log1p(others.sum(-1))


def margin(logits: Tensor) -> Tensor:
    """Log of the difference between the two largest probabilities (Kim et al. 2025, section 4)."""
    two = torch.sort(logits, dim=-1, descending=True).values[..., :2]
    return probability(logits) + torch.log(-torch.expm1(two[..., 1] - two[..., 0]))


def entropy(logits: Tensor) -> Tensor:
    """Minus the entropy in nats (Dream, Ye et al. 2025)."""
    logs = torch.log_softmax(logits, -1)
    return torch.where(logs > -torch.inf, logs * logs.exp(), 0.0).sum(-1)


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": probability,
    "margin": margin,
    "entropy": entropy,
}


@dataclass(frozen=True)
class Round:
    """What a rule may look at: `active` bool and `confidence` float32 [B, T], the others int64 [B, 1].

    `active`: rows that may be written, masked ones of the block at hand and those masked again; `step`: the block's
    rounds so far; `masks`: its masked rows when it began; `left`: those it had before this round; `again`: how many of
    `active` this round masked again.
    """

    active: Tensor
    confidence: Tensor
    step: Tensor
    masks: Tensor
    left: Tensor
    again: Tensor

    @property
    def rank(self) -> Tensor:
        """Of the confidence among the active rows, 0 the highest: int64 [B, T]."""
        worst = torch.finfo(F32).min  # an active row comes before those that aren't, whatever it is worth
        return ranked(torch.where(self.active, self.confidence.clamp(min=worst), -torch.inf))


def ranked(score: Tensor) -> Tensor:
    """The rank of each value in its row, 0 the highest; of equal ones the first is higher: int64 [B, T]."""
    order = torch.sort(score, dim=1, descending=True, stable=True).indices
    return torch.sort(order, dim=1).indices


def uniform(round: Round, steps: Tensor) -> Tensor:
    """masks/steps rows a round, the remainder in the first rounds (LLaDA, generate.py)."""
    done = round.step + 1
    return round.masks - done * (round.masks // steps) - torch.minimum(done, round.masks % steps)


def cosine(round: Round, steps: Tensor) -> Tensor:
    """cos(pi/2 * done/steps) of the masks stay (MaskGIT, Chang et al. 2022, section 3.3)."""
    share = torch.cos(((round.step + 1).to(F32) / steps.to(F32)).clamp(max=1.0) * (torch.pi / 2))
    return torch.floor(round.masks.to(F32) * share + 1e-4).to(I64)


def shifted(round: Round, steps: Tensor, shift: Tensor) -> Tensor:
    """s*t/(1 + (s-1)*t) of the masks stay, t the share of rounds left (LaViDa, Li et al. 2025, section 3.2)."""
    t = 1 - ((round.step + 1).to(F32) / steps.to(F32)).clamp(max=1.0)
    return torch.floor(round.masks.to(F32) * shift * t / (1 + (shift - 1) * t) + 1e-4).to(I64)


def doubling(round: Round, steps: Tensor) -> Tensor:
    """2^i rows in round i, the rest in the last (ASS, 2509.23924, section 3.3)."""
    written = torch.pow(2, (round.step + 1).clamp(max=40)) - 1
    return torch.where(round.step + 1 >= steps, 0, round.masks - written)


SCHEDULES: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "cosine": cosine,
    "shifted": shifted,
    "doubling": doubling,
}


def threshold(round: Round, threshold: Tensor) -> Tensor:
    """Rows as likely as the threshold (Fast-dLLM, Wu et al. 2025, section 3.3)."""
    return round.confidence >= torch.log(threshold)


def factor(round: Round, factor: Tensor) -> Tensor:
    """The n most confident rows, n the largest with (n + 1) (1 - confidence of the n-th) < factor (Fast-dLLM, 3.3)."""
    return torch.exp(round.confidence) >= 1 - factor / (round.rank + 2)


def segments(round: Round, threshold: Tensor, low: Tensor) -> Tensor:
    """Rows above the threshold, and the best of each run of masks if above `low` (hierarchical, dInfer 2510.08666)."""
    size = round.active.shape[1]
    rows = torch.arange(size)
    before = round.active.index_select(1, (rows - 1).clamp(min=0)) & (rows > 0)
    run = (round.active & ~before).to(I64).cumsum(1)
    same = (run.unsqueeze(2) == run.unsqueeze(1)) & round.active.unsqueeze(1)
    first = torch.where(same, round.rank.unsqueeze(1), size).amin(2)
    best = (round.rank == first) & (round.confidence > torch.log(low))
    return best | (round.confidence > torch.log(threshold))


TESTS: dict[str, tuple[Callable[..., Tensor], dict[str, Input]]] = {
    "threshold": (threshold, {"threshold": Input(Spec(F32), 0.9, "probability from which a row is written", 0.0)}),
    "factor": (factor, {"factor": Input(Spec(F32), 1.0, "how much joint doubt a round may write", 0.0)}),
    "segments": (
        segments,
        {
            "threshold": Input(Spec(F32), 0.9, "probability above which a row is written", 0.0),
            "low": Input(Spec(F32), 0.4, "probability above which the best row of a run of masks is written", 0.0),
        },
    ),
}
STEPS = {"steps": Input(Spec(I64), 0, "rounds in all, or of each of a model's own blocks; 0: one for a row", 0)}
FLAGS = ("eoser", "credit", "smooth", "rcr", "remask")
KNOWN = (*CONFIDENCES, *SCHEDULES, *TESTS, *JUDGES, *FLAGS)  # the names of rules
SHIFT = {"shift": Input(Spec(F32), 0.33, "below 1: more rows in the first rounds", 0.0)}
EOSER = {"eos_gamma": Input(Spec(F32), 0.4, "what an end token's confidence is multiplied by at first", 0.0, 1.0)}
REMASK = {"remask_threshold": Input(Spec(F32), 0.4, "confidence below which a written row is masked again", 0.0)}
CREDIT = {  # of the graph that picks candidates, not of the commit
    "credit_weight": Input(Spec(F32), 0.7, "what the logarithm of 1 + credit is multiplied by in the logits", 0.0),
    "credit_power": Input(Spec(F32), 0.2, "power of its probability that the most likely id gains a round", 0.0),
    "credit_decay": Input(Spec(F32), 0.8, "share of its credit that an id keeps from round to round", 0.0, 1.0),
}
SMOOTH = {  # of the forward
    "smooth_start": Input(Spec(F32), 0.15, "share of the expected embedding that masks get in the second round", 0.0),
    "smooth_growth": Input(Spec(F32), 0.02, "what each later round adds to that share", 0.0),
    "smooth_most": Input(Spec(F32), 0.3, "the largest share", 0.0),
}


@dataclass(frozen=True)
class Rule:
    """A commit rule: `params` are the program's inputs for it."""

    confidence: str = "probability"
    schedule: str = "uniform"  # used where there is no test
    test: str = ""
    eoser: bool = False
    credit: bool = False  # logits are fused with what earlier rounds found (see aropt.loops.unmask.build.credited)
    smooth: bool = False  # masked rows are embedded as what was expected of them (see aropt.loops.unmask.smoothing)
    rcr: bool = False  # rows of the block at hand may be masked again (see aropt.loops.unmask.build.revised)
    remask: bool = False  # those of low confidence are (see aropt.loops.unmask.build.doubted)
    guide: str = ""  # how a guide's agreement is tested; then there is neither a schedule nor a test
    params: dict[str, Input] = field(default_factory=dict)

    def select(self, round: Round, **values: Tensor) -> Tensor:
        """bool [B, T]: the rows written in this round, of each row of the batch one more than it masked again."""
        if not self.test:
            return round.active & (round.rank < self.limits(round, **values)[0])
        function, params = TESTS[self.test]
        passed = round.active & function(round, **{n: values[n] for n in params})
        if not self.remask:
            return passed | (round.active & (round.rank == 0))
        missing = round.again + 1 - passed.to(I64).sum(1, keepdim=True)
        rest = replace(round, active=round.active & ~passed)
        return passed | (rest.active & (rest.rank < missing))

    def limits(self, round: Round, **values: Tensor) -> tuple[Tensor, Tensor]:
        """How many rows are written by rank, int64 [B, 1], and the confidence that is enough by itself, float32 []."""
        if self.test == "threshold":
            return round.again + 1, torch.log(values["threshold"])
        steps = torch.where(values["steps"] > 0, values["steps"], round.masks)
        extra = {"shift": values["shift"]} if self.schedule == "shifted" else {}
        keep = SCHEDULES[self.schedule](round, steps.clamp(min=1), **extra)
        return (round.left - keep).clamp(min=1) + round.again, torch.full((), torch.inf)


def chosen(names: tuple[str, ...]) -> Rule:
    """The rule of these names: at most one of each kind. Raises UsageError for an unknown name or two of a kind."""
    kinds: dict[str, dict[str, Any]] = {
        "confidence": CONFIDENCES,
        "schedule": SCHEDULES,
        "test": TESTS,
        "guide": JUDGES,
    }
    found: dict[str, str] = {}
    for name in names:
        kind = next((k for k, members in kinds.items() if name in members), "")
        if not kind and name not in FLAGS:
            raise UsageError(
                what=f"unknown rule '{name}'",
                why="it is not in the list of commit rules",
                hint="choose from " + ", ".join(KNOWN),
            )
        if kind in found:
            raise UsageError(
                what=f"two rules of a kind: '{found[kind]}' and '{name}'",
                why=f"a commit rule has one {kind}",
                hint="leave one out",
            )
        if kind:
            found[kind] = name
    deciding = [found[kind] for kind in ("schedule", "test", "guide") if kind in found]
    if len(deciding) > 1:
        raise UsageError(
            what=f"'{deciding[0]}' and '{deciding[1]}' don't go together",
            why=f"'{deciding[1]}' decides by itself how many rows a round writes",
            hint="leave one out",
        )
    check_flags(names, deciding)
    values: dict[str, Any] = {**found, **{flag: flag in names for flag in FLAGS}}
    return Rule(**values, params=parameters(names, found))


def check_flags(names: tuple[str, ...], deciding: list[str]) -> None:
    """Raises UsageError where an option has no part in what decides. `deciding`: the schedule, test or guide."""
    if "rcr" in names and deciding and deciding[0] not in SCHEDULES:
        raise UsageError(
            what=f"'rcr' and '{deciding[0]}' don't go together",
            why="how many rows are masked again follows from a schedule",
            hint="choose from " + ", ".join(SCHEDULES),
        )
    judge = next((n for n in deciding if n in JUDGES), "")
    reasons = {
        ("remask", "rcr"): "both decide which rows keep their ids",
        ("remask", judge): "what the guide accepted is kept",
        ("eoser", judge): "the guide decides, and not the confidence",
    }
    for (one, other), why in reasons.items():
        if one in names and other in names:
            raise UsageError(what=f"'{one}' and '{other}' don't go together", why=why, hint="leave one out")


def parameters(names: tuple[str, ...], found: dict[str, str]) -> dict[str, Input]:
    """The program's inputs for a rule; `found`: its members by kind."""
    if "guide" in found:
        params = dict(JUDGES[found["guide"]][1])
    else:
        params = dict(TESTS[found["test"]][1]) if "test" in found else dict(STEPS)
    options = {"shifted": SHIFT, "eoser": EOSER, "credit": CREDIT, "smooth": SMOOTH, "remask": REMASK}
    for name in options:
        params |= options[name] if name in names else {}
    return params
