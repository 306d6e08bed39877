"""Learned keys and values beside those of the tokens (cat([memory, keys])): attention in two parts.

The scores of the memory's columns are a product of their own, appended after those of the tokens; softmax does not mind
the order of columns. So the keys that are stored are those of the tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name, tensor_inputs
from aropt.restrict.positions import Positions

aten = torch.ops.aten
MAXINT = 2**63 - 1
SDPA = "aten::scaled_dot_product_attention"
PRODUCTS = {"aten::matmul", "aten::bmm"}
SOFTMAX = {"aten::softmax", "aten::_softmax"}
KEEPS = {"aten::clone", "aten::_to_copy", "aten::dropout", "aten::contiguous"}


class NotSplit(Exception):
    """The value can't be taken apart."""


@dataclass(frozen=True)
class Parts:
    """A value [.., T + M, ..] as that of the tokens and that of the memory, along an axis counted from the right."""

    tokens: fx.Node
    memory: fx.Node
    axis: int
    size: int  # M
    before: bool  # the memory comes first


def memories(graph: fx.Graph, content: set[fx.Node], positions: Positions) -> list[fx.Node]:
    """Concatenations of one value of the tokens and one of the memory along the sequence, before any attention."""
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and op_name(node) == "aten::cat" and node in content:
            tensors, axis = bind(node)["tensors"], bind(node)["dim"]
            sizes = [positions.dims(t)[axis] for t in tensors]
            known = [t not in content and isinstance(s, int) for t, s in zip(tensors, sizes, strict=True)]
            if len(tensors) == 2 and "T" in sizes and sum(known) == 1 and tensors[0].meta["val"].dim() > 2:
                found.append(node)
    return found


def part(graph: fx.Graph, content: set[fx.Node], positions: Positions) -> None:
    """Takes attention over memory and tokens apart, in place. Nothing changes where an op on the way is not known."""
    split: dict[fx.Node, Parts] = {}
    starts = memories(graph, content, positions)
    writer = Writer(graph, content, positions, split)
    for node in graph.nodes:
        if node.target is aten.view.default:  # strides change
            node.target = aten.reshape.default
    try:
        for node in list(graph.nodes):
            if node in starts:
                writer.start(node)
            elif any(n in split for n in node.all_input_nodes):
                writer.write(node)
    except NotSplit:
        pass  # the analysis says why
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


