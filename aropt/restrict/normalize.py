"""Attention written out as matmul, mask, softmax, matmul becomes one scaled_dot_product_attention (SDPA).

Only where SDPA is the same function up to rounding: a product of queries and keys, scalings by numbers, at most one
position-only bias or boolean mask, a softmax over the last axis, a product with the values. Soft-caps, sinks and
anything else between the products stay written out (restrict takes those as they are). Works before `restrict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, draws, op_name
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build, propagate
from aropt.restrict.positions import content_nodes

aten = torch.ops.aten
PRODUCTS = {"aten::matmul", "aten::bmm"}
SOFTMAX = {"aten::softmax", "aten::_softmax"}
CASTS = {"aten::_to_copy", "aten::to", "aten::clone", "aten::dropout", "aten::type_as"}
LOWEST = -1e30  # filling with this or less is adding it: any score is lost in rounding


@dataclass(frozen=True)
class Found:
    """What lies between the products, from the softmax upwards. `mask`: (condition, hides where, filled with)."""

    scale: float = 1.0
    bias: fx.Node | None = None
    mask: tuple[fx.Node, bool, Any] | None = None


def normalize_attention(graph: Graph, weights: Mapping[str, Tensor]) -> tuple[Graph, int]:
    """The graph with written-out attention as SDPA where that is the same function, and how many were rewritten."""
    copy = copied(graph.fx)
    content = content_nodes(copy, propagate(copy, graph.inputs, weights))
    count = 0
    for node in list(copy.nodes):
        if node.op == "call_function" and op_name(node) in PRODUCTS:
            count += rewrite(copy, node, content, weights)
    if not count:
        return graph, 0
    return build(graph.name, copy, dict(graph.inputs), list(graph.outputs), weights), count


def copied(graph: fx.Graph) -> fx.Graph:
    """The same graph, to be changed."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy


def rewrite(graph: fx.Graph, product: fx.Node, content: set[fx.Node], weights: Mapping[str, Tensor]) -> bool:
    """Replaces the product by SDPA if it ends a written-out attention."""
    probabilities, values = product.args
    softmax = through(probabilities)
    if op_name(softmax) not in SOFTMAX or bind(softmax)["dim"] not in (-1, rank(softmax) - 1):
        return False
    scores, found, steps = through(softmax.args[0]), Found(), []
    while op_name(scores) not in PRODUCTS:
        steps.append(scores)
        step = peel(scores, found, content, weights)
        if step is None:
            return False
        scores, found = through(step[0]), step[1]
    operands: tuple[Any, ...] = scores.args
    query, keys = operands
    if len(scores.users) > 1 or any(len(n.users) > 1 for n in steps):
        return False  # the scores are used otherwise too, and SDPA keeps them to itself
    if not fits(query, keys, values, found):
        return False
    with graph.inserting_before(product):
        call = graph.call_function
        keys = keys.args[0] if swaps_last(keys) else call(aten.transpose.int, (keys, -1, -2))
        bias = found.bias
        if found.mask is not None:
            condition, hides, low = found.mask
            zero = call(aten.full.default, ([], 0.0), {"dtype": query.meta["val"].dtype})
            low = low if isinstance(low, fx.Node) else call(aten.full.default, ([], low), dict(zero.kwargs))
            bias = call(aten.where.self, (condition, low, zero) if hides else (condition, zero, low))
        args = (query, keys, values) if bias is None else (query, keys, values, bias)
        fused = call(aten.scaled_dot_product_attention.default, args, {"scale": found.scale})
    fused.meta = {"where": product.meta.get("where", "")}
    product.replace_all_uses_with(fused)
    return True


def peel(node: fx.Node, found: Found, content: set[fx.Node], weights: Mapping[str, Tensor]) -> tuple[Any, Found] | None:
    """One op above the softmax: (what it works on, what is known then); None where SDPA could not say the same."""
    name, x = op_name(node), bind(node)
    if name in ("aten::mul", "aten::div"):
        factor = number(x["other"], weights)
        if factor is None or factor <= 0:
            return None
        return x["self"], replace(found, scale=found.scale * factor if name == "aten::mul" else found.scale / factor)
    if found != Found() or name not in ("aten::add", "aten::where", "aten::masked_fill"):
        return None  # a second mask, or a scaled one
    if name == "aten::add":
        scores, bias = (x["self"], x["other"]) if x["self"] in content else (x["other"], x["self"])
        whole = isinstance(bias, fx.Node) and bias not in content and rank(bias) >= 2 and x["alpha"] == 1
        return (scores, replace(found, bias=bias)) if whole else None
    hides = name == "aten::masked_fill"
    scores, condition, low = x["self"], x["mask" if hides else "condition"], x["value" if hides else "other"]
    value = number(low, weights)
    if scores not in content or condition in content or rank(condition) < 2 or value is None or value > LOWEST:
        return None
    return scores, replace(found, mask=(condition, hides, low))


def fits(query: Any, keys: Any, values: Any, found: Found) -> bool:
    """Whether SDPA takes these: one dtype, equal leading axes, a bias of that dtype."""
    tensors = [n.meta["val"] for n in (query, keys, values)]
    leads = {str(list(t.shape[:-2])) for t in tensors}
    same = len(leads) == 1 and len({t.dtype for t in tensors}) == 1 and tensors[0].dim() >= 3
    return same and (found.bias is None or found.bias.meta["val"].dtype == tensors[0].dtype)


def through(node: Any) -> fx.Node:
    """The node behind casts, clones and dropout that does nothing."""
    while op_name(node) in CASTS and not draws(node):
        node = node.args[0]
    return node  # type: ignore[no-any-return]


def number(value: Any, weights: Mapping[str, Tensor]) -> float | None:
    """A Python number, or the value of a one-element constant."""
    if isinstance(value, fx.Node) and op_name(value) == "aten::full" and not bind(value)["size"]:
        value = bind(value)["fill_value"]
    elif isinstance(value, fx.Node) and value.op == "get_attr" and weights[str(value.target)].numel() == 1:
        value = weights[str(value.target)].item()
    return float(value) if isinstance(value, (int, float)) else None


def rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def swaps_last(node: Any) -> bool:
    """Whether it is x.transpose(-1, -2)."""
    n = rank(node)
    return op_name(node) == "aten::transpose" and {d % n for d in node.args[1:]} == {n - 2, n - 1}
