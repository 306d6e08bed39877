"""Attention written out as matmul, mask, softmax, matmul becomes one op: SDPA, or `aropt::attention` where SDPA lacks a
soft-cap, sinks, or the sum of the softmax.

What is no attention (`written_out`) stays as it is, with the reason at its nodes (`WHY` in their meta), and `restrict`
refuses it by that name.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.ir.edit import copied
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build, propagate
from aropt.restrict.positions import Positions, content_nodes
from aropt.restrict.written_out import PRODUCTS, RESHAPES, SOFTMAX, NotAttention, Reader, rank

aten = torch.ops.aten
WHY = "no attention"  # in a node's meta: why it is not part of one


def normalize_attention(
    graph: Graph, weights: Mapping[str, Tensor], capacity: int, never: Sequence[int] = ()
) -> tuple[Graph, int]:
    """The graph with written-out attention as one op where that is the same function, and how many were rewritten."""
    if not any(op_name(node) in SOFTMAX for node in graph.fx.nodes if node.op == "call_function"):
        return graph, 0
    copy = copied(graph.fx)
    names = propagate(copy, graph.inputs, weights)
    content, positions = content_nodes(copy, names, never), Positions(weights, names, capacity, never)
    count, by_name = 0, {n.name: n for n in graph.fx.nodes}
    for node in list(copy.nodes):
        if node.op == "call_function" and op_name(node) in PRODUCTS and sums_columns(node):
            reader = Reader(node, content, positions)
            try:
                reader.read()
            except (NotAttention, Unsupported) as reason:  # the latter of a bias that no number of tokens gives
                for one in reader.path:
                    by_name[one.name].meta[WHY] = reason.why if isinstance(reason, Unsupported) else str(reason)
                continue
            content |= write(copy, reader)
            count += 1
    if not count:
        return graph, 0
    return build(graph.name, ordered(copy), dict(graph.inputs), list(graph.outputs), weights), count


def sums_columns(product: Any) -> bool:
    """Whether a product is over an axis of the sequence, as that of weights and values is."""
    return not isinstance(product.args[0].meta["val"].shape[-1], int)


def write(graph: fx.Graph, reader: Reader) -> set[fx.Node]:
    """Replaces the product with the values by one attention, laid out as the scores are at `Reader.anchor`.

    Returns what stands in the place of the product, and of the sums of its softmax.
    """
    product, call = reader.product, graph.call_function
    query, keys = reader.scores.args
    values: Any = product.args[1]
    assert isinstance(query, fx.Node) and isinstance(keys, fx.Node)
    with graph.inserting_before(product):
        stages = [query]
        for step in reader.before:
            stages.append(relaid(graph, stages[-1], step, query.meta["val"].shape[-1]))
        columns = call(aten.sym_size.int, (keys, rank(keys) - 1))
        mask = total(graph, reader, stages, columns)
        laid_out = keys.args[0] if swaps_last(keys) else call(aten.transpose.int, (keys, -1, -2))
        lead = [n.meta["val"].shape[:-2] for n in (keys, values)]
        k, v = (with_heads(graph, reader, n, s, stages[-1]) for n, s in zip((laid_out, values), lead))
        result, seen = attention(graph, reader, (stages[-1], k, v, mask))
        for step in reader.behind:
            result = relaid(graph, result, step, values.meta["val"].shape[-1])
        made = {product: result}
        for node in reader.sums():
            made[node] = call(aten.unsqueeze.default, (seen, -1)) if bind(node)["keepdim"] else seen
    for old, new in made.items():
        old.replace_all_uses_with(new)
        new.meta["val"] = old.meta["val"]
    return set(made.values())


def attention(graph: fx.Graph, reader: Reader, given: tuple[Any, ...]) -> tuple[fx.Node, fx.Node]:
    """SDPA where it says all, else the op of our own: (result, sum of the softmax)."""
    call, where = graph.call_function, {"where": reader.product.meta.get("where", "")}
    if not (reader.softcap or reader.sinks or reader.sums()):
        options: dict[str, Any] = {"scale": reader.scale} | ({"enable_gqa": True} if reader.shared else {})
        out = call(aten.scaled_dot_product_attention.default, given if given[3] is not None else given[:3], options)
        out.meta = where
        return out, out
    sinks: Any = None
    if reader.sinks:
        sinks, factor = reader.sinks
        sinks = sinks if factor == 1 else call(aten.mul.Tensor, (sinks, factor))
    both = call(ops.load("attention").overload, (*given, sinks, reader.scale, reader.softcap))
    both.meta = where
    out, seen = (call(operator.getitem, (both, i)) for i in (0, 1))
    out.meta, seen.meta = dict(where), dict(where)
    return out, seen


def relaid(graph: fx.Graph, value: fx.Node, step: fx.Node, size: int) -> fx.Node:
    """A value [.., size] laid out as a step does scores [.., columns]."""
    if op_name(step) not in RESHAPES:
        return graph.call_function(step.target, (value, *step.args[1:]))  # type: ignore[arg-type]
    sizes: Any = step.args[1]
    return graph.call_function(aten.reshape.default, (value, [*sizes[:-1], size]))


def with_heads(graph: fx.Graph, reader: Reader, value: Any, lead: Sequence[Any], query: fx.Node) -> fx.Node:
    """Keys or values with the leading axes of the queries; one head for all of a sequence's stays one."""
    shape, call = reader.anchor.meta["val"].shape, graph.call_function
    if len(lead) + 2 == len(shape):
        return value  # type: ignore[no-any-return]
    if str(lead[0]) == str(shape[0]):
        return call(aten.unsqueeze.default, (value, 1))
    batch, rows, size = call(aten.sym_size.int, (query, 0)), *(call(aten.sym_size.int, (value, i)) for i in (1, 2))
    return call(aten.reshape.default, (value, [batch, shape[1], rows, size]))


