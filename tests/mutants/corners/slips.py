"""How a slip is written down: a small edit of one base, and a request that it answers otherwise."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.control import calls
from aropt.ir.program import Program
from aropt.validate.compare import validate
from aropt.validate.oracle import Oracle
from tests.mutants.corners.bases import VOCAB, base
from tests.mutants.surgery import Change, edited, insert
from tests.support.run import generate

Stop = int | tuple[int, int] | str


@dataclass(frozen=True)
class Request:
    """Prompts of these lengths, what else `generate` takes, and ids to stop at.

    A stop is an id; (row, i), what the right program emits there; "late N", the id that comes up last in most of row N;
    "in N", one that the prompt of row N holds and its answer too; or "none", an id that is not emitted.
    """

    lengths: tuple[int, ...]
    n: int
    stop: tuple[Stop, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[tuple[int, ...], ...] = ()

    def given(self) -> list[list[int]]:
        """The prompts, drawn where they are not given."""
        generator = torch.Generator().manual_seed(len(self.lengths) * 1000 + self.n)
        drawn = [torch.randint(0, VOCAB, (size,), generator=generator).tolist() for size in self.lengths]
        return [list(p) for p in self.prompts] or drawn

    def run(self, program: Program, stop: Sequence[int] = (), executor: Any = None) -> list[list[int]]:
        return generate(program, self.given(), self.n, stop=list(stop), executor=executor, **self.options)

    def stops(self, right: Program) -> list[int]:
        """The ids to stop at, some of which are what the right program emits."""
        rows = self.run(right) if any(not isinstance(s, int) for s in self.stop) else []
        return [self.id_of(s, rows) for s in self.stop]

    def id_of(self, stop: Stop, rows: list[list[int]]) -> int:
        if isinstance(stop, int):
            return stop
        if isinstance(stop, tuple):
            return rows[stop[0]][stop[1]]
        kind, _, row = stop.partition(" ")
        if kind == "late":
            early = rows[int(row)][: len(rows[int(row)]) * 3 // 4]
            return max(set(early), key=early.index)
        if kind == "in":
            return next(t for t in rows[int(row)] if t in self.given()[int(row)])
        return next(t for t in range(VOCAB) if not any(t in r for r in rows))


def ask(lengths: int | Sequence[int], n: int, stop: Sequence[Stop] = (), **options: Any) -> Request:
    """A request; `lengths`: of each prompt, or how many prompts of five ids. `prompts` gives their ids."""
    prompts = tuple(map(tuple, options.pop("prompts", ())))
    sizes = (5,) * lengths if isinstance(lengths, int) else tuple(lengths)
    return Request(sizes, n, tuple(stop), options, prompts)


@dataclass(frozen=True)
class Slip:
    """What is done to which base, what shows it, and what else than the interpreter runs the program."""

    family: str
    base: str
    change: Change
    shown: Request
    lowered: Callable[[Program], AbstractContextManager[tuple[Any, str]]] = lambda _: nullcontext((None, ""))


SLIPS: dict[str, Slip] = {}


def slip(name: str, of: str, shown: Request, change: Change, family: str) -> None:
    """Registers a slip under a name of its own."""
    assert name not in SLIPS, name
    SLIPS[name] = Slip(family, of, change, shown)


def family(name: str) -> Callable[[str, str, Request, Change], None]:
    """`slip` for one family."""
    return lambda *given: slip(*given, family=name)


# --- edits ----------------------------------------------------------------------------------------------------------


def give(value: str, function: Callable[..., Any], *reads: str, graph: str = "") -> Change:
    """Makes what graphs compute as that value function(value, *inputs of the graph); `graph`: part of their names."""

    def node_of(program: Program, name: str, part: fx.Graph) -> fx.Node | None:
        named = next((n for n in part.nodes if n.op == "call_function" and n.meta.get("value") == value), None)
        results = dict(zip(program.graphs[name].outputs, output(part).args[0], strict=True))
        made = {v: results[o] for c in calls(program.control) if c.graph == name for o, v in c.writes.items()}
        return named or made.get(value) or results.get(value)

    return placed(node_of, function, reads, graph)


def take(name: str, function: Callable[..., Any], *reads: str, graph: str = "") -> Change:
    """Makes what graphs read as that input function(input, *other inputs)."""

    def node_of(program: Program, _: str, part: fx.Graph) -> fx.Node | None:
        return next((n for n in part.nodes if n.op == "placeholder" and n.target == name), None)

    return placed(node_of, function, reads, graph)


def output(part: fx.Graph) -> fx.Node:
    return next(n for n in part.nodes if n.op == "output")


def placed(
    node_of: Callable[[Program, str, fx.Graph], fx.Node | None],
    function: Callable[..., Any],
    reads: tuple[str, ...],
    graph: str,
) -> Change:
    def change(program: Program) -> Program:
        def one(name: str, part: fx.Graph) -> int:
            node = node_of(program, name, part)
            places = {n.target: n for n in part.nodes if n.op == "placeholder"}
            if node is None or not set(reads) <= set(places):
                return 0
            users = list(node.users)
            last = [n for n in part.nodes if n is node or n.op == "placeholder"][-1]
            new = insert(part, last, function, node, *(places[r] for r in reads))
            new.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, new)
            return 1

        return edited(program, {n for n in program.graphs if graph in n}, one)

    return change


def where(condition: Any, wrong: Any, right: Tensor) -> Tensor:
    """torch.where for conditions and values that may be plain numbers."""
    return torch.where(torch.as_tensor(condition), torch.as_tensor(wrong, dtype=right.dtype), right)


def patched(value: Tensor, rows: Any, function: Callable[[Tensor], Any]) -> Tensor:
    """A copy with some of its rows changed."""
    value = value.clone()
    value[rows] = function(value[rows])
    return value


# --- running them ---------------------------------------------------------------------------------------------------


@functools.cache
def oracle(name: str) -> Oracle:
    """What the base of that name is compared with, which keeps its answers."""
    return Oracle(base(name).reference)


def problem(name: str) -> str:
    """What validation finds wrong in a slip, with all cases, as after lowering; nothing if it misses it."""
    one = SLIPS[name]
    right = base(one.base)
    wrong = one.change(right.program)
    with one.lowered(wrong) as (executor, found):
        if executor is not None and executor.way == "single-call":
            return found  # of the whole loop, which is compared and not validated
        verdict = validate(oracle(one.base), wrong, executor, explain=False)
    failed = verdict.outcomes[-1]
    return "" if verdict.passed else f"{failed.case.name}: {failed.problem}"


def answers(name: str) -> tuple[list[list[int]], list[list[int]]]:
    """What the right program answers to the slip's request, and what the wrong one does."""
    one = SLIPS[name]
    right = base(one.base).program
    stop, wrong = one.shown.stops(right), one.change(right)
    with one.lowered(wrong) as (executor, _):
        return one.shown.run(right, stop), one.shown.run(wrong, stop, executor)