class Writer:
    """Writes the two parts of each value beside the value itself."""

    def __init__(
        self, graph: fx.Graph, content: set[fx.Node], positions: Positions, split: dict[fx.Node, Parts]
    ) -> None:
        self.graph, self.content, self.positions, self.split = graph, content, positions, split

    def call(self, target: Any, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        with self.graph.inserting_before(like):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {"where": like.meta.get("where", ""), "val": like.meta["val"]}
        return node

    def start(self, node: fx.Node) -> None:
        tensors, rank = bind(node)["tensors"], node.meta["val"].dim()
        axis = bind(node)["dim"] % rank - rank
        before = tensors[0] not in self.content
        memory, tokens = tensors if before else reversed(tensors)
        size = int(memory.meta["val"].shape[axis])
        while op_name(memory) in ("aten::expand", "aten::repeat"):  # over the batch: products broadcast it
            memory = self.one(memory)
        self.split[node] = Parts(tokens, memory, axis, size, before)

    def one(self, memory: fx.Node) -> fx.Node:
        """What was repeated over the batch alone."""
        source: Any = memory.args[0]
        old, new = source.meta["val"].shape, memory.meta["val"].shape
        if len(old) < len(new):
            lead: Any = [1] * (len(new) - len(old))
            old = (*lead, *old)
        if old[0] != 1 or list(map(str, old[1:])) != list(map(str, new[1:])):
            raise NotSplit
        while source.meta["val"].dim() < len(new):
            inner = source
            source = self.call(aten.unsqueeze.default, inner, 0, like=memory)
            source.meta["val"] = inner.meta["val"].unsqueeze(0)
        return source  # type: ignore[no-any-return]

    def write(self, node: fx.Node) -> None:
        name, x = op_name(node), bind(node)
        if name == SDPA:
            return self.sdpa(node, x)
        if name in PRODUCTS:
            return self.product(node)
        if name in SOFTMAX:
            return self.softmax(node, x)
        if name == "aten::transpose":
            return self.moved(node, x)
        pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
        if name not in KEEPS and not pointwise:
            raise NotSplit
        parts = [self.split[n] for n in tensor_inputs(node) if n in self.split]
        like = parts[0]
        if any((p.axis, p.size, p.before) != (like.axis, like.size, like.before) for p in parts):
            raise NotSplit
        made = [self.emit(node, like, memory) for memory in (False, True)]
        self.split[node] = Parts(made[0], made[1], like.axis, like.size, like.before)

    def emit(self, node: fx.Node, like: Parts, memory: bool) -> fx.Node:
        """An elementwise op on one part."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.piece(n, like, memory, node))
        return self.call(node.target, *args, like=node, **kwargs)

    def piece(self, source: fx.Node, like: Parts, memory: bool, user: fx.Node) -> Any:
        """One part of an operand."""
        if source in self.split:
            return self.split[source].memory if memory else self.split[source].tokens
        value = source.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() < -like.axis or value.shape[like.axis] == 1:
            return source
        if source in self.content:
            raise NotSplit
        start, end = self.range(like, memory)
        if end is None:
            end = self.length(user)
        return self.call(aten.slice.Tensor, source, like.axis, start, end, like=user)

    @staticmethod
    def range(like: Parts, memory: bool) -> tuple[int, Any]:
        """Where a part lies in a value of the sequence; None: at the length."""
        if like.before:
            return (0, like.size) if memory else (like.size, MAXINT)
        return (-like.size, MAXINT) if memory else (0, None)

    def length(self, user: fx.Node) -> fx.Node:
        ids = next(n for n in self.graph.nodes if n.op == "placeholder" and n.name == "ids")
        return self.call(aten.sym_size.int, ids, 1, like=user)

    def moved(self, node: fx.Node, x: dict[str, Any]) -> None:
        parts, rank = self.split[x["self"]], node.meta["val"].dim()
        i, j = (d % rank - rank for d in (x["dim0"], x["dim1"]))
        axis = {i: j, j: i}.get(parts.axis, parts.axis)
        made = [self.call(aten.transpose.int, p, i, j, like=node) for p in (parts.tokens, parts.memory)]
        self.split[node] = Parts(made[0], made[1], axis, parts.size, parts.before)

    def product(self, node: fx.Node) -> None:
        """q k^T gives columns in two parts; p v is the sum of two products."""
        left, right = tensor_inputs(node)
        if right in self.split and left not in self.split and self.split[right].axis == -1:
            keys = self.split[right]
            made = [self.call(aten.matmul.default, left, k, like=node) for k in (keys.tokens, keys.memory)]
            self.split[node] = Parts(made[0], made[1], -1, keys.size, keys.before)
        elif left in self.split and right in self.split and self.split[right].axis == -2:
            self.mix(node, self.split[left], self.split[right])
        else:
            raise NotSplit

    def mix(self, node: fx.Node, weights: Parts, values: Parts) -> None:
        if (weights.axis, weights.size, weights.before) != (-1, values.size, values.before):
            raise NotSplit
        made = [
            self.call(aten.matmul.default, p, v, like=node)
            for p, v in ((weights.tokens, values.tokens), (weights.memory, values.memory))
        ]
        node.replace_all_uses_with(self.call(aten.add.Tensor, *made, like=node))

    def softmax(self, node: fx.Node, x: dict[str, Any]) -> None:
        """Over the columns of both, the memory's last."""
        parts = self.split[x["self"]]
        if parts.axis != -1 or x["dim"] not in (-1, node.meta["val"].dim() - 1):
            raise NotSplit
        joined = self.call(aten.cat.default, [parts.tokens, parts.memory], -1, like=node)
        rest: Any = node.args[1:]
        both = self.call(node.target, joined, *rest, like=node, **node.kwargs)
        tokens = self.call(aten.slice.Tensor, both, -1, 0, self.length(node), like=node)
        memory = self.call(aten.slice.Tensor, both, -1, -parts.size, MAXINT, like=node)
        self.split[node] = Parts(tokens, memory, -1, parts.size, parts.before)

    def sdpa(self, node: fx.Node, x: dict[str, Any]) -> None:
        """Written out: scale, scores, mask, softmax, sum."""
        query, keys, values, mask = x["query"], self.split.get(x["key"]), self.split.get(x["value"]), x["attn_mask"]
        if keys is None or values is None or query in self.split or x["is_causal"] or x.get("enable_gqa"):
            raise NotSplit
        if (keys.axis, values.axis, keys.size, keys.before) != (-2, -2, values.size, values.before):
            raise NotSplit
        scale = x["scale"] if x.get("scale") is not None else query.meta["val"].shape[-1] ** -0.5
        scaled = self.call(aten.mul.Tensor, query, scale, like=node)
        parts = []
        for beside, key in ((False, keys.tokens), (True, keys.memory)):
            turned = self.call(aten.transpose.int, key, -2, -1, like=node)
            scores = self.call(aten.matmul.default, scaled, turned, like=node)
            like = Parts(key, key, -1, keys.size, keys.before)
            if mask is not None:
                scores = self.masked(scores, self.piece(mask, like, beside, node), mask.meta["val"].dtype, node)
            parts.append(scores)
        joined = self.call(aten.cat.default, parts, -1, like=node)
        both = self.call(aten.softmax.int, joined, -1, like=node)
        tokens = self.call(aten.slice.Tensor, both, -1, 0, self.length(node), like=node)
        memory = self.call(aten.slice.Tensor, both, -1, -keys.size, MAXINT, like=node)
        self.mix(node, Parts(tokens, memory, -1, keys.size, keys.before), values)

    def masked(self, scores: fx.Node, mask: fx.Node, dtype: torch.dtype, node: fx.Node) -> fx.Node:
        if dtype != torch.bool:
            return self.call(aten.add.Tensor, scores, mask, like=node)
        low = self.call(aten.full.default, [], float("-inf"), like=node, dtype=node.meta["val"].dtype)
        return self.call(aten.where.self, mask, scores, low, like=node)
