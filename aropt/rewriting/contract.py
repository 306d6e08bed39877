"""What a pass is: a frozen dataclass whose fields are its options, with a contract, `plan` and `run`.

When a pass runs, what it comes after, and the facts that it requires and establishes stand in its contract and nowhere
else: the registry computes the order, and the manager checks the facts.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.rewriting.target import Target

LEVELS = ("bitwise", "rounding", "distribution", "lossy", "retrained")
WHEN = ("default", "tried", "asked")


@dataclass(frozen=True)
class Fact:
    """What may hold of a program: `lacking` says why it does not, or "" if it does."""

    name: str
    lacking: Callable[[Program], str] = field(compare=False, repr=False)


@dataclass(frozen=True)
class Contract:
    """`level`: bitwise (same bits), rounding (same function up to reassociation), distribution (same sampling
    distribution), lossy (spends from a budget, and must name its metrics), retrained (another model, whose new weights
    are to be trained: `meta["needs_finetune"]` says how, and until then nothing ships).

    `when`: by default, where the caller asks for it, or tried: timed with the options of each of `tries`
    ("drafts=8,group=64"), and kept where it pays. `after`: names of passes that run before this one. `requires`: facts
    without which the pass is skipped; `establishes`: facts that hold after it. `budget`: the metrics that show what a
    lossy pass loses, of which the caller bounds one at least. `refresh`: values of the option
    `refresh` that a lossy pass falls back on, one after the other, while it misses the budget.
    """

    level: str
    when: str = "default"
    after: tuple[str, ...] = ()
    requires: tuple[Fact, ...] = ()
    establishes: tuple[Fact, ...] = ()
    budget: tuple[str, ...] = ()
    tries: tuple[str, ...] = ()
    refresh: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.level not in LEVELS or (self.level == "lossy") != bool(self.budget):
            raise ValueError(f"a contract's level is one of {LEVELS}, and lossy ones name their budget")
        if self.when not in WHEN or (self.when == "tried") != bool(self.tries):
            raise ValueError(f"a pass runs when it is one of {WHEN}, and tried ones say with which options")
        if self.level in ("lossy", "retrained") and self.when != "asked":
            raise ValueError(f"a {self.level} pass runs where it is asked for")


@dataclass(frozen=True)
class Applies:
    """The pass will change the program. `matches`: where; `rejected`: (where, why not).

    `level`: where the program allows a stricter one than the contract's. `memory`: bytes that a sequence takes besides
    state, by what they are for. `make`: the changed program, of what planning worked out already; without it `Pass.run`
    begins anew.
    """

    matches: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...] = ()
    level: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)
    make: Callable[[], Program] | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Skips:
    """The pass has nothing to do, or may not do it."""

    reason: str
    rejected: tuple[tuple[str, str], ...] = ()


class Pass(Protocol):
    """A rewrite of programs. Pure: returns a new program, changes nothing in place.

    One that makes drafts has `source`, what makes them: the "text", the model it"self", or another "model".
    """

    name: ClassVar[str]
    contract: ClassVar[Contract]

    def plan(self, program: Program, target: Target) -> Applies | Skips: ...

    def run(self, program: Program) -> Program: ...


def planned(one: Pass, program: Program, target: Target) -> Applies | Skips:
    """The plan of a pass, or the first fact that it requires and the program lacks."""
    lacking = next(filter(None, (fact.lacking(program) for fact in one.contract.requires)), "")
    return Skips(lacking) if lacking else one.plan(program, target)


def unkept(one: Pass, program: Program) -> str:
    """The first fact that a pass establishes by its contract and the program that it made lacks, or ""."""
    lacking = ((fact.name, fact.lacking(program)) for fact in one.contract.establishes)
    return next((f"its contract establishes '{name}', but {why}" for name, why in lacking if why), "")


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
    memory: Mapping[str, int] = field(default_factory=dict)
    diff: str = ""
    drift: dict[str, object] = field(default_factory=dict)  # of a lossy pass: what it was measured to lose

    def failed(self) -> str:
        """What to tell of a pass that was planned and then failed; "" of any other."""
        broke = self.status == "reverted" and self.level != "lossy"
        return f"{self.name} failed and was left out, please report it: {self.reason}" if broke else ""


def broken(what: str, file: str, error: Exception) -> UsageError:
    """What to tell of a file that does not hold what it should: the innermost line of it that failed."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename.endswith(file)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return UsageError(
        what=f"{what} can't be loaded",
        where=file + (f":{line}" if line else ""),
        why=f"{type(error).__name__}: {error}",
        hint="mend the file (docs/writing_passes.md says what it holds), or take it away",
    )
