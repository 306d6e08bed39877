"""A restricted forward as it is written: its inputs, and values by position at the rows and slots that it is given.

What depends on positions alone was evaluated at capture; here it is looked up at the rows' positions, or computed from
them where its form is known, and laid out beside what it is combined with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import op_name
from aropt.ir.naming import weight_name
from aropt.restrict.analysis import Analysis
from aropt.restrict.dims import Axes, Axis, B, Factor, NotRowwise, from_sizes, has
from aropt.restrict.info import Hide
from aropt.restrict.positions import Table, classify, factor_keys, is_number

aten = torch.ops.aten
MAXINT = 2**63 - 1
VIEWS = {
    "aten::view", "aten::expand", "aten::transpose", "aten::permute", "aten::t", "aten::unsqueeze", "aten::squeeze",
    "aten::select", "aten::slice",
}  # fmt: skip


class Places:
    """Writes nodes of a restricted forward that know nothing of what its rows hold."""

    def __init__(self, analysis: Analysis, weights: Mapping[str, Tensor]) -> None:
        self.analysis, self.positions, self.canvas = analysis, analysis.positions, analysis.canvas
        self.weights = dict(weights)
        self.constants: dict[str, Tensor] = {}
        self.masks: set[str] = set()
        self.seen = torch.zeros(analysis.positions.capacity, dtype=torch.int64)  # how far each row sees
        self.memo: dict[Any, fx.Node] = {}
        self.out = fx.Graph()
        names = ("ids", "slots", "positions", "slot_positions")
        self.ids, self.slots, self.rows, stored = (self.out.placeholder(n) for n in names)
        given = [n for n in analysis.graph.nodes if n.op == "placeholder" and n.name != "ids"]
        self.beside = {n: self.out.placeholder(n.name) for n in given}  # what the forward reads of each row besides ids
        self.last_input = [stored, *self.beside.values()][-1]
        if self.canvas:
            self.columns = self.call(ops.load("write_rows").overload, stored, self.slots, self.rows, 1)
        else:
            self.columns = self.call(aten.index_copy.default, stored, 1, self.slots, self.rows)

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        node = self.out.call_function(target, args, kwargs)
        if like is not None:
            node.meta = {"where": like.meta.get("where", ""), "origin": like.meta.get("origin", like.name)}
        return node

    def shape(self, axes: Axes, tail: bool, infer: bool) -> list[Any]:
        """Size arguments for axes; one symbolic axis may be -1, which costs nothing at run time."""
        symbolic = [i for i, axis in enumerate(axes) if has(axis, "cb") or (has(axis, "r") and not tail)]
        last = symbolic[-1] if symbolic and infer else -1
        free = next((i for i in symbolic if axes[i] != B), last)
        return [-1 if infer and i == free else self.size(axis, tail) for i, axis in enumerate(axes)]

    def size(self, axis: Axis, tail: bool) -> Any:
        """The size of an axis as an int or a node."""
        total: Any = 1
        for kind, n in axis:
            factor: Any = n if kind == "." else 1
            if kind == "b" or kind == "c" or (kind == "r" and not tail):
                source, dim = {"b": (self.ids, 0), "r": (self.ids, 1), "c": (self.columns, 1)}[kind]
                factor = self.memoized(("size", kind), partial(self.call, aten.sym_size.int, source, dim))
            if isinstance(total, int) and isinstance(factor, int):
                total *= factor
            else:
                total = factor if total == 1 else total if factor == 1 else self.call(operator.mul, total, factor)
        return total

    def memoized(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def spread_slots(self, axes: Axes) -> fx.Node:
        """The slots of the rows for each element of a value with these axes."""
        laid = self.layout(self.slots, ["b", "r"], axes, False)
        return self.call(aten.expand.default, laid, self.shape(axes, False, False))

    def weight(self, source: fx.Node) -> fx.Node:
        """A value that depends on no sizes: weights and views of them as they are, anything else as a constant."""
        if source.op == "get_attr":
            return self.memoized(("weight", source), lambda: self.out.get_attr(str(source.target)))
        inputs = source.all_input_nodes
        if op_name(source) in VIEWS and len(inputs) == 1 and not is_number(inputs[0]):
            return self.memoized(("weight", source), lambda: self.out.node_copy(source, self.weight))
        self.positions.table(source, from_sizes(self.positions.dims(source)))  # raises if it depends on the length
        return self.constant(source, self.positions.value(source, self.positions.capacity))

    def constant(self, source: fx.Node, value: Tensor, kind: str = "") -> fx.Node:
        """A new weight that holds a value evaluated at capture."""
        return self.memoized(("constant", source, kind), lambda: self.new_weight(source.name + kind, value))

    def new_weight(self, text: str, value: Tensor) -> fx.Node:
        """A weight "positions.TEXT"."""
        name = weight_name(f"positions.{text}", value, self.weights)
        self.constants[name] = self.weights[name] = value.detach().contiguous().clone()
        return self.out.get_attr(name)

    def hiding(self, mask: fx.Node, axes: Axes, hide: Hide, beside: Axes) -> fx.Node:
        """A mask over rows x slots: what the table says where it doesn't hide, its hiding value elsewhere."""
        return self.memoized(("hiding", mask, axes, hide, beside), lambda: self.write_hiding(mask, axes, hide, beside))

    def write_hiding(self, mask: fx.Node, axes: Axes, hide: Hide, beside: Axes) -> fx.Node:
        table, call = self.positions.table(mask, axes), self.call
        seen = self.spread(self.visible(hide.entries), beside)
        rest = table.matrix(hide.entries.shape[0])[..., ~hide.entries]
        uniform = bool((rest == rest.flatten()[0]).all())
        boolean = table.value.dtype == torch.bool
        if boolean and uniform:
            return seen
        if uniform:
            value = self.constant(mask, rest.flatten()[0], "_seen")
        else:
            value = self.gathered(mask, table, beside, False)
        if boolean:
            return call(aten.logical_and.default, seen, value)
        gone = self.constant(mask, torch.tensor(hide.value).to(table.value.dtype), f"_hidden_{hide.value:g}")
        return call(aten.where.self, seen, value, gone)

    def visible(self, hidden: Tensor) -> fx.Node:
        """bool[B, R, S]: which slots each row sees. Known mask shapes are computed, others looked up."""
        kind, width = classify(hidden)
        far = torch.where(hidden, -1, torch.arange(len(hidden))).amax(1)
        self.seen = torch.maximum(self.seen, far)
        self.masks.add(f"window {width}" if kind == "window" else kind)
        key = (hash(hidden.numpy().tobytes()), hidden.shape) if kind == "table" else width
        return self.memoized(("visible", kind, key), lambda: self.write_visible(kind, width, hidden))

    def write_visible(self, kind: str, width: int, hidden: Tensor) -> fx.Node:
        call = self.call
        rows = self.memoized("rows3", lambda: call(aten.unsqueeze.default, self.rows, 2))  # [B, R, 1]
        stored = self.memoized("columns3", lambda: call(aten.unsqueeze.default, self.columns, 1))  # [B, 1, S]
        written = self.memoized("written", lambda: call(aten.ge.Scalar, stored, 0))
        if kind == "table":
            table = self.new_weight("visible", ~hidden)
            index = [call(aten.unsqueeze.default, self.clamped(self.rows), 2),
                     call(aten.unsqueeze.default, self.clamped(self.columns), 1)]  # fmt: skip
            seen = call(aten.index.Tensor, table, index)
        elif kind == "all":
            seen = written
        elif kind in ("causal", "window"):
            seen = self.memoized("causal", lambda: call(aten.le.Tensor, stored, rows))
            if kind == "window":
                inside = call(aten.gt.Tensor, stored, call(aten.sub.Tensor, rows, width))
                seen = call(aten.logical_and.default, seen, inside)
        return call(aten.logical_or.default, call(aten.logical_and.default, seen, written), self.own_slot())

    def own_slot(self) -> fx.Node:
        """bool[R, S]: a row always sees itself, so that padding rows stay finite."""

        def make() -> fx.Node:
            size = self.memoized(("size", "c"), lambda: self.call(aten.sym_size.int, self.columns, 1))
            slots = self.call(aten.arange.default, size, device=torch.device("cpu"))
            return self.call(
                aten.eq.Tensor, slots, self.call(aten.unsqueeze.default, self.slots, 2 if self.canvas else 1)
            )

        return self.memoized("own", make)

    # --- tables at positions -----------------------------------------------------------------------------------------

    def clamped(self, node: fx.Node) -> fx.Node:
        return self.memoized(("clamped", node), lambda: self.call(aten.clamp.default, node, 0))

    def spread(self, value: fx.Node, beside: Axes) -> fx.Node:
        """[B, R, S] laid out beside a value with the given axes."""
        return self.memoized(("spread", value, beside), lambda: self.layout(value, ["b", "r", "c"], beside, False))

    def gathered(self, source: fx.Node, table: Table, beside: Axes, tail: bool) -> fx.Node:
        """A position table at the rows' (and columns') positions, laid out beside a value with the given axes."""
        key = ("gathered", source, table, beside, tail)
        return self.memoized(key, lambda: self.write_gathered(source, table, beside, tail))

    def write_gathered(self, source: fx.Node, table: Table, beside: Axes, tail: bool) -> fx.Node:
        indexed = [k for k in "rc" if k in table.keys]
        rest = [k for k in table.keys if k not in indexed]
        if len(set(table.keys)) != len(table.keys):
            raise NotRowwise("pairs rows with rows in a position value")
        small = table.value.permute([table.keys.index(k) for k in indexed + rest])
        name = self.constant(source, small, "_" + "".join(map(str, indexed)) if indexed else "_same")
        if not indexed:
            return self.layout(name, rest, beside, tail)
        index = [self.position_index(k, tail) for k in indexed]
        if len(index) == 2:
            index = [self.call(aten.unsqueeze.default, index[0], 2), self.call(aten.unsqueeze.default, index[1], 1)]
        if len(index) == 1 and small.dim() == 2 and small.is_floating_point():
            value = self.call(aten.embedding.default, name, index[0])  # what every target has a fast kernel for
        else:
            value = self.call(aten.index.Tensor, name, index)
        return self.layout(value, ["b", *indexed, *rest], beside, tail)

    def position_index(self, kind: str, tail: bool) -> fx.Node:
        """Positions of the rows, of the last row, or of the slots; padding and empty slots count as position 0."""
        index = self.clamped(self.rows if kind == "r" else self.columns)
        if kind == "r" and tail:
            return self.memoized("last rows", lambda: self.call(aten.slice.Tensor, index, 1, -1, MAXINT))
        return index

    def layout(self, value: fx.Node, present: list[Any], beside: Axes, tail: bool) -> fx.Node:
        """Moves dims, named by `present` as in Table.keys and "b", to where `beside` has them.

        An axis of several factors such as B*H needs all of them: missing ones are repeated.
        """
        keys = factor_keys(beside)
        order = [present.index(key) for axis in keys for key in axis if key in present]
        if sorted(order) != list(range(len(present))):
            raise NotRowwise("has a position value that does not line up with what it is combined with")
        if order != sorted(order):
            value = self.call(aten.permute.default, value, order)
        wide: list[Any] = []  # one entry a dim: -1, or the size to repeat to
        sizes: list[Any] = []  # one entry an axis of `beside`
        for axis, names in zip(beside, keys, strict=True):
            held = [key in present for key in names]
            for factor, kept in zip(axis, held) if any(held) else [(Factor(".", 1), False)]:
                if not kept:
                    value = self.call(aten.unsqueeze.default, value, len(wide))
                wide.append(-1 if kept or not any(held) else self.size((factor,), tail))
            sizes.append(self.size(axis, tail) if any(held) else 1)
        if len(wide) == len(sizes):
            return value
        return self.call(aten.reshape.default, self.call(aten.expand.default, value, wide), sizes)
