"""Arguments and targets of nodes as JSON, and back with a check of everything.

Nothing read is imported or run: targets are looked up in torch.ops.aten, torch.ops.aropt and a list of operators.
Names must be identifiers, because fx writes them into source code.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import fx

from aropt.errors import UsageError
from aropt.ir.verify import OPERATORS

DEPTH = 32  # of nested values
KINDS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}
CONSTANTS = {kind: {n: v for n, v in vars(torch).items() if isinstance(v, cls)} for kind, cls in KINDS.items()}
OP = re.compile(r"(aten|aropt)\.(\w+)\.(\w+)", re.ASCII)
DEVICE = re.compile(r"(cpu|cuda|meta)(:\d)?")
T = TypeVar("T")


def refuse(where: str, why: str) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(what="this is not a valid program", where=where[:300], why=why[:300],
                     hint="write the program again with this version of aropt")  # fmt: skip


def typed(value: Any, kind: type[T], where: str) -> T:
    return value if isinstance(value, kind) else refuse(where, f"it is a {type(value).__name__}, not a {kind.__name__}")


def field(data: Any, key: str, kind: type[T], where: str) -> T:
    known = typed(data, dict, where)
    return typed(known[key], kind, f"{where}.{key}") if key in known else refuse(where, f"'{key}' is missing")


def identifier(name: Any, where: str) -> str:
    """A name that may stand in source code."""
    if (
        isinstance(name, str)
        and name.isidentifier()
        and name.isascii()
        and not keyword.iskeyword(name)
        and name != "self"
    ):
        return name
    refuse(where, f"{name!r} can't be a name")


def constant_name(value: Any) -> str:
    return str(value).removeprefix("torch.")


def encode(value: Any, where: str = "") -> Any:
    """An argument of a node: None, bools, ints and strings are themselves, anything else says what it is."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        inner = [encode(v, where) for v in value]
        return inner if isinstance(value, list) else {"tuple": inner}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    kinds = [kind for kind, cls in KINDS.items() if isinstance(value, cls)]
    return {kinds[0]: constant_name(value)} if kinds else refuse(where, f"a {type(value).__name__} can't be written")


def decode(value: Any, nodes: Mapping[str, fx.Node], where: str, depth: int = DEPTH) -> Any:
    """The argument that `encode` wrote."""
    if depth < 0:
        refuse(where, "it is nested too deep")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, list):
        return [decode(v, nodes, where, depth - 1) for v in value]
    if not isinstance(value, dict) or len(value) != 1:
        refuse(where, f"a {type(value).__name__} can't be an argument")
    kind, inner = next(iter(value.items()))
    if kind == "tuple":
        return tuple(decode(typed(inner, list, where), nodes, where, depth - 1))
    text = typed(inner, str, where)
    if kind in CONSTANTS and text in CONSTANTS[kind]:
        return CONSTANTS[kind][text]
    if kind == "node" and text in nodes:
        return nodes[text]
    if kind == "device" and DEVICE.fullmatch(text):
        return torch.device(text)
    try:
        if kind == "float":
            return float(text)
    except ValueError:
        pass
    refuse(where, f"no {kind} {text!r} is known here")


def written(target: Any, where: str) -> str:
    """ "aten.linear.default" or "operator.getitem"."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    known = [f"operator.{name}" for name, function in OPERATORS.items() if function is target]
    return known[0] if known else refuse(where, f"{target!r} is no op that programs may call")


def find_target(name: str, where: str) -> Any:
    """The op of that name, looked up in known places only."""
    if name.removeprefix("operator.") in OPERATORS and name.startswith("operator."):
        return OPERATORS[name.removeprefix("operator.")]
    parts = OP.fullmatch(name) or refuse(where, f"{name!r} is no op that programs may call")
    packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
    target = getattr(packet, parts[3], None)
    return target if isinstance(target, torch._ops.OpOverload) else refuse(where, f"there is no op {name!r}")
