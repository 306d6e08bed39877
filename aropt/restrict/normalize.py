"""Attention written out as matmul, mask, softmax, matmul becomes one op: SDPA, or `aropt::attention` where SDPA lacks a
soft-cap, sinks, or the sum of the softmax.

A forward is read upwards from each product with values. Between the products may lie: scalings by positive numbers, a
soft-cap, then biases and masks that depend on positions alone, sinks, and layouts that keep the columns last. Anything
else stays as it is, with the reason at its nodes (`WHY` in their meta), and `restrict` refuses it by that name.

That masked scores count for nothing assumes scores within +-LIMIT: exp(-104) is exactly 0 in fp32.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import bind, draws, op_name
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build, propagate
from aropt.restrict.positions import HIDES, LIMIT, Positions, content_nodes

aten = torch.ops.aten
WHY = "no attention"  # in a node's meta: why it is not part of one
PRODUCTS = {"aten::matmul", "aten::bmm"}
SOFTMAX = {"aten::softmax", "aten::_softmax"}
CASTS = {"aten::_to_copy", "aten::to", "aten::clone", "aten::dropout", "aten::type_as", "aten::contiguous"}
RESHAPES = {"aten::view", "aten::reshape", "aten::_unsafe_view"}
SWAPS = {"aten::transpose", "aten::permute"}
LOWEST = -1e30  # a floor this low changes nothing but what a mask hides


class NotAttention(Exception):
    """A product is not the end of an attention; the text says why, of "it"."""


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
            except NotAttention as reason:
                for one in reader.path:
                    one.meta[WHY] = by_name[one.name].meta[WHY] = str(reason)
                continue
            write(copy, reader)
            count += 1
    if not count:
        return graph, 0
    return build(graph.name, ordered(copy), dict(graph.inputs), list(graph.outputs), weights), count


def sums_columns(product: Any) -> bool:
    """Whether a product is over an axis of the sequence, as that of weights and values is."""
    return not isinstance(product.args[0].meta["val"].shape[-1], int)


def copied(graph: fx.Graph) -> fx.Graph:
    """The same graph, to be changed."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, mapping))
    for old, new in mapping.items():
        new.meta = dict(old.meta)
    return copy


