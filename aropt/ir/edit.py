"""Composing and trimming graphs: calls in a row become one graph, unused outputs and inputs go."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.control import Call
from aropt.ir.program import ROLES, Graph, Spec
from aropt.ir.torch_compat import build, spec_of

aten = torch.ops.aten


def compose(
    name: str,
    sequence: Sequence[Call],
    graphs: Mapping[str, Graph],
    specs: Mapping[str, Spec],
    weights: Mapping[str, Tensor],
) -> tuple[Graph, Call]:
    """The calls of a sequence as one graph and one call. `specs` types the values that it reads, or their reader.

    Every value written is an output, under the value's own name; `trim` drops those that nobody reads. Its role is the
    most telling one of its parts.
    """
    graph = fx.Graph()
    values: dict[str, fx.Node] = {}
    inputs: dict[str, Spec] = {}
    written: dict[str, fx.Node] = {}
    read = [v for c in sequence for v in c.reads.values()]
    produced: set[str] = set()
    for call in sequence:  # placeholders first
        for name_within, value in call.reads.items():
            if value not in produced and value not in inputs:
                inputs[value] = specs.get(value) or graphs[call.graph].inputs[name_within]
                values[value] = graph.placeholder(value)
        produced |= set(call.writes.values())
    assert set(inputs) <= set(read)
    for call in sequence:
        part = graphs[call.graph]
        results = inline(graph, part, {i: values[v] for i, v in call.reads.items()})
        for output, value in call.writes.items():
            values[value] = written[value] = results[output]
            results[output].meta["value"] = value  # what validation and reports call it
    graph.output(tuple(written.values()))
    share(graph)
    role = min((graphs[call.graph].role for call in sequence), key=ROLES.index)
    composed = build(name, graph, inputs, list(written), weights, role)
    settle(composed.fx)
    return composed, Call(name, {n: n for n in inputs}, {n: n for n in written})


def settle(graph: fx.Graph) -> None:
    """Sizes that are numbers in this place, as numbers: torch's exporter to ONNX takes no node for them."""
    for node in list(graph.nodes):
        size = node.meta.get("val")
        if node.op == "call_function" and type(size) is int:
            number = functools.partial(instead, node, size)
            for user in list(node.users):
                user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), number)
            graph.erase_node(node)


def instead(node: fx.Node, value: int, other: fx.Node) -> fx.Node | int:
    """The value in the node's place."""
    return value if other is node else other


def inline(
    graph: fx.Graph, part: Graph, inputs: Mapping[str, fx.Node], copied: dict[fx.Node, fx.Node] | None = None
) -> dict[str, fx.Node]:
    """Copies a graph's nodes into another; returns the nodes of its outputs (all of them in `copied`)."""
    copied = {} if copied is None else copied
    for node in part.fx.nodes:
        if node.op == "placeholder":
            copied[node] = inputs[node.name]
        elif node.op == "get_attr":
            copied[node] = graph.get_attr(str(node.target))
        elif node.op == "call_function":
            copied[node] = graph.node_copy(node, lambda n: copied[n])
            copied[node].meta = {k: v for k, v in node.meta.items() if k != "val"}
    return {o: copied[n] for o, n in zip(part.outputs, part.results(), strict=True)}


def trim(part: Graph, outputs: set[str], weights: Mapping[str, Tensor]) -> Graph:
    """The graph with only these outputs, and without inputs that they don't need."""
    kept = [o for o in part.outputs if o in outputs]
    graph = fx.Graph()
    placeholders = {n: graph.placeholder(n) for n in part.inputs}
    results = inline(graph, part, placeholders)
    graph.output(tuple(results[o] for o in kept))
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    for node in placeholders.values():
        if not node.users:
            graph.erase_node(node)
    inputs = {n: s for n, s in part.inputs.items() if placeholders[n].users}
    return build(part.name, graph, inputs, kept, weights, part.role)


def expose(part: Graph, nodes: Mapping[str, fx.Node]) -> Graph:
    """The graph with more outputs: {output: one of its nodes}."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(part.fx, copied)
    graph.output((*results, *(copied[n] for n in nodes.values())))  # type: ignore[misc]
    names: dict[Any, str] = {}
    for node in part.fx.nodes:
        if node.op == "placeholder":
            for dim, size in zip(part.inputs[node.name].dims, node.meta["val"].shape, strict=True):
                if isinstance(dim, str) and not isinstance(size, int):
                    names.setdefault(size.node.expr, dim)
    specs = {output: spec_of(node.meta["val"], names) for output, node in nodes.items()}
    return replace(part, fx=graph, outputs={**part.outputs, **specs})


def share(graph: fx.Graph) -> None:
    """Common subexpression elimination: all our ops are pure."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, str(node.target), freeze(node.args), freeze(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


def freeze(value: Any) -> Any:
    """A hashable copy of fx arguments that tells 1, 1.0 and True apart."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, dict):
        return tuple(sorted((k, freeze(v)) for k, v in value.items()))
    return value if isinstance(value, fx.Node) else (type(value).__name__, str(value))


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy with the nodes' metadata. Views become reshapes: what replaces their source may lay it out otherwise."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in copy.nodes:
        if node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default
    return copy


def call_by_name(graph: Graph) -> Call:
    """A call whose values are named as the graph's inputs and outputs."""
    return Call(graph.name, {n: n for n in graph.inputs}, {n: n for n in graph.outputs})
