"""Ops by name: the files of kernels/, entry points of other packages, and plugins; imported when they are asked for."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

import aropt.kernels

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from aropt.ir.opdef import OpDef

GROUP = "aropt.ops"
NAMES: tuple[str, ...] = tuple(sorted(m.name for m in pkgutil.iter_modules(aropt.kernels.__path__)))
ADDED: dict[str, OpDef] = {}  # ops of plugins' files


@cache
def installed() -> dict[str, EntryPoint]:
    """The ops of other packages by their names; nothing is imported."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in NAMES}


def add(op: OpDef) -> None:
    """An op more, registered. Raises ValueError where its name is taken."""
    from aropt.ir.opdef import register

    if op.name in NAMES or op.name in installed():
        raise ValueError(f"there is an op '{op.name}' already")
    register(op)
    ADDED[op.name] = op


def load(name: str) -> OpDef:
    """The definition in `kernels/<name>.py`, or another's; registers the op as `torch.ops.aropt.<name>`."""
    from aropt.ir.opdef import register

    if name in ADDED:
        return ADDED[name]
    elsewhere = installed().get(name)
    op: OpDef = elsewhere.load() if elsewhere else import_module(f"aropt.kernels.{name}").OP
    register(op)
    return op


def load_all() -> dict[str, OpDef]:
    """All ops, registered. Needed before a captured program that calls them is loaded from a file."""
    return {name: load(name) for name in (*NAMES, *installed(), *ADDED)}


def translation_table(contrib: bool = False) -> dict[OpOverload, Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())`.

    `contrib` chooses ONNX Runtime's own operators where an op has such a translation.
    """
    found = {op.overload: (contrib_of(op) if contrib else None) or op.onnx for op in load_all().values()}
    return {overload: function for overload, function in found.items() if function is not None}


def contrib_of(op: OpDef) -> Callable[..., Any] | None:
    """The translation with ONNX Runtime's own operators, where the version that is installed has them."""
    from aropt.ir.own_operators import own_operators

    return op.contrib if not op.needs or op.needs in own_operators() else None


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """From op to reference, for compilers that do better with the plain ops in sight (Inductor)."""
    return {op.overload: op.reference for op in load_all().values() if not op.whole}


def overwriting(target: Any) -> Callable[..., Any] | None:
    """The function that does what one of our ops does, in place."""
    return next((op.overwrite for op in load_all().values() if op.overload is target), None)


def called(node: Any) -> OpDef | None:
    """The definition of the op that a node calls; None if it is none of ours."""
    return defined(node.target)


def defined(target: Any) -> OpDef | None:
    """The definition of an op; None if it is none of ours."""
    name = str(getattr(target, "name", str)())
    return load(name.removeprefix("aropt::")) if name.startswith("aropt::") else None


def stepping(node: Any) -> int | None:
    """Which argument of a call of one of our ops is rounded coarsely: results jump where it moves a little."""
    op = called(node)
    if op is None or not op.steps:
        return None
    return [argument.name for argument in op.overload._schema.arguments].index(op.steps)


def updated(node: Any) -> tuple[Any, Any]:
    """For a node that is a result of one of our ops: that op's node, and the argument it may be written into."""
    several = getattr(node.target, "__name__", "") == "getitem"
    call, index = node.args if several else (node, 0)
    op = called(call)
    if op is None:
        return None, None
    if not several and index not in op.in_place:
        return None, None
    names = [argument.name for argument in op.overload._schema.arguments]
    return call, call.args[names.index(op.in_place[index])] if index in op.in_place else None