class Reader:
    """What lies between the products of one attention. `layouts` are the steps after the scores' product that lay them
    out anew, the nearest to it last; `split` of them come after the softmax.
    """

    def __init__(self, product: fx.Node, content: set[fx.Node], positions: Positions) -> None:
        self.product, self.content, self.positions = product, content, positions
        self.path: list[fx.Node] = [product]
        self.scores: fx.Node = product  # at the end: the product of queries and keys
        self.softmax: fx.Node | None = None
        self.scale, self.softcap = 1.0, 0.0
        self.biases: list[tuple[Any, float, int]] = []  # a node, or (condition, hides where, low); factor; layouts then
        self.zeroed: list[fx.Node] = []  # tables of 0 and 1 that scores are multiplied with
        self.sinks: tuple[fx.Node, float] | None = None
        self.dropped = False  # a column after the softmax
        self.layouts: list[fx.Node] = []
        self.split = 0
        self.shared = False  # one head of keys for all of queries

    def read(self) -> None:
        """Reads up to the product of queries and keys. Raises NotAttention."""
        node = self.step(self.product, self.product.args[0])
        while op_name(node) not in SOFTMAX:
            node = self.after(node)
        self.softmax = node
        if bind(node)["dim"] not in (-1, rank(node) - 1):
            raise NotAttention("its softmax is not over the columns")
        self.split = len(self.layouts)
        node = self.step(node, node.args[0])
        while op_name(node) not in PRODUCTS:
            peel = PEELS.get(op_name(node))
            if peel is None:
                raise NotAttention(f"{op_name(node)} lies between its scores and their softmax")
            node = self.step(node, peel(self, node, bind(node)))
        self.scores = node
        self.choose()
        self.check()

    def step(self, node: fx.Node, source: Any) -> fx.Node:
        """The node that one works on, behind casts; notes both."""
        while op_name(source) in CASTS and not draws(source):
            self.path.append(source)
            source = source.args[0]
        if not isinstance(source, fx.Node) or source.op != "call_function" or source not in self.content:
            raise NotAttention("its weights are not a softmax of scores")
        self.path.append(source)
        return source

    def after(self, node: fx.Node) -> fx.Node:
        """One step up between the softmax and the product with the values."""
        name, x = op_name(node), bind(node)
        if name in RESHAPES | SWAPS:
            return self.step(node, laid(self, node, x))
        last = name == "aten::slice" and x["dim"] in (-1, rank(node) - 1)
        if last and not self.dropped and not x["start"] and x["end"] == -1 and x["step"] == 1:
            self.dropped = True
            return self.step(node, x["self"])
        raise NotAttention(f"{name} lies between its softmax and its values")

    def choose(self) -> None:
        """Where scores are [B * H, T, T] at their softmax and were [B, H, T, T] just before, these are the anchor."""
        flat: Any = self.layouts[self.split] if len(self.layouts) > self.split else None
        early = any(layouts <= self.split for _, _, layouts in self.biases)
        if flat is not None and op_name(flat) in RESHAPES and rank(flat) == 3 and rank(flat.args[0]) == 4 and not early:
            self.split += 1
        self.anchor: Any = self.layouts[self.split - 1].args[0] if self.split else self.softmax
        self.before, self.behind = self.layouts[self.split :][::-1], self.layouts[: self.split][::-1]

    def check(self) -> None:
        """Raises NotAttention where what was read is not one attention."""
        query: Any = self.scores.args[0]
        keys: Any = self.scores.args[1]
        values: Any = self.product.args[1]
        if not {query, keys, values} <= self.content:
            raise NotAttention("its queries, keys or values do not depend on the tokens")
        if len({n.meta["val"].dtype for n in (query, keys, values)}) > 1 or rank(values) < 3:
            raise NotAttention("its queries, keys and values are not alike")
        self.check_heads(query, keys, values)
        if self.dropped != (self.sinks is not None):
            raise NotAttention("a column of its softmax is dropped, or added, that is no sink")
        known = set(self.path)
        for node in self.path[1:]:
            if any(user not in known and not self.beside(user) for user in node.users):
                raise NotAttention("its scores or weights are used otherwise too")
        for table in self.zeroed:
            self.check_zeroed(table)

    def check_heads(self, query: Any, keys: Any, values: Any) -> None:
        """Raises NotAttention unless keys and values have the heads of the queries, or one for all of a sequence."""
        shape = self.anchor.meta["val"].shape
        for node in (keys, values):
            lead = list(map(str, node.meta["val"].shape[:-2]))
            if len(lead) + 2 == len(shape):
                if lead[:-1] != list(map(str, shape[:-3])) or lead[-1] not in (str(shape[-3]), "1"):
                    raise NotAttention("its queries and keys differ in their leading axes")
                self.shared = self.shared or (lead[-1] != str(shape[-3]) and len(lead) == 2)
            elif len(lead) != 1 or len(shape) != 4 or not isinstance(shape[1], int):
                raise NotAttention("its scores are laid out in a way that is not known")
            else:
                self.shared = self.shared or lead[0] == str(shape[0])

    def beside(self, user: fx.Node) -> bool:
        """Whether it is a maximum that is subtracted, or the sum of the softmax that is asked for."""
        name = op_name(user)
        if name in ("aten::amax", "aten::max"):
            known = {n for n in self.path if op_name(n) == "aten::sub"}
            return all(u in known or set(u.users) <= known for u in user.users)
        return name == "aten::logsumexp" and user in self.sums()

    def sums(self) -> list[fx.Node]:
        """The logarithms of sums over the columns of what the softmax works on."""
        assert self.softmax is not None
        source: Any = self.softmax.args[0]
        while op_name(source) in CASTS:
            source = source.args[0]
        found = [n for n in source.users if op_name(n) == "aten::logsumexp"]
        return [n for n in found if list(bind(n)["dim"]) in ([-1], [rank(source) - 1])]

    def check_zeroed(self, table: fx.Node) -> None:
        """Raises NotAttention unless a mask hides just what the table sets to zero."""
        for length in {3, self.positions.capacity}:
            value, total = self.positions.value(table, length), torch.zeros(())
            for bias, factor, _ in self.biases:
                if not isinstance(bias, fx.Node):
                    raise NotAttention("its scores are multiplied with a table")
                total = total + self.positions.value(bias, length) * factor
            if not bool((torch.where(value == 0, total <= -HIDES, value == 1)).all()):
                raise NotAttention("its scores are multiplied with a table that no mask goes with")

    def number(self, value: Any) -> float | None:
        """A Python number, or the value of a constant of one element."""
        if isinstance(value, fx.Node) and op_name(value) == "aten::full" and not bind(value)["size"]:
            value = bind(value)["fill_value"]
        elif isinstance(value, fx.Node) and value.op == "get_attr":
            held = self.positions.weights[str(value.target)]
            value = held.item() if held.numel() == 1 else None
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    def add(self, bias: Any, factor: float) -> None:
        """Notes a bias or mask. Raises NotAttention where it can't be one."""
        if self.softcap:
            raise NotAttention("a mask comes before its soft-cap")
        if isinstance(bias, fx.Node):
            if bias in self.content:
                raise NotAttention("its scores are changed by the tokens in a way that is no product with keys")
            largest = self.positions.value(bias, self.positions.capacity) * factor
            if not bool((largest <= LIMIT).all()):
                raise NotAttention("a bias of its scores is so large that it undoes masks")
        self.biases.append((bias, factor * self.scale, len(self.layouts)))


