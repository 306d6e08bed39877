"""What a pass is: a frozen dataclass whose fields are its options, with a contract, `plan` and `run`."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from aropt.errors import UsageError
from aropt.ir.program import Call, Control, Graph, If, Loop, Program, Seq, calls, symbols

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

    def plan(self, program: Program, target: str) -> Applies | Skips: ...

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


def rewrite(control: Control, change: Callable[[Call], list[Control]]) -> Control:
    """The control with each call replaced by a list of nodes."""
    match control:
        case Call():
            new = change(control)
            return new[0] if len(new) == 1 else Seq(tuple(new))
        case Seq(body):
            parts: list[Control] = []
            for part in body:
                done = rewrite(part, change)
                parts.extend(done.body if isinstance(done, Seq) else [done])
            return parts[0] if len(parts) == 1 else Seq(tuple(parts))
        case If(cond, then, orelse):
            return If(cond, rewrite(then, change), rewrite(orelse, change))
        case Loop():
            return Loop(control.kind, control.until, rewrite(control.body, change), control.emits, control.params)


def own_sizes(graph: Graph) -> set[str]:
    """Symbols of a graph's results that its inputs don't give: sizes that only the values tell."""
    given = set().union(*(symbols(d) for spec in graph.inputs.values() for d in spec.dims))
    return set().union(*(symbols(d) for spec in graph.outputs.values() for d in spec.dims)) - given


def reads(control: Control) -> set[str]:
    """All values that a control node may read."""
    match control:
        case Seq(body):
            return {v for part in body for v in reads(part)}
        case If(cond, then, orelse):
            return {cond} | reads(then) | reads(orelse)
        case Loop():
            return {control.until} | reads(control.body)
        case Call():
            return set(control.reads.values())


def growing(call: Call, graph: Graph) -> set[str]:
    """Values that a call makes longer: it reads and writes them, and their new size depends on the old one."""
    read = {value: graph.inputs[name].dims for name, value in call.reads.items()}
    found = set()
    for output, value in call.writes.items():
        dims = graph.outputs[output].dims
        if any(old != new and symbols(new) for old, new in zip(read.get(value, dims), dims, strict=True)):
            found.add(value)
    return found


def loops(control: Control, kind: str | None = None) -> list[Loop]:
    """All loops, outer ones first."""
    match control:
        case Call():
            return []
        case Seq(body):
            return [loop for part in body for loop in loops(part, kind)]
        case If(_, then, orelse):
            return loops(then, kind) + loops(orelse, kind)
        case Loop():
            return ([control] if kind in (None, control.kind) else []) + loops(control.body, kind)


def donated(program: Program) -> dict[str, dict[str, str]]:
    """For each graph, the aliases that a target may update in place: every call writes the very value that it reads."""
    found = {n: dict(g.aliases) for n, g in program.graphs.items()}
    for call in calls(program.control):
        for output, source in list(found[call.graph].items()):
            if call.writes.get(output) != call.reads[source]:
                del found[call.graph][output]
    return found


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
