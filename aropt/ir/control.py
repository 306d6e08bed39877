"""Control: which graphs run in which order, and the walks over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


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
    `kind` ("positions", "blocks", "unmask", ...) and `params` carry the intent that passes match on.
    """

    kind: str
    until: str
    body: Control
    emits: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)


Control = Seq | If | Loop | Call


def calls(control: Control) -> Iterator[Call]:
    """All calls, in textual order."""
    match control:
        case Call():
            yield control
        case Seq(body):
            for part in body:
                yield from calls(part)
        case If(_, then, orelse):
            yield from calls(then)
            yield from calls(orelse)
        case Loop():
            yield from calls(control.body)


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