# --- one op between the products -------------------------------------------------------------------------------------


def scaled(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """mul, div: by a number, or by a table of 0 and 1."""
    source, other = x["self"], x["other"]
    if op_name(node) == "aten::mul" and (not isinstance(source, fx.Node) or source not in reader.content):
        source, other = other, source
    factor = reader.number(other)
    if factor is None and op_name(node) == "aten::mul" and other not in reader.content and not reader.softcap:
        reader.zeroed.append(other)
        return source
    if factor is None or factor <= 0:
        raise NotAttention("its scores are multiplied with something other than a positive number")
    reader.scale = reader.scale * factor if op_name(node) == "aten::mul" else reader.scale / factor
    return source


def biased(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """add, sub: a bias by position, or the row's maximum."""
    source, other, minus = x["self"], x["other"], op_name(node) == "aten::sub"
    if minus and is_maximum(other, source):
        return source
    if not minus and isinstance(other, fx.Node) and source not in reader.content:
        source, other = other, source
    if x["alpha"] != 1 or not isinstance(other, fx.Node):
        raise NotAttention("a number is added to its scores")
    reader.add(other, -1.0 if minus else 1.0)
    return source


def is_maximum(other: Any, source: Any) -> bool:
    """Whether it is the maximum of each row of scores, which a softmax takes out."""
    if op_name(other) == "getitem" and other.args[1] == 0:
        other = other.args[0]
    if not isinstance(other, fx.Node) or op_name(other) not in ("aten::amax", "aten::max"):
        return False
    x = bind(other)
    over = x.get("dim")
    over = over if isinstance(over, (list, tuple)) else [over]
    return x["self"] is source and bool(x.get("keepdim")) and list(over) in ([-1], [rank(source) - 1])


def filled(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """where, masked_fill: a low number where a mask hides."""
    hides = op_name(node) == "aten::masked_fill"
    source, condition, low = x["self"], x["mask" if hides else "condition"], x["value" if hides else "other"]
    if not hides and isinstance(low, fx.Node) and low in reader.content:
        source, low, hides = low, source, True
    value = reader.number(low)
    if condition in reader.content or value is None or value * reader.scale > -HIDES:
        raise NotAttention("its scores are replaced by something other than a low number where a mask says so")
    reader.add((condition, hides, value), 1.0)
    return source


def floored(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """maximum, clamp: a floor that only what is hidden lies under."""
    floor = reader.number(x["other"] if "other" in x else x["min"])
    if floor is None or floor > LOWEST or x.get("max") is not None:
        raise NotAttention("its scores are clamped")
    return x["self"]


def capped(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """tanh: c * tanh(scores / c)."""
    if reader.softcap:
        raise NotAttention("its scores are capped twice")
    reader.softcap = reader.scale
    return x["self"]


def sunk(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """cat: a column of sinks, one a head."""
    tensors = x["tensors"]
    if len(tensors) != 2 or x["dim"] not in (-1, rank(node) - 1) or tensors[1] in reader.content or reader.layouts:
        raise NotAttention("columns are added to its scores")
    heads, sink = tensors[0].meta["val"].shape[-3], tensors[1]
    shapes = []
    while op_name(sink) in RESHAPES | CASTS | {"aten::expand", "aten::unsqueeze"}:
        shapes.append([*sink.meta["val"].shape][-3:])
        sink = sink.args[0]
    if not any(str(s) == str([heads, 1, 1]) for s in shapes) or str([*sink.meta["val"].shape]) != str([heads]):
        raise NotAttention("a column is added to its scores that is no sink of each head")
    reader.sinks = sink, reader.scale
    return tensors[0]


def laid(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """view, permute: another layout, whose last axis is the columns."""
    source = x["self"]
    if op_name(node) in SWAPS:
        last = list(x["dims"])[-1] if "dims" in x else max(x["dim0"] % rank(node), x["dim1"] % rank(node))
        kept = last % rank(node) == rank(node) - 1 if "dims" in x else last != rank(node) - 1
    else:
        kept = str(source.meta["val"].shape[-1]) == str(node.meta["val"].shape[-1])
    if not kept:
        raise NotAttention("its scores are laid out with the columns elsewhere")
    reader.layouts.append(node)
    return source


Peel = Callable[[Reader, fx.Node, Mapping[str, Any]], Any]
PEELS: dict[str, Peel] = {
    **dict.fromkeys(("aten::mul", "aten::div"), scaled),
    **dict.fromkeys(("aten::add", "aten::sub"), biased),
    **dict.fromkeys(("aten::where", "aten::masked_fill"), filled),
    **dict.fromkeys(("aten::maximum", "aten::clamp", "aten::clamp_min"), floored),
    "aten::tanh": capped,
    "aten::cat": sunk,
    **dict.fromkeys(RESHAPES | SWAPS, laid),
}


# --- the op that stands in their place -------------------------------------------------------------------------------


def write(graph: fx.Graph, reader: Reader) -> None:
    """Replaces the product with the values by one attention, laid out as the scores are at `Reader.anchor`."""
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
        for node in reader.sums():
            node.replace_all_uses_with(call(aten.unsqueeze.default, (seen, -1)) if bind(node)["keepdim"] else seen)
    product.replace_all_uses_with(result)


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
            value, shape = bias, bias.meta["val"].shape
            value = value if bias.meta["val"].dtype == kind else call(aten._to_copy.default, (value,), {"dtype": kind})
            value = value if factor == 1 else call(aten.mul.Tensor, (value, factor))
        else:
            condition, hides, low = bias
            shape = condition.meta["val"].shape
            zero, hidden = (call(aten.full.default, ([], x), {"dtype": kind}) for x in (0.0, low * factor))
            value = call(aten.where.self, (condition, hidden, zero) if hides else (condition, zero, hidden))
        if reader.before[done:]:
            sizes = [call(aten.sym_size.int, (stages[done], i)) for i in range(len(shape) - 1)]
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
    for node in result.nodes:
        if node.target is aten.view.default:  # strides change
            node.target = aten.reshape.default
    return result


def rank(node: Any) -> int:
    return int(node.meta["val"].dim())


def swaps_last(node: Any) -> bool:
    """Whether it is x.transpose(-1, -2)."""
    n = rank(node)
    return op_name(node) == "aten::transpose" and {d % n for d in node.args[1:]} == {n - 2, n - 1}
