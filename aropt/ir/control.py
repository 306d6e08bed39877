"""Control: which graphs run in which order, and the walks over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Runs a graph: `reads` maps its inputs to values, `writes` maps its outputs to values."""

    graph: str
    reads: dict[str, str]
    writes: dict[str, str]


@dataclass(frozen=True)
class Seq:
    body: tuple[Control, ...]


@dataclass(frozen=True)
class If:
    """`cond` names a bool[] value."""

    cond: str
    then: Control
    orelse: Control


@dataclass(frozen=True)
class Loop:
    """Runs `body` while the bool[] value `until` is false (tested before each round).

    `emits` maps a value written in the body to the value that collects it over the rounds, stacked along axis 1.
    `kind` is for people. What a round means is said by roles, which are names of values: `decides` is what it decided
    (ids, of which -1 is none, or latents), `evidence` is what it decided them from (logits, a velocity), both with the
    batch first. Where a round computes more than it decides, `at` int64 [B, P] says which rows of the evidence [B * N]
    of its sequence each decided id is from (-1: none). A pass may fuse them away; validation exposes them again. The
    rounds of an `internal` loop (drafts) are none of the generation: nobody watches them. `drawn`: its ids are other
    draws than those of the plain loop, of the same distribution ("distribution") or of one like it ("lossy"); what it
    draws them by, besides the evidence, are the values `drafts`.
    """

    kind: str
    until: str
    body: Control
    emits: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    decides: str = ""
    evidence: str = ""
    internal: bool = False
    at: str = ""
    drawn: str = ""
    drafts: tuple[str, ...] = ()

    @property
    def roles(self) -> set[str]:
        """The values that say what a round means."""
        return {self.decides, self.evidence, self.at, *self.drafts} - {""}

    @property
    def shown(self) -> str:
        """The value that holds what a round decided, for who watches it: every program has it."""
        return next(iter(self.emits), self.decides)


Control = Seq | If | Loop | Call


def parts(control: Control) -> tuple[Control, ...]:
    """The nodes right inside a node."""
    match control:
        case Seq(body):
            return body
        case If(_, then, orelse):
            return then, orelse
        case Loop():
            return (control.body,)
        case Call():
            return ()


def map_parts(control: Control, change: Callable[[Control], Control]) -> Control:
    """The node with each of its parts changed; a Seq in a Seq is spliced into it."""
    match control:
        case Seq(body):
            return replace(control, body=tuple(node for part in body for node in sequence(change(part))))
        case If(_, then, orelse):
            return replace(control, then=change(then), orelse=change(orelse))
        case Loop():
            return replace(control, body=change(control.body))
        case Call():
            return control


def sequence(control: Control) -> tuple[Control, ...]:
    """The nodes that run one after the other: a Seq's, or the node itself."""
    return control.body if isinstance(control, Seq) else (control,)


def walk(control: Control) -> Iterator[Control]:
    """All nodes in textual order, outer ones first."""
    yield control
    for part in parts(control):
        yield from walk(part)


def transform(control: Control, visit: Callable[[Control], Control]) -> Control:
    """The control with each node replaced by what `visit` makes of it, after its parts; a Seq of one is that one."""
    done = visit(map_parts(control, lambda part: transform(part, visit)))
    return done.body[0] if isinstance(done, Seq) and len(done.body) == 1 else done


def fold(
    control: Control,
    *,
    call: Callable[[Call], T],
    seq: Callable[[list[T]], T],
    if_: Callable[[If, T, T], T],
    loop: Callable[[Loop, T], T],
) -> T:
    """One value for the whole control: each function gets its node's values for the parts."""
    again = partial(fold, call=call, seq=seq, if_=if_, loop=loop)
    match control:
        case Call():
            return call(control)
        case Seq(body):
            return seq([again(part) for part in body])
        case If(_, then, orelse):
            return if_(control, again(then), again(orelse))
        case Loop():
            return loop(control, again(control.body))


def calls(control: Control) -> Iterator[Call]:
    """All calls, in textual order."""
    return (node for node in walk(control) if isinstance(node, Call))


def loops(control: Control, kind: str | None = None) -> list[Loop]:
    """All loops, outer ones first."""
    return [node for node in walk(control) if isinstance(node, Loop) and kind in (None, node.kind)]


def drawn(control: Control) -> set[str]:
    """How ids of its loops compare with the draws of plain ones, where these are others (see Loop)."""
    return {loop.drawn for loop in loops(control)} - {""}


def conditions(control: Control) -> set[str]:
    """Values that branches and loops test."""
    tested = {node.cond for node in walk(control) if isinstance(node, If)}
    return tested | {loop.until for loop in loops(control)}


def reads(control: Control) -> set[str]:
    """All values that a control node may read."""
    return conditions(control).union(*(call.reads.values() for call in calls(control)))


def writes(control: Control, certain: bool = False) -> set[str]:
    """All values that a control node may write; `certain`: that it writes on every path."""
    return fold(
        control,
        call=lambda call: set(call.writes.values()),
        seq=lambda parts: set().union(*parts),
        if_=lambda _, then, orelse: then & orelse if certain else then | orelse,
        loop=lambda loop, body: set(loop.emits.values()) | (set() if certain else body),
    )


def renamed(call: Call, values: Mapping[str, str]) -> Call:
    """The call on other values: {value: the one in its place}."""
    reads, writes = ({n: values.get(v, v) for n, v in given.items()} for given in (call.reads, call.writes))
    return replace(call, reads=reads, writes=writes)


def rewrite(control: Control, change: Callable[[Call], list[Control]]) -> Control:
    """The control with each call replaced by a list of nodes."""

    def visit(node: Control) -> Control:
        if not isinstance(node, Call):
            return node
        new = change(node)
        return new[0] if len(new) == 1 else Seq(tuple(new))

    return transform(control, visit)