def total(graph: fx.Graph, reader: Reader, stages: list[fx.Node], columns: fx.Node) -> fx.Node | None:
    """The sum of all biases and masks as they are laid out at the anchor; None if there are none."""
    call, kind = graph.call_function, stages[0].meta["val"].dtype
    found: fx.Node | None = None
    for bias, factor, layouts in reader.biases:
        done = len(reader.layouts) - layouts  # steps before it
        if isinstance(bias, fx.Node):
            value = bias if bias.meta["val"].dtype == kind else call(aten._to_copy.default, (bias,), {"dtype": kind})
            value = value if factor == 1 else call(aten.mul.Tensor, (value, factor))
        else:
            condition, hides, low = bias
            zero, hidden = (call(aten.full.default, ([], x), {"dtype": kind}) for x in (0.0, low * factor))
            value = call(aten.where.self, (condition, hidden, zero) if hides else (condition, zero, hidden))
        if reader.before[done:]:
            axes = rank((reader.scores, *reader.before)[done]) - 1
            sizes = [call(aten.sym_size.int, (stages[done], i)) for i in range(axes)]
            value = call(aten.expand.default, (value, [*sizes, columns]))
        for step in reader.before[done:]:
            value = relaid(graph, value, step, columns)  # type: ignore[arg-type]
        found = value if found is None else call(aten.add.Tensor, (found, value))
    return found


def ordered(graph: fx.Graph) -> fx.Graph:
    """The same graph, each node after what it reads."""
    result, mapping = fx.Graph(), dict[fx.Node, fx.Node]()

    def place(node: fx.Node) -> None:
        pending = [node]
        while pending:
            missing = [n for n in pending[-1].all_input_nodes if n not in mapping]
            if missing:
                pending += missing
                continue
            one = pending.pop()
            if one not in mapping:
                mapping[one] = result.node_copy(one, mapping.__getitem__)

    for node in graph.nodes:
        place(node)
    return result


def swaps_last(node: Any) -> bool:
    """Whether it is x.transpose(-1, -2)."""
    n = rank(node)
    return op_name(node) == "aten::transpose" and {d % n for d in node.args[1:]} == {n - 2, n - 1}
