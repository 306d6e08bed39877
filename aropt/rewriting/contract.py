"""What a pass is: a frozen dataclass whose fields are its options, with a contract, `plan` and `run`."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.rewriting.target import Target

LEVELS = ("bitwise", "rounding", "distribution", "lossy", "retrained")


@dataclass(frozen=True)
class Contract:
    """`level`: bitwise (same bits), rounding (same function up to reassociation), distribution (same sampling
    distribution), lossy (spends from a budget, and must name its metrics), retrained (another model, whose new weights
    are to be trained: `meta["needs_finetune"]` says how, and until then nothing ships)."""

    level: str
    requires: tuple[str, ...] = ()
    establishes: tuple[str, ...] = ()
    budget: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in LEVELS or (self.level == "lossy") != bool(self.budget):
            raise ValueError(f"a contract's level is one of {LEVELS}, and lossy ones name their budget")


@dataclass(frozen=True)
class Applies:
    """The pass will change the program. `matches`: where; `rejected`: (where, why not).

    `level`: where the program allows a stricter one than the contract's. `make`: the changed program, of what planning
    worked out already; without it, `Pass.run` begins anew.
    """

    matches: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    level: str = ""
    make: Callable[[], Program] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Skips:
    """The pass has nothing to do, or may not do it."""

    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


class Pass(Protocol):
    """A rewrite of programs. Pure: returns a new program, changes nothing in place."""

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def plan(self, program: Program, target: Target) -> Applies | Skips: ...

    def run(self, program: Program) -> Program: ...


@dataclass
class Result:
    """What the manager saw of one pass. `seconds` of the pass alone, `verify` what validation measured."""

    name: str
    status: str  # applied | skipped | reverted
    level: str
    reason: str = ""
    options: dict[str, object] = field(default_factory=dict)
    seconds: float = 0.0
    nodes: tuple[int, int] = (0, 0)
    bytes: tuple[int, int] = (0, 0)
    verify: dict[str, float] = field(default_factory=dict)
    matches: tuple[str, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    diff: str = ""
    drift: dict[str, object] = field(default_factory=dict)  # of a lossy pass: what it was measured to lose

    def failed(self) -> str:
        """What to tell of a pass that was planned and then failed; "" of any other."""
        broke = self.status == "reverted" and self.level != "lossy"
        return f"{self.name} failed and was left out, please report it: {self.reason}" if broke else ""


def broken(name: str, file: str, error: Exception) -> UsageError:
    """What to tell of a file in passes/ that holds no pass: the innermost line of it that failed."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return UsageError(
        what=f"the pass '{name}' can't be loaded",
        where=file + (f":{line}" if line else ""),
        why=f"{type(error).__name__}: {error}",
        hint=f"mend the file (docs/writing_passes.md says what it holds), or take '{name}' out of PASSES",
    )
