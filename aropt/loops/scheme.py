"""Schemes: what a kind of loop means to those around it. One file a kind; `scheme_of` finds a program's.

The defaults are for rounds that decide values of all sequences at once, with no padding and no state but what the round
reads. A kind overrides what is otherwise with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.control import Loop
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Meta, Program
from aropt.loops.guards import Guard

MODULES = {"positions": "aropt.loops.positions", "unmask": "aropt.loops.unmask.scheme"}  # each has a SCHEME
REGISTERED: dict[str, Scheme] = {}  # those that were asked for, and those of other files
GROUP = "aropt.loops"


@cache
def installed() -> dict[str, EntryPoint]:
    """The kinds of loops of other packages; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in MODULES}


def add(made: Scheme) -> None:
    """A kind of loop more. Raises ValueError where its name is taken."""
    if made.kind in MODULES or made.kind in installed() or REGISTERED.get(made.kind, made) is not made:
        raise ValueError(f"there is a loop '{made.kind}' already")
    REGISTERED[made.kind] = made


NOTHING = torch.zeros(0)


class Mismatch(Exception):
    """The candidate's rounds can't be the reference's."""


@dataclass
class Round:
    """A round of one sequence, without padding: the loop's `decides` before and after it (-1: no id), the rows int64
    [N] that were computed, and their `evidence` [N, ...]. `drawn`: the ids are draws by another rule than the
    reference's, which has others.
    """

    loop: str  # its `decides`
    decided: Tensor
    evidence: Tensor
    rows: Tensor
    before: Tensor = NOTHING
    drawn: bool = False

    @property
    def ids(self) -> bool:
        return not self.decided.is_floating_point()

    @property
    def empty(self) -> bool:
        """Whether it decided no id: its sequence had ended."""
        return self.ids and bool((self.decided < 0).all())

    def differs(self, theirs: Tensor) -> Tensor:
        """Where an id is another one than in `theirs`."""
        return (self.decided != theirs) & (self.decided >= 0)


Prompts = Sequence[Sequence[int]]
Look = Callable[[Loop, Values], list[list[Round]]]  # a round's values, as rounds of each sequence


