"""aropt's own ops by name: an explicit list, and nothing is imported before it's asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch._ops import OpOverload

    from aropt.ir.opdef import OpDef

NAMES: tuple[str, ...] = (
    "noise",
    "cached_attention",
    "due_slots",
    "canvas_select",
    "canvas_commit",
    "write_rows",
    "canvas_attention",
    "token_shuffle",
    "token_unshuffle",
    "fused_sample",
    "linear_int8",
    "keep_top",
)


def load(name: str) -> OpDef:
    """The definition in `kernels/<name>.py`; registers the op as `torch.ops.aropt.<name>`."""
    from aropt.ir.opdef import register

    op: OpDef = import_module(f"aropt.kernels.{name}").OP
    register(op)
    return op


def load_all() -> dict[str, OpDef]:
    """All ops, registered. Needed before a captured program that calls them is loaded from a file."""
    return {name: load(name) for name in NAMES}


def translation_table(contrib: bool = False) -> dict[OpOverload, Callable[..., Any]]:
    """For `torch.onnx.export(..., dynamo=True, custom_translation_table=translation_table())`.

    `contrib` chooses ONNX Runtime's own operators where an op has such a translation.
    """
    found = {op.overload: (op.contrib if contrib else None) or op.onnx for op in load_all().values()}
    return {overload: function for overload, function in found.items() if function is not None}


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """From op to reference, for compilers that do better with the plain ops in sight (Inductor)."""
    return {op.overload: op.reference for op in load_all().values() if not op.own_size}


def overwriting(target: Any) -> Callable[..., Any] | None:
    """The function that does what one of our ops does, in place."""
    return next((op.overwrite for op in load_all().values() if op.overload is target), None)


def called(node: Any) -> OpDef | None:
    """The definition of the op that a node calls; None if it is none of ours."""
    name = str(getattr(node.target, "name", str)())
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
