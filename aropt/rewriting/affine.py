"""Parts of a graph that are affine in one value: sums, products with weights, and moves of elements.

Such a part is known by what it does to a basis, however it is written; `evaluate` runs it on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name

MOVES = {
    "aten::view", "aten::_unsafe_view", "aten::reshape", "aten::permute", "aten::transpose", "aten::unsqueeze",
    "aten::squeeze", "aten::stack", "aten::clone", "aten::expand", "getitem", "aten::unflatten", "aten::flatten",
    "aten::_to_copy",
}  # fmt: skip
SUMS = {"aten::add", "aten::sub"}
PRODUCTS = {"aten::linear", "aten::matmul", "aten::mm", "aten::mul", "aten::div"}
ALONG = {
    "aten::select", "aten::slice", "aten::unbind", "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::cat",
    "aten::sum", "aten::mean",
}  # fmt: skip


def constant(node: Any) -> bool:
    """Whether an argument is a weight, made of weights, a number or a size; not content, nor what sizes decide."""
    if not isinstance(node, fx.Node) or node.op == "get_attr" or not is_tensor(node):
        return True
    return node.op == "call_function" and all(is_tensor(n) and constant(n) for n in node.all_input_nodes)


def is_tensor(node: fx.Node) -> bool:
    return node.op == "get_attr" or isinstance(node.meta.get("val"), (Tensor, list, tuple))


def floating(node: fx.Node) -> bool:
    """Whether a value, or each of several, is of floats."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return bool(values) and all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def rank(node: fx.Node) -> int:
    """Axes of a tensor; -1 of anything else."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def affine(node: fx.Node) -> bool:
    """Whether a node is affine in its content inputs, and takes no rows apart.

    Moves may still mix rows (a transposed reshape): what is read off a basis has to be held against several rows.
    """
    name = op_name(node)
    if name in ALONG:
        dims = bind(node).get("dim") or 0
        shapes = [n.meta["val"].shape for n in node.all_input_nodes if rank(n) >= 0]
        # an axis whose size is known is none of rows
        return all(isinstance(shape[d], int) for shape in shapes for d in (dims if isinstance(dims, list) else [dims]))
    if name in SUMS:
        return all(n in (node.args[0], node.args[1]) for n in node.all_input_nodes)
    if name in PRODUCTS:
        content = [n for n in node.args if not constant(n)]
        return len(content) == 1 and (name == "aten::mul" or content[0] is node.args[0])
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


def evaluate(result: fx.Node, given: Mapping[fx.Node, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """The value of `result`, in float64, from those given, whose sizes are all that it may depend on besides.

    Raises LookupError where something else decides it too.
    """
    sizes = {str(s): n for node, v in given.items() for s, n in zip(node.meta["val"].shape, v.shape, strict=True)}
    known: dict[fx.Node, Any] = {node: wide(v) for node, v in given.items()}

    def value(node: fx.Node) -> Any:
        if node not in known:
            if node.op == "get_attr":
                known[node] = wide(weights[str(node.target)])
            elif op_name(node) == "aten::sym_size":
                if str(node.meta["val"]) not in sizes:
                    raise LookupError(f"the size `{node.name}` decides it too")
                known[node] = sizes[str(node.meta["val"])]
            elif node.op != "call_function":
                raise LookupError(f"`{node.name}` decides it too")
            else:
                given_args: Any = fx.node.map_aggregate((node.args, node.kwargs), wide)
                args, kwargs = fx.node.map_arg(given_args, value)
                known[node] = wide(node.target(*args, **kwargs))  # type: ignore[operator]
        return known[node]

    with torch.no_grad():
        found: Tensor = value(result)
    return found


def wide(value: Any) -> Any:
    """A tensor of floats in float64, and float64 for float32; anything else as it is."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if value is torch.float32 else value


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
