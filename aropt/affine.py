"""Parts of a graph that are affine in one value: sums, products with weights, and moves of elements.

Such a part is known by what it does to a basis, however it is written; `evaluate` runs it on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.axes import bind, op_name

MOVES = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::permute", "aten::transpose", "aten::unsqueeze",
    "aten::squeeze", "aten::select", "aten::slice", "aten::cat", "aten::stack", "aten::clone", "aten::expand",
    "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "getitem", "aten::unflatten",
    "aten::flatten", "aten::_to_copy",
}  # fmt: skip
SUMS = {"aten::add", "aten::sub"}
PRODUCTS = {"aten::linear", "aten::matmul", "aten::mm", "aten::mul", "aten::div"}
ROWS = (0, 1)  # axes of batch and sequence, which an affine part leaves alone


def constant(node: Any) -> bool:
    """Whether an argument is a weight, made of weights, a number or a size; not content, nor what sizes decide."""
    if not isinstance(node, fx.Node) or node.op == "get_attr" or not is_tensor(node):
        return True
    return bool(node.all_input_nodes) and all(is_tensor(n) and constant(n) for n in node.all_input_nodes)


def is_tensor(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), (Tensor, list, tuple))


def floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def affine(node: fx.Node) -> bool:
    """Whether a node is affine in its content inputs, row by row."""
    name = op_name(node)
    if name in ("aten::select", "aten::slice", "aten::unbind", "aten::split", "aten::cat", "aten::stack"):
        x = bind(node)
        shape = node.all_input_nodes[0].meta["val"].shape
        return x.get("dim", 0) % max(len(shape) + (name == "aten::stack"), 1) not in ROWS
    if name in SUMS:
        return all(n in (node.args[0], node.args[1]) for n in node.all_input_nodes)
    if name in PRODUCTS:
        return sum(not constant(n) for n in node.args) == 1 and not constant(node.args[0])
    return name in MOVES


def between(entry: fx.Node, result: fx.Node) -> list[fx.Node]:
    """The content nodes on the ways from `entry` to `result`, in order; both included."""
    nodes = list(result.graph.nodes)
    reached = {entry}
    for node in nodes[nodes.index(entry) + 1 :]:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    needed = {result}
    for node in reversed(nodes):
        if node in needed and node is not entry:
            needed |= set(node.all_input_nodes)
    return [n for n in nodes if n in reached & needed]


def evaluate(result: fx.Node, given: Mapping[fx.Node, Tensor], weights: Mapping[str, Tensor], rows: int = 1) -> Tensor:
    """The value of `result` from those given, which have so many rows in axis 1; sizes are read off them."""
    batch = next(iter(given.values())).shape[0]
    known: dict[fx.Node, Any] = dict(given)

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = weights[str(node.target)]
            elif op_name(node) == "aten::sym_size":
                known[node] = (batch, rows)[int(node.args[1])] if node.args[1] in ROWS else None  # type: ignore[arg-type]
            elif node.op != "call_function":
                raise LookupError(f"reads {node.name} too")
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[node]

    with torch.no_grad():
        found: Tensor = value(result)
    return found


def dominates(
    node: fx.Node, starts: Iterable[fx.Node], inside: set[fx.Node], leaves: Callable[[fx.Node], bool]
) -> bool:
    """Whether every way from `starts` through `inside` to a node that `leaves` goes through `node`."""
    seen, todo = set(), [s for s in starts if s is not node]
    while todo:
        at = todo.pop()
        if leaves(at):
            return False
        new = [u for u in at.users if u in inside and u not in seen and u is not node]
        seen |= set(new)
        todo += new
    return True
