"""Learned keys and values beside those of the tokens (cat([memory, keys])): attention in two parts.

Each row attends to the tokens and to the memory by itself; the sums of both softmaxes say how much each part counts.
So the keys that are stored are those of the tokens alone.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.restrict.positions import Positions

aten = torch.ops.aten
END = 2**63 - 1
LOW = -1e30  # of a column that is hidden, finite so that a row without any has numbers


@dataclass(frozen=True)
class Parts:
    """A value [.., T + M, D] as that of the tokens and that of the memory [1, .., M, D]."""

    tokens: fx.Node
    memory: fx.Node
    size: int  # M
    before: bool  # the memory comes first


def memories(graph: fx.Graph, content: set[fx.Node], positions: Positions) -> list[tuple[fx.Node, Parts, Parts]]:
    """Attentions over keys and values that are each those of the tokens and of a memory."""
    found = []
    for node in graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            x = bind(node)
            keys, values = (apart(x[n], content, positions) for n in ("key", "value"))
            alike = keys is not None and values is not None and (keys.size, keys.before) == (values.size, values.before)
            if alike and isinstance(x["attn_mask"], fx.Node) and not x["is_causal"]:
                found.append((node, keys, values))
    return found  # type: ignore[return-value]


def apart(joined: Any, content: set[fx.Node], positions: Positions) -> Parts | None:
    """The parts of keys or values; None if they are of tokens alone."""
    if op_name(joined) != "aten::cat" or bind(joined)["dim"] % joined.meta["val"].dim() != joined.meta["val"].dim() - 2:
        return None
    tensors = bind(joined)["tensors"]
    sizes = [positions.dims(t)[-2] for t in tensors]
    known = [t not in content and isinstance(s, int) for t, s in zip(tensors, sizes, strict=True)]
    if len(tensors) != 2 or sum(known) != 1 or "T" not in sizes:
        return None
    before = known[0]
    memory, tokens = tensors if before else reversed(tensors)
    while op_name(memory) in ("aten::expand", "aten::repeat"):  # over the batch: products broadcast it
        source: Any = memory.args[0]
        old, new = list(source.meta["val"].shape), list(memory.meta["val"].shape)
        if [1] * (len(new) - len(old)) + old != [1, *new[1:]]:
            return None
        memory = source
    return Parts(tokens, memory, int(sizes[0 if before else 1]), before)


def part(graph: fx.Graph, node: fx.Node, keys: Parts, values: Parts) -> None:
    """Replaces one attention by its two parts."""
    x, call = bind(node), graph.call_function
    query, mask, boolean = x["query"], x["attn_mask"], x["attn_mask"].meta["val"].dtype == torch.bool
    scale = x["scale"] or int(query.meta["val"].shape[-1]) ** -0.5
    cut = [(keys.size, END), (0, keys.size)] if keys.before else [(0, -keys.size), (-keys.size, END)]
    with graph.inserting_before(node):
        of_tokens, of_memory = (call(aten.slice.Tensor, (mask, -1, *ends)) for ends in cut)
        given = (query, keys.tokens, values.tokens, of_tokens, None, scale, 0.0)
        both = call(ops.load("attention").overload, given)
        first, seen = (call(operator.getitem, (both, i)) for i in (0, 1))
        product = call(aten.matmul.default, (query, call(aten.transpose.int, (keys.memory, -1, -2))))
        scores = call(aten.mul.Tensor, (product, scale))
        if boolean:
            scores = call(aten.masked_fill.Scalar, (scores, call(aten.logical_not.default, (of_memory,)), LOW))
        else:
            scores = call(aten.clamp.default, (call(aten.add.Tensor, (scores, of_memory)), LOW))
        second = call(aten.matmul.default, (call(aten.softmax.int, (scores, -1)), values.memory))
        beside = call(aten.sub.Tensor, (seen, call(aten.logsumexp.default, (scores, [-1]))))
        share = call(aten.unsqueeze.default, (call(aten.sigmoid.default, (beside,)), -1))
        apart = call(aten.mul.Tensor, (call(aten.sub.Tensor, (first, second)), share))
        result = call(aten.add.Tensor, (second, apart))
    for made in (both, result):
        made.meta["where"] = node.meta.get("where", "")
    node.replace_all_uses_with(result)
