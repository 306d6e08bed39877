"""Attention that is written out as products, masks and a softmax, read upwards from each product with values.

Between the products may lie: scalings by positive numbers, a soft-cap, then biases and masks that depend on positions
alone, sinks, and layouts that keep the columns last. Anything else is named in NotAttention.

That masked scores count for nothing assumes scores within +-LIMIT: exp(-104) is exactly 0 in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from aropt.ir.calls import bind, draws, op_name
from aropt.restrict.positions import HIDES, LIMIT, Positions

SOFTMAX = {"aten::softmax", "aten::_softmax"}
PRODUCTS = {"aten::matmul", "aten::bmm"}
COPIES = {"aten::clone", "aten::lift_fresh_copy", "aten::contiguous"}
CASTS = {"aten::_to_copy", "aten::to", "aten::clone", "aten::dropout", "aten::type_as", "aten::contiguous"}
RESHAPES = {"aten::view", "aten::reshape", "aten::_unsafe_view"}
SWAPS = {"aten::transpose", "aten::permute"}
DROWNS = -1e12  # added to scores within +-LIMIT, this or less is a number of its own in fp32
LOWEST = -1e30  # a floor this low changes nothing but what a mask hides


class NotAttention(Exception):
    """A product is not the end of an attention; the text says why, of "it"."""


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
        self.zeroed: list[tuple[fx.Node, int, int]] = []  # tables of 0 and 1; how many biases come after; layouts then
        self.sinks: tuple[fx.Node, float] | None = None
        self.dropped = False  # a column after the softmax
        self.layouts: list[fx.Node] = []
        self.split = 0
        self.lowered = False  # by their maximum
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
        while is_cast(source):
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
        early = bool(self.sums()) or any(layouts <= self.split for _, _, layouts in self.biases)
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
        if self.lowered and self.sums():
            raise NotAttention("the sum of its softmax is of scores without their maximum")
        if self.dropped != (self.sinks is not None):
            raise NotAttention("a column of its softmax is dropped, or added, that is no sink")
        known = set(self.path)
        for node in self.path[1:]:
            if any(user not in known and not self.beside(user) for user in node.users):
                raise NotAttention("its scores or weights are used otherwise too")
        for found in self.zeroed:
            self.check_zeroed(*found)
        self.check_rows()

    def check_heads(self, query: Any, keys: Any, values: Any) -> None:
        """Raises NotAttention unless keys and values have the heads of the queries, or one for all of a sequence."""
        shape = self.anchor.meta["val"].shape
        if not self.before and list(map(str, query.meta["val"].shape[:-2])) != list(map(str, shape[:-2])):
            raise NotAttention("its queries have other leading axes than its scores")
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
        while is_cast(source):
            source = source.args[0]
        found = [n for n in source.users if op_name(n) == "aten::logsumexp"]
        return [n for n in found if list(bind(n)["dim"]) in ([-1], [rank(source) - 1])]

    def check_rows(self) -> None:
        """Raises NotAttention where numbers that do not drown the scores take the place of a whole row."""
        fills = [bias[2] * factor for bias, factor, _ in self.biases if not isinstance(bias, fx.Node)]
        if all(value <= DROWNS for value in fills):
            return
        if len({layouts for *_, layouts in self.biases}) > 1:
            raise NotAttention("its scores are replaced by a number, and laid out anew before another mask")
        tables = []
        for bias, factor, _ in self.biases:
            if isinstance(bias, fx.Node):
                tables.append(self.positions.value(bias, self.positions.capacity) * factor)
            else:
                condition = self.positions.value(bias[0], self.positions.capacity)
                tables.append(torch.where(condition == bias[1], bias[2] * factor, 0.0))
        if not bool((sum(tables).amax(-1) > -HIDES).all()):
            raise NotAttention("a row of its scores is replaced by a number wholly")

    def check_zeroed(self, table: fx.Node, later: int, layouts: int) -> None:
        """Raises NotAttention unless a mask that comes after it hides just what the table sets to zero."""
        for length in {3, self.positions.capacity}:
            value, total = self.positions.value(table, length), torch.zeros(())
            for bias, factor, at in self.biases[:later]:
                if not isinstance(bias, fx.Node) or at != layouts:
                    raise NotAttention("its scores are multiplied with a table")
                total = total + self.positions.value(bias, length) * factor
            if not bool((torch.where(value == 0, total <= -HIDES, value == 1)).all()):
                raise NotAttention("its scores are multiplied with a table that no mask goes with")

    def number(self, value: Any) -> float | None:
        """A Python number, or the value of a constant of one element."""
        while isinstance(value, fx.Node) and op_name(value) in COPIES:
            value = value.args[0]
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
    factor = None if x.get("rounding_mode") else reader.number(other)
    if factor is None and op_name(node) == "aten::mul" and other not in reader.content and not reader.softcap:
        reader.zeroed.append((other, len(reader.biases), len(reader.layouts)))
        return source
    if factor is None or factor <= 0:
        raise NotAttention("its scores are multiplied with something other than a positive number")
    reader.scale = reader.scale * factor if op_name(node) == "aten::mul" else reader.scale / factor
    return source


def biased(reader: Reader, node: fx.Node, x: Mapping[str, Any]) -> Any:
    """add, sub: a bias by position, or the row's maximum."""
    source, other, minus = x["self"], x["other"], op_name(node) == "aten::sub"
    if minus and is_maximum(other, source) and not reader.softcap and reader.sinks is None:
        reader.lowered = True
        return source
    if not minus and isinstance(other, fx.Node) and source not in reader.content:
        source, other = other, source
    if reader.number(other) == 0:
        return source
    if x["alpha"] != 1 or not isinstance(other, fx.Node):
        raise NotAttention("a number is added to its scores")
    reader.add(other, -1.0 if minus else 1.0)
    return source


def is_maximum(other: Any, source: Any) -> bool:
    """Whether it is the maximum of each row of scores, which a softmax takes out."""
    if isinstance(other, fx.Node) and op_name(other) == "getitem" and other.args[1] == 0:
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
    if floor is None or floor * reader.scale > LOWEST or x.get("max") is not None:
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
    if len(tensors) != 2 or x["dim"] not in (-1, rank(node) - 1) or tensors[1] in reader.content:
        raise NotAttention("columns are added to its scores")
    if len(reader.layouts) > reader.split or reader.biases or reader.zeroed:
        raise NotAttention("a column is added to its scores before they are changed")
    heads, sink = tensors[0].meta["val"].shape[-3], tensors[1]
    shapes = []
    while op_name(sink) in RESHAPES | {"aten::expand", "aten::unsqueeze"} or is_cast(sink):
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


def is_cast(node: Any) -> bool:
    """Whether a node changes nothing but a floating-point dtype."""
    return op_name(node) in CASTS and not draws(node) and bool(node.meta["val"].dtype.is_floating_point)


def rank(node: Any) -> int:
    return int(node.meta["val"].dim())
