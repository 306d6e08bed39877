"""Reads a node of a graph as a call: its op's name, its arguments by name, its tensors, and whether it draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

ALIASES = {
    "aten::max.other": "aten::maximum", "aten::min.other": "aten::minimum", "aten::concat": "aten::cat",
    "aten::concatenate": "aten::cat",
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """ "aten::add" of a call, or the function's name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return ALIASES.get(target.name()) or target.name().split(".")[0]
    return getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the names of the op's schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, repeats kept."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), (Tensor, list, tuple))]


def draws(node: fx.Node) -> bool:
    """Whether the op draws random numbers."""
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return seeded and not (op_name(node) == "aten::dropout" and not bind(node)["train"])
