"""Which passes there are, in which order they run, and how one is made of text.

A pass is a file of passes/, named as the pass, that holds `PASS`; other packages have passes as entry points of the
group "aropt.passes", and a plugin's file brings one along (`aropt.pipeline.plugins`). When a pass runs and what it
comes after stand in its contract: the order is computed.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Iterable, Sequence
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import aropt.passes
from aropt.errors import UsageError
from aropt.rewriting.contract import Contract, Pass, broken

GROUP = "aropt.passes"
ADDED: dict[str, Any] = {}  # passes of plugins' files


@cache
def known() -> dict[str, EntryPoint]:
    """All passes by their names, those of plugins' files apart; nothing is imported."""
    files = [m.name for m in pkgutil.iter_modules(aropt.passes.__path__)]
    here = [EntryPoint(f.replace("_", "-"), f"aropt.passes.{f}:PASS", GROUP) for f in files]
    return {point.name: point for point in (*entry_points(group=GROUP), *here)}  # none takes a name of ours


def add(found: Any) -> None:
    """A pass more. Raises TypeError for what is none, and for a name that is taken."""
    name = getattr(found, "name", "")
    checked(found, name)
    if name in known() or ADDED.get(name, found) is not found:
        raise TypeError(f"there is a pass '{name}' already")
    ADDED[name] = found


def pass_class(name: str) -> Any:
    """The pass of that name. Raises UsageError for an unknown one, and for a file that holds no pass."""
    if name in ADDED:
        return ADDED[name]
    point = known().get(name)
    if point is None:
        every = sorted({*known(), *ADDED})
        raise UsageError(what=f"unknown pass '{name}'", hint="aropt passes lists them: " + ", ".join(every))
    try:
        return checked(point.load(), name)
    except Exception as error:  # whatever its author wrote
        file = point.module.removeprefix("aropt.").replace(".", "/") + ".py"
        raise broken(f"the pass '{name}'", file, error) from error


def checked(found: Any, name: str) -> Any:
    """A class that is to be the pass of that name. Raises TypeError for one that can't be."""
    lacking = [part for part in ("name", "contract", "plan", "run") if not hasattr(found, part)]
    if lacking or "__dataclass_fields__" not in vars(found):
        raise TypeError(f"PASS is no dataclass with {', '.join(lacking) or 'its options as fields'}")
    if found.name != name or not isinstance(found.contract, Contract):
        raise TypeError(f"PASS has no Contract, or another name than '{name}'")
    return found


def names(when: str = "") -> list[str]:
    """The passes that run `when` ("default", "tried", "asked"; all by default), each as early as `after` allows."""
    contracts = {name: pass_class(name).contract for name in sorted({*known(), *ADDED})}
    sorter = TopologicalSorter({n: [b for b in c.after if b in contracts] for n, c in contracts.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        raise UsageError(what="passes that come after each other", why=" after ".join(error.args[1])) from error
    found: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found += ready
        sorter.done(*ready)
    return [name for name in found if when in ("", contracts[name].when)]


def before(one: Pass) -> set[str]:
    """All passes that run before this one where they run."""
    found, left = set[str](), list(one.contract.after)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += pass_class(name).contract.after if name in known() or name in ADDED else ()
    return found


def check_order(passes: Sequence[Pass]) -> None:
    """Raises UsageError where a pass stands before one that it comes after."""
    for number, one in enumerate(passes):
        earlier = before(one)
        late = next((p.name for p in passes[number + 1 :] if p.name in earlier), None)
        if late is not None:
            raise UsageError(
                what=f"the pass {one.name} can't run before {late}",
                where="passes",
                why=f"its contract says that it comes after {', '.join(one.contract.after)}",
                hint=f"put {late} first; aropt.pipeline.registry.pipeline orders passes by itself",
            )


def inserted(passes: Sequence[Pass], one: Pass) -> list[Pass]:
    """The passes with one more, before those that come after it."""
    at = next((i for i, later in enumerate(passes) if one.name in before(later)), len(passes))
    return [*passes[:at], one, *passes[at:]]


def make(name: str, options: dict[str, str] | None = None) -> Pass:
    """A pass with its options, given as text. Raises UsageError for an unknown option or a bad value."""
    cls = pass_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in fields:
            raise UsageError(
                what=f"the pass '{name}' has no option '{key}'", hint="its options: " + (", ".join(fields) or "none")
            )
        default: Any = fields[key].default
        try:
            values[key] = (
                {"true": True, "false": False}[text.lower()] if isinstance(default, bool) else type(default)(text)
            )
        except (ValueError, KeyError):
            raise UsageError(
                what=f"'{text}' is no value for {name}:{key}", hint=f"give a {type(default).__name__}, as {default}"
            ) from None
    made: Pass = cls(**values)
    return made


def parse(text: str) -> tuple[str, dict[str, str]]:
    """ "name:k=v,k=v" -> (name, options)."""
    name, _, rest = text.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    wrong = [k for k, eq, _ in pairs if not eq]
    if wrong:
        raise UsageError(
            what=f"'{wrong[0]}' is not an option", where=f"--pass {text}", hint="write NAME:option=value,option=value"
        )
    return name, {k: v for k, _, v in pairs}


def pipeline(chosen: Iterable[str] = (), dropped: Iterable[str] = ()) -> list[Pass]:
    """The default passes and those of `chosen` ("name:k=v"), without `dropped`, in order."""
    options = dict(parse(text) for text in chosen)
    dropped = set(dropped)
    for name in (*options, *dropped):
        pass_class(name)
    wanted = ({*names("default"), *options}) - dropped
    return [make(name, options.get(name)) for name in names() if name in wanted]


def untold(chosen: Iterable[str] = (), dropped: Iterable[str] = (), more: Iterable[Pass] = ()) -> list[list[Pass]]:
    """Passes to be tried, `more` and all that the caller neither wants nor declines, with the options to try.

    Those of a list establish the same facts: one of them is kept, or none.
    """
    told, found = {parse(text)[0] for text in chosen} | set(dropped), dict[Any, list[Pass]]()
    usual = [(name, text) for name in names("tried") if name not in told for text in pass_class(name).contract.tries]
    for one in (*more, *(make(*parse(f"{name}:{text}")) for name, text in usual)):
        found.setdefault(one.contract.establishes or one.name, []).append(one)
    return list(found.values())