class Scheme:
    """What validation, and all others who do not know a loop's kind, ask about it."""

    kind = ""
    forced = False  # whether the forward on ids answers all that they begin with: no row sees one after it
    masked = False  # whether the model predicts ids that a mask hides (a masked language model)
    fills = False  # whether a request may give ids of the answer
    least = 0  # new ids of a request at least
    unread = 0  # rows that may be generated beyond the capacity, as no forward reads them
    requests: Any = None  # a class that makes what programs are compared on; None: Requests

    def claims(self, meta: Mapping[str, Any]) -> bool:
        """Whether a model with these facts is generated so, where nobody says how."""
        return False

    def check_model(self, meta: Mapping[str, Any]) -> None:
        """Raises UsageError for a model that can't be generated so."""

    def check_rules(self, rules: Sequence[str] | None, guided: bool) -> None:
        """Raises UsageError for rules, or a guide, that the loop can't have."""

    def build(
        self, model: Graph, weights: dict[str, Tensor], meta: Meta, rules: Sequence[str] | None, guide: Any
    ) -> Program:
        """The plain program of a captured forward."""
        raise NotImplementedError

    def hidden(self, meta: Mapping[str, Any]) -> set[int]:
        """Ids that no prompt holds."""
        return set()

    def inputs(
        self, program: Program, prompts: Prompts, n: int, params: Mapping[str, Any], fill: Prompts | None
    ) -> Values:
        """The values of a request that are the loop's own: prompts, and how much is asked for."""
        raise NotImplementedError

    def guard(self, program: Program) -> Guard | None:
        """What the program can't take, for the one-file export; None: nothing is looked at."""
        return None

    def rows(self, inputs: Values) -> int:
        """Rows of the longest sequence at its end."""
        return inputs["prompt"].shape[1] + int(inputs["limit"])

    def observe(self, program: Program, inputs: Values) -> Look:
        """Takes apart what a batch's rounds decide."""

        def look(loop: Loop, values: Values) -> list[list[Round]]:
            shown, seen = values[loop.shown], values[loop.evidence]
            rows = torch.arange(seen.shape[1] if seen.dim() > 1 else 1)
            pairs = zip(shown.clone().unbind(), seen.clone().unbind(), strict=True)
            return [[Round(loop.decides, decided, evidence, rows)] for decided, evidence in pairs]

        return look

    def most_rounds(self, inputs: Values) -> int:
        """More rounds than the generation can have."""
        return 2**20

    def foreseen(self, program: Program, inputs: Values, rounds: Sequence[Round]) -> list[Tensor]:
        """Ids [T, ...] that the forward of a sequence's rounds reads, so that one call answers them all; none where it
        reads more than that. `inputs` are the request's. A kind that is `forced` gives the longest ids alone.
        """
        return []

    def compared(self, program: Program, inputs: Values, round: Round, number: int) -> tuple[Any, Tensor]:
        """What of the reference's evidence is compared, as an index, and which of the round's own rows these are.

        `inputs` are the request's and those of the forward. Raises Mismatch where the round computed other rows.
        """
        return (0, round.rows), torch.ones(len(round.rows), dtype=torch.bool)

    def overrule(self, program: Program, results: Values, output: str, round: Round) -> Values:
        """The results of the call that decides, with the round's decision in the place of its own.

        None are given of a call that does nothing else: it is made later, of many rounds at once.
        """
        return {**results, output: round.decided[None]}

    def nudged(self, program: Program, evidence: Tensor, round: Round, decided: Tensor, by: float) -> list[Tensor]:
        """Evidence from which the reference's rule may decide as the candidate did.

        `evidence` [1, N, ...] is the reference's, from which it `decided`; `by` is what two logits may differ by.
        """
        mine, nudged = evidence.clone(), evidence.clone()
        mine[0] = round.evidence.to(mine.dtype)
        for at in round.differs(decided).nonzero().tolist():
            nudged[(0, *at, int(round.decided[tuple(at)]))] += by
        return [mine, nudged]

    def counting(self, program: Program, inputs: Values, round: Round, evidence: Tensor) -> Tensor:
        """Of evidence of the round's rows, what those predict that count for drift: logits [N, V]."""
        return evidence.flatten(0, -2)

    def chances(self, program: Program, given: Values, logits: Tensor) -> Tensor:
        """The chances of the ids that the rule draws by these logits [N, V], float64 [N, V]; `given`: what it reads."""
        raise NotImplementedError

    def redrawn(self, program: Program, given: Values, loop: Loop, values: Values) -> list[bool]:
        """Of each sequence of a round that draws by another rule, whether its ids are the ones of that rule.

        `given`: the request's inputs. None are given of a rule that keeps no distribution.
        """
        return []

    def idle(self, round: Round) -> bool:
        """Whether a round after the reference's end, as other sequences of the batch go on, changed nothing."""
        return not round.ids or round.empty

    def counted(self, program: Program, rounds: int) -> str:
        """So many rounds, in words."""
        return f"{rounds} rounds"

    def placed(self, program: Program, number: int, at: Sequence[int] = ()) -> str:
        """A round in words, or one of the ids that it decides."""
        return f"id {', '.join(map(str, at))} of round {number}" if at else f"round {number}"


def scheme_of(program: Program) -> Scheme:
    """The scheme of a program's outer loop."""
    return scheme_in(program.meta)


def scheme_in(meta: Mapping[str, Any]) -> Scheme:
    """The scheme of a program with this meta; without a word on it, the usual one."""
    return scheme(str(meta.get("loop") or kinds()[0]))


def scheme(kind: str) -> Scheme:
    """The scheme of a kind of loop. Raises UsageError for one that there is not."""
    if kind not in REGISTERED:
        if kind not in kinds():
            why, known = "neither aropt nor a plugin has one of that name", ", ".join(kinds())
            raise UsageError(what=f"unknown loop '{kind}'", where="--loop", why=why, hint="choose from " + known)
        elsewhere = installed().get(kind)
        REGISTERED[kind] = elsewhere.load() if elsewhere else import_module(MODULES[kind]).SCHEME
    return REGISTERED[kind]


def kinds() -> list[str]:
    """All kinds of loops, the usual one first."""
    return list(dict.fromkeys([*MODULES, *installed(), *REGISTERED]))


def scheme_for(meta: Mapping[str, Any]) -> Scheme:
    """The scheme by which a model with these facts is generated where nobody says how."""
    return next((scheme(kind) for kind in kinds() if scheme(kind).claims(meta)), scheme(kinds()[0]))
