"""What validation found: outcomes of cases, and a verdict over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aropt.loops.requests.cases import Case

TOLERANCE = 16.0  # times the noise floor: two roundings in other orders, over many rows


@dataclass
class Outcome:
    """What a case measured. `error` and `floor` are in logits; `ratio` is error / floor."""

    case: Case
    error: float = 0.0
    floor: float = 0.0
    ties: int = 0
    tokens: int = 0
    problem: str = ""
    row: int = 0  # the prompt that it is about
    generated: list[list[int]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return self.error / self.floor if self.floor else 0.0

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass
class Verdict:
    """All outcomes, and where the first failing case diverges."""

    outcomes: list[Outcome] = field(default_factory=list)
    diverges: dict[str, Any] | None = None
    coverage: dict[str, Any] | None = None  # of the requests, see `Requests.coverage`
    draws: dict[str, float] = field(default_factory=dict)  # of ids by another rule than the reference's

    @property
    def passed(self) -> bool:
        """Whether something was compared, and nothing failed."""
        return bool(self.outcomes) and all(o.passed for o in self.outcomes)

    def metrics(self) -> dict[str, float]:
        return {
            "cases": len(self.outcomes), "tokens": sum(o.tokens for o in self.outcomes),
            "ties": sum(o.ties for o in self.outcomes), "max_error": max((o.error for o in self.outcomes), default=0.0),
            "max_ratio": max((o.ratio for o in self.outcomes), default=0.0), "tolerance_ratio": TOLERANCE,
            **self.draws,
        }  # fmt: skip
