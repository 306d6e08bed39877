"""restrict: compute only chosen rows of a forward, against stored keys and values (design section 4).

Given `forward(ids[B, T]) -> logits[B, T, V]`, returns the same computation for R chosen rows (what else the forward
reads of each row, [B, T, ...], is read of those):

    step(ids[B, R], slots[R], positions[B, R], slot_positions[B, S], k_0, v_0, ...)
        -> logits[B, R or 1, V], slot_positions, k_0, v_0, ...

Slots say where the rows' keys and values are stored; positions what rotary angles and masks see (-1: padding).
`slot_positions` holds the position stored in each slot (-1: empty). Rows of padding see only themselves.

On a canvas rows may see later ones, and slots are int64[B, R]: each sequence of a batch has rows of its own. Then it is
for the caller to know which stored rows are still right: `facts["reach"]` says how far each row sees.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.ir.naming import weight_name
from aropt.ir.program import Graph, Spec, StateSpec
from aropt.ir.torch_compat import build, propagate
from aropt.restrict import mixers, moves
from aropt.restrict.analysis import FULL_SIZE, Analysis, unsupported
from aropt.restrict.dims import (
    Axes,
    Axis,
    B,
    Factor,
    NotRowwise,
    count,
    elements,
    find,
    from_sizes,
    has,
    over_slots,
    positive,
    replaced,
)
from aropt.restrict.info import Hide, Info
from aropt.restrict.normalize import normalize_attention
from aropt.restrict.positions import HINT, Table, classify, factor_keys, is_number, refusal
from aropt.restrict.prepare import prepared
from aropt.restrict.rules import RESHAPES, named_axes

aten = torch.ops.aten
MAXINT = 2**63 - 1
REPLICATES = {
    "aten::expand", "aten::clone", "aten::_unsafe_view", "aten::view", "aten::reshape", "aten::unsqueeze",
    "aten::transpose", "aten::permute", "aten::repeat_interleave",
}  # fmt: skip
VIEWS = {
    "aten::view", "aten::expand", "aten::transpose", "aten::permute", "aten::t", "aten::unsqueeze", "aten::squeeze",
    "aten::select", "aten::slice",
}  # fmt: skip


@dataclass(frozen=True)
class Restricted:
    """The restricted graph, its state, new constants, and what was found out on the way."""

    graph: Graph
    state: dict[str, StateSpec]
    constants: dict[str, Tensor]
    facts: dict[str, Any]


def restrict(
    graph: Graph,
    weights: Mapping[str, Tensor],
    capacity: int,
    rows: str = "all",
    canvas: bool = False,
    never: Sequence[int] = (),
) -> Restricted:
    """Restricts `graph` (input ids[B, T], output logits) to rows, with an append cache or with that of a canvas.

    `rows="last"` computes what follows the last attention for the last row only. Positions run from 0 to capacity - 1.
    `never`: ids that no text holds (see aropt.restrict.excluded).
    Raises Unsupported where an append cache would not be exact, or where an op can't be classified.
    """
    try:
        graph, _ = normalize_attention(graph, weights, capacity, never)
        traced, names = graph.fx, propagate(graph.fx, graph.inputs, weights)
        if not canvas:
            traced, names = prepared(graph, weights, names, capacity, never)
        analysis = Analysis(traced, weights, names, capacity, canvas, never)
        return Restriction(analysis, weights, last=rows == "last").result(graph.name)
    except Unsupported:
        raise
    except Exception as error:  # of shape rules, by what the model does; it goes on as Unsupported
        raise unsupported(error, "the forward can't be rewritten to chosen rows") from error


class Restriction:
    """Writes the restricted graph node by node, from the analysis."""

    def __init__(self, analysis: Analysis, weights: Mapping[str, Tensor], last: bool) -> None:
        self.analysis, self.info, self.positions = analysis, analysis.info, analysis.positions
        self.weights = dict(weights)
        self.constants: dict[str, Tensor] = {}
        self.state: dict[str, StateSpec] = {}
        self.updated: dict[str, fx.Node] = {}
        self.masks: set[str] = set()
        self.canvas, self.seen = analysis.canvas, torch.zeros(analysis.positions.capacity, dtype=torch.int64)
        self.new: dict[fx.Node, fx.Node] = {}
        self.memo: dict[Any, fx.Node] = {}
        self.layers = 0
        self.out = fx.Graph()
        self.tail = self.find_tail() if last else set()
        names = ("ids", "slots", "positions", "slot_positions")
        self.ids, self.slots, self.rows, stored = (self.out.placeholder(n) for n in names)
        given = [n for n in analysis.graph.nodes if n.op == "placeholder" and n.name != "ids"]
        self.beside = {n: self.out.placeholder(n.name) for n in given}  # what the forward reads of each row besides ids
        self.last_input = [stored, *self.beside.values()][-1]
        if self.canvas:
            self.columns = self.call(ops.load("write_rows").overload, stored, self.slots, self.rows, 1)
        else:
            self.columns = self.call(aten.index_copy.default, stored, 1, self.slots, self.rows)

    def result(self, name: str) -> Restricted:
        for node in self.analysis.graph.nodes:
            if node not in self.analysis.content:
                continue
            if node.op == "placeholder":
                self.new[node] = self.beside.get(node, self.ids)
            elif node.op == "output":
                logits = self.fetch(node.all_input_nodes[0], node)
                self.out.output((logits, self.columns, *self.updated.values()))
            else:
                try:
                    self.new[node] = self.write(node)
                except NotRowwise as reason:
                    raise refusal(node, f"{op_name(node)} {reason}", HINT) from None
        slots = ("B", "R") if self.canvas else ("R",)
        specs = {"ids": ("B", "R"), "slots": slots, "positions": ("B", "R"), "slot_positions": ("B", "S")}
        inputs = {n: Spec(torch.int64, dims) for n, dims in specs.items()}
        for node in (n for n in self.analysis.graph.nodes if n.op == "placeholder"):
            inputs[node.name] = Spec(node.meta["val"].dtype, ("B", "R", *node.meta["val"].shape[2:]))
        inputs |= {n: s.spec for n, s in self.state.items()}
        graph = build(name, self.out, inputs, ["logits", "slot_positions", *self.state], self.weights)
        state = {"slot_positions": StateSpec(self.kind, inputs["slot_positions"], -1, 1), **self.state}
        facts = {"masks": sorted(self.masks), "attentions": self.layers, "reach": self.seen.tolist()}
        return Restricted(graph, state, {c: v for c, v in self.constants.items() if c in graph.weights()}, facts)

    @property
    def kind(self) -> str:
        return "canvas-kv" if self.canvas else "append-kv"

    def find_tail(self) -> set[fx.Node]:
        """Content nodes that no attention follows: their earlier rows are not needed."""
        before = {n for n, info in self.info.items() if info.role != "row"}
        size = -1
        while len(before) > size:
            size = len(before)
            for node in reversed(self.info):
                inputs = [n for n in node.all_input_nodes if n in before and self.flattened(n)]
                if inputs or any(u in before for u in node.users):
                    before.add(node)
        for node in self.info:
            if op_name(node) == "getitem" and node.args[0] in before:
                before.add(node)
        return {n for n in self.info if n not in before and n.op != "placeholder"}

    def flattened(self, node: fx.Node) -> bool:
        """Whether rows are part of a wider axis, so that the last one can't be taken."""
        axes = self.info[node].axes
        return isinstance(axes, tuple) and find(axes, "r") is None and count(axes, "r") > 0

    # --- one node --------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        node = self.out.call_function(target, args, kwargs)
        if like is not None:
            node.meta = {"where": like.meta.get("where", ""), "origin": like.meta.get("origin", like.name)}
        return node

    def write(self, node: fx.Node) -> fx.Node:
        info = self.info[node]
        if info.role in ("mixer", "score", "mix"):
            return mixers.written(self, node, info)
        if info.role == "moved":
            self.seen = self.seen.maximum((torch.arange(len(self.seen)) + info.ahead).clamp(max=len(self.seen) - 1))
            return moves.write(self, node)
        return self.emit(node, lambda n: self.operand(n, node, info), info.axes, node in self.tail)

    def emit(self, node: fx.Node, lookup: Callable[[fx.Node], Any], axes: Any, tail: bool) -> fx.Node:
        """The same op on new operands; shapes are rebuilt from the meaning of the axes."""
        name = op_name(node)
        if name in RESHAPES:
            source = lookup(node.args[0])  # type: ignore[arg-type]
            target = aten.expand.default if name == "aten::expand" else aten.reshape.default
            return self.call(target, source, self.shape(axes, tail, target is aten.reshape.default), like=node)
        if name == "aten::repeat_interleave":
            x = bind(node)
            return self.call(node.target, lookup(x["self"]), x["repeats"], x["dim"], like=node)
        if name == "aten::squeeze":
            return self.squeezed(node, lookup(node.args[0]))  # type: ignore[arg-type]
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        return self.call(node.target, *args, like=node, **kwargs)

    def squeezed(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Without the axes that are one element at any length; one sequence, or one row, stays an axis."""
        axes = self.info[node.args[0]].axes  # type: ignore[index]
        named = named_axes({"self": axes, "dim": bind(node).get("dim")})
        for i in sorted(named, reverse=True):
            value = value if axes[i] else self.call(aten.squeeze.dim, value, i, like=node)
        return value

    def operand(self, source: fx.Node, user: fx.Node, info: Info) -> Any:
        """The restricted form of an input of `user`."""
        if source in self.analysis.content:
            return self.fetch(source, user)
        if is_number(source):
            return self.positions.number(source)
        return self.position_operand(source, info, user)

    def fetch(self, source: fx.Node, user: fx.Node) -> fx.Node:
        """A content operand; its last row only where the tail begins."""
        new = self.new[source]
        if source in self.tail or (user not in self.tail and user.op != "output") or not self.tail:
            return new
        row = find(self.info[source].axes, "r")
        if row is None:
            if isinstance(self.info[source].axes, tuple) and not count(self.info[source].axes, "r"):
                return new
            raise refusal(user, "the last row can't be taken of a flattened axis", HINT)
        return self.memoized(("last", source), lambda: self.call(aten.slice.Tensor, new, row, -1, MAXINT))

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

    # --- attention -------------------------------------------------------------------------------------------------

    def next_layer(self) -> int:
        self.layers += 1
        return self.layers - 1

    def full(self, node: fx.Node, name: str) -> fx.Node:
        """The value over all slots: cached before heads are replicated or transposed, and replayed from there."""
        chain = self.replay(node)
        source = chain[0].args[0] if chain else node
        value = self.cached(source, name)  # type: ignore[arg-type]
        for step in chain:
            axes = over_slots(self.info[step].axes)
            value = self.memoized(("full", step), partial(self.emit, step, partial(always, value), axes, False))
        return value

    def replay(self, node: fx.Node) -> list[fx.Node]:
        """The layout ops to replay on the full value: those after the best value to cache.

        That is the smallest one (before heads are repeated), as [batch, heads, rows, features] or at least with rows
        and batch as axes of their own where there is such a value, and as late as possible.
        """
        chain = [node]
        while op_name(chain[0]) in REPLICATES and chain[0].args[0] in self.analysis.content:
            chain.insert(0, chain[0].args[0])  # type: ignore[arg-type]

        def merit(i: int) -> tuple[Any, ...]:
            axes = self.info[chain[i]].axes
            if not isinstance(axes, tuple) or find(axes, "r") is None:
                return (False,)
            last_but_one = find(axes, "r") == len(axes) - 2
            return True, -elements(axes), find(axes, "b") is not None, last_but_one, len(axes) == 4, i

        best = max(range(len(chain)), key=merit)
        return chain[best + 1 :]

    def cached(self, node: fx.Node, name: str) -> fx.Node:
        """Writes the rows' value into a new state at their slots; returns the updated state."""
        return self.memoized(("cache", node), lambda: self.write_cached(node, name))

    def write_cached(self, node: fx.Node, name: str) -> fx.Node:
        axes = self.info[node].axes
        row = find(axes, "r")
        if row is None:
            raise refusal(node, "the keys or values have rows flattened into another axis", HINT)
        dims = tuple("S" if i == row else text(a) for i, a in enumerate(axes))
        store = self.stored(name, StateSpec(self.kind, Spec(node.meta["val"].dtype, dims), 0.0, row))
        # no "origin": it holds all slots, not the rows of the original
        if self.canvas and axes[0] == B and row > 0:
            self.updated[name] = self.call(ops.load("write_rows").overload, store, self.slots, self.new[node], row)
        elif self.canvas:
            index = self.memoized(("index", axes), lambda: self.spread_slots(axes))
            self.updated[name] = self.call(aten.scatter.src, store, row, index, self.new[node])
        else:
            self.updated[name] = self.call(aten.index_copy.default, store, row, self.slots, self.new[node])
        self.updated[name].meta = {"where": node.meta.get("where", "")}
        return self.updated[name]

    def stored(self, name: str, state: StateSpec) -> fx.Node:
        """A new state of the restricted forward."""
        with self.out.inserting_after(self.last_input):
            self.last_input = self.out.placeholder(name)
        self.state[name] = state
        return self.last_input

    def spread_slots(self, axes: Axes) -> fx.Node:
        """The slots of the rows for each element of a value with these axes."""
        laid = self.layout(self.slots, ["b", "r"], axes, False)
        return self.call(aten.expand.default, laid, self.shape(axes, False, False))

    # --- position-only operands --------------------------------------------------------------------------------------

    def position_operand(self, source: fx.Node, info: Info, user: fx.Node) -> fx.Node:
        """A weight as it is; a position table gathered at the rows (and columns); a mask as visibility."""
        dims = self.positions.dims(source)
        if not any(isinstance(d, str) for d in dims):
            return self.weight(source)
        axes, tail = info.operands[source], user in self.tail
        beside = info.axes
        if op_name(user) in FULL_SIZE and "dim" in bind(user):
            i = positive(bind(user)["dim"], len(beside))
            beside = replaced(beside, i, axes[i])
        if source in info.hides:
            return self.hiding(source, axes, info.hides[source], beside)
        value = self.gathered(source, self.positions.table(source, axes), beside, tail)
        if op_name(user) in FULL_SIZE:
            return self.call(aten.expand.default, value, self.shape(beside, tail, False))
        return value

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
        if boolean and hide.value is True:
            seen = self.memoized(("not", seen), lambda: call(aten.logical_not.default, seen))
        if boolean and uniform:
            return seen
        if uniform:
            value = self.constant(mask, rest.flatten()[0], "_seen")
        else:
            value = self.gathered(mask, table, beside, False)
        if boolean:
            return call(aten.logical_or.default if hide.value else aten.logical_and.default, seen, value)
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


def always(value: fx.Node, _: fx.Node) -> fx.Node:
    return value


def text(axis: Axis) -> int | str:
    """An axis as a dim of a Spec: 64, "B" or "B*4"."""
    if not has(axis, "brc"):
        return elements((axis,))
    return "*".join({"b": "B", "r": "R", "c": "S"}.get(kind, str(n)) for kind, n in axis)
