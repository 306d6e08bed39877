"""restrict: compute only chosen rows of a forward, against stored keys and values (design section 4).

Given `forward(ids[B, T]) -> logits[B, T, V]`, returns the same computation for R chosen rows:

    step(ids[B, R], slots[R], positions[B, R], slot_positions[B, S], k_0, v_0, ...)
        -> logits[B, R or 1, V], slot_positions, k_0, v_0, ...

Slots say where the rows' keys and values are stored; positions what rotary angles and masks see (-1: padding).
`slot_positions` holds the position stored in each slot (-1: empty). Rows of padding see only themselves.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aropt.analysis import SDPA, Analysis, Info, axis_of, tensor_inputs
from aropt.axes import RESHAPES, Axes, Axis, NotRowwise, arg, broadcast, find, has, op_name, positive
from aropt.positions import HIDDEN_BELOW, classify, hidden_by, refusal
from aropt.program import Graph, Spec, StateSpec
from aropt.torch_compat import build, propagate

aten = torch.ops.aten
MAXINT = 2**63 - 1
REPLICATES = {"aten::expand", "aten::clone", "aten::_unsafe_view", "aten::view", "aten::reshape", "aten::unsqueeze", "aten::transpose"}


@dataclass(frozen=True)
class Restricted:
    """The restricted graph, its state, new constants, and what was found out on the way."""

    graph: Graph
    state: dict[str, StateSpec]
    constants: dict[str, Tensor]
    facts: dict[str, Any]


def restrict(graph: Graph, weights: Mapping[str, Tensor], capacity: int, rows: str = "all") -> Restricted:
    """Restricts `graph` (input ids[B, T], output logits) to rows, with an append cache.

    `rows="last"` computes what follows the last attention for the last row only. Positions run from 0 to capacity - 1.
    Raises Unsupported where an append cache would not be exact, or where an op can't be classified.
    """
    names = propagate(graph.fx, graph.inputs, weights)
    analysis = Analysis(graph.fx, weights, names, capacity)
    return Restriction(analysis, weights, last=rows == "last").result(graph.name)


class Restriction:
    """Writes the restricted graph node by node, from the analysis."""

    def __init__(self, analysis: Analysis, weights: Mapping[str, Tensor], last: bool) -> None:
        self.analysis, self.info, self.positions = analysis, analysis.info, analysis.positions
        self.weights = dict(weights)
        self.constants: dict[str, Tensor] = {}
        self.state: dict[str, StateSpec] = {}
        self.updated: dict[str, fx.Node] = {}
        self.masks: set[str] = set()
        self.new: dict[fx.Node, fx.Node] = {}
        self.memo: dict[Any, fx.Node] = {}
        self.layers = 0
        self.out = fx.Graph()
        self.tail = self.find_tail() if last else set()
        names = ("ids", "slots", "positions", "slot_positions")
        self.ids, self.slots, self.rows, stored = (self.out.placeholder(n) for n in names)
        self.last_input = stored
        self.columns = self.out.call_function(aten.index_copy.default, (stored, 1, self.slots, self.rows))

    def result(self, name: str) -> Restricted:
        for node in self.analysis.graph.nodes:
            if node not in self.analysis.content:
                continue
            if node.op == "placeholder":
                self.new[node] = self.ids
            elif node.op == "output":
                self.out.output(tuple([self.fetch(n, node) for n in node.args[0]] + [self.columns, *self.updated.values()]))
            else:
                self.new[node] = self.write(node)
        specs = {"ids": ("B", "R"), "slots": ("R",), "positions": ("B", "R"), "slot_positions": ("B", "S")}
        inputs = {n: Spec(torch.int64, dims) for n, dims in specs.items()} | {n: s.spec for n, s in self.state.items()}
        graph = build(name, self.out, inputs, ["logits", "slot_positions", *self.state], self.weights)
        state = {"slot_positions": StateSpec("append-kv", inputs["slot_positions"], -1, 1), **self.state}
        facts = {"masks": sorted(self.masks), "attentions": self.layers, "cache": "append, exact"}
        return Restricted(graph, state, {c: v for c, v in self.constants.items() if c in graph.weights()}, facts)

    def find_tail(self) -> set[fx.Node]:
        """Content nodes that no attention follows: their earlier rows are not needed."""
        before: set[fx.Node] = set()
        for node in reversed(self.analysis.graph.nodes):
            info = self.info.get(node)
            if info is not None and (info.role != "row" or any(u in before for u in node.users)):
                before.add(node)
        return {n for n in self.info if n not in before and n.op != "placeholder"}

    # --- one node --------------------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        node = self.out.call_function(target, args, kwargs)
        if like is not None:
            node.meta = {"where": like.meta.get("where", ""), "origin": like.name}
        return node

    def write(self, node: fx.Node) -> fx.Node:
        info = self.info[node]
        if info.role == "sdpa":
            return self.write_sdpa(node, info)
        if info.role in ("score", "mix"):
            return self.write_product(node, info)
        return self.emit(node, lambda n: self.operand(n, node, info), info.axes, node in self.tail)

    def emit(self, node: fx.Node, lookup: Callable[[fx.Node], Any], axes: Any, tail: bool) -> fx.Node:
        """The same op on new operands; shapes are rebuilt from the meaning of the axes."""
        if op_name(node) in RESHAPES:
            source = lookup(node.args[0])  # type: ignore[arg-type]
            target = aten.expand.default if op_name(node) == "aten::expand" else aten.reshape.default
            return self.call(target, source, self.shape(axes, tail, target is aten.reshape.default), like=node)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        return self.call(node.target, *args, like=node, **kwargs)

    def operand(self, source: fx.Node, user: fx.Node, info: Info) -> Any:
        """The restricted form of an input of `user`."""
        if source in self.analysis.content:
            return self.fetch(source, user)
        if self.positions.is_size(source):
            return self.positions.value(source, 2)  # the analysis has shown that it is a constant
        return self.position_operand(source, info, user)

    def fetch(self, source: fx.Node, user: fx.Node) -> fx.Node:
        """A content operand; its last row only where the tail begins."""
        new = self.new[source]
        if source in self.tail or (user not in self.tail and user.op != "output") or not self.tail:
            return new
        row = axis_of(self.info[source].axes, "r")
        if row is None:
            raise refusal(user, "the last row can't be taken of a flattened axis", "please report the model")
        key = ("last", source)
        if key not in self.memo:
            self.memo[key] = self.call(aten.slice.Tensor, new, row, -1, MAXINT)
        return self.memo[key]

    def shape(self, axes: Axes, tail: bool, infer: bool) -> list[Any]:
        """Size arguments for axes; one symbolic axis may be -1, which costs nothing at run time."""
        result: list[Any] = []
        for axis in axes:
            symbolic = has(axis, "rcb") and not (tail and not has(axis, "cb"))
            if infer and symbolic and -1 not in result and not (axis == (("b", 0),) and self.later_symbolic(axes, axis, tail)):
                result.append(-1)
            else:
                result.append(self.size(axis, tail))
        return result

    def later_symbolic(self, axes: Axes, axis: Axis, tail: bool) -> bool:
        later = axes[axes.index(axis) + 1 :]
        return any(has(a, "rcb") and not (tail and not has(a, "cb")) for a in later)

    def size(self, axis: Axis, tail: bool) -> Any:
        """The size of an axis as an int or a node."""
        total: Any = 1
        for kind, n in axis:
            if kind == ".":
                factor: Any = n
            elif kind == "r" and tail:
                factor = 1
            else:
                source, dim = {"b": (self.ids, 0), "r": (self.ids, 1), "c": (self.columns, 1)}[kind]
                factor = self.memoized(("size", kind), lambda s=source, d=dim: self.call(aten.sym_size.int, s, d))
                if kind == "c" and n:
                    factor = self.call(operator.add, factor, n)
            if isinstance(total, int) and isinstance(factor, int):
                total *= factor
            else:
                total = factor if total == 1 else self.call(operator.mul, total, factor)
        return total

    def memoized(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    # --- attention -------------------------------------------------------------------------------------------------

    def write_sdpa(self, node: fx.Node, info: Info) -> fx.Node:
        """SDPA of the rows over all slots, with the mask's rows."""
        query, key, value = node.args[:3]
        layer = self.next_layer()
        keys, values = self.full(key, f"k_{layer}"), self.full(value, f"v_{layer}")  # type: ignore[arg-type]
        mask = arg(node, 3, "attn_mask")
        like = self.info[query].axes  # type: ignore[index]
        beside = (*like[:-1], (("c", 0),))
        if mask is None:
            bias = self.spread(self.visible(info.hidden), beside)  # type: ignore[arg-type]
        else:
            bias = self.masked_operand(mask, info.operands[mask], beside, above=False)
        options = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
        scale = arg(node, 6, "scale")
        options |= {"scale": scale} if scale is not None else {}
        return self.call(node.target, self.new[query], keys, values, bias, like=node, **options)  # type: ignore[index]

    def write_product(self, node: fx.Node, info: Info) -> fx.Node:
        """q k^T or p v with the second operand over all slots."""
        if info.role == "score":
            self.layers += 1
        stored = tensor_inputs(node)[-1]
        name = f"{'k' if info.role == 'score' else 'v'}_{self.layers - 1}"
        full = self.full(stored, name)
        return self.emit(node, lambda n: full if n is stored else self.operand(n, node, info), info.axes, False)

    def next_layer(self) -> int:
        self.layers += 1
        return self.layers - 1

    def full(self, node: fx.Node, name: str) -> fx.Node:
        """The value over all slots: cached before heads are replicated or transposed, and replayed from there."""
        chain = self.replay(node)
        source = chain[0].args[0] if chain else node
        value = self.cached(source, name)  # type: ignore[arg-type]
        for step in chain:
            axes = tuple(tuple(("c", n) if k == "r" else (k, n) for k, n in axis) for axis in self.info[step].axes)
            before = value
            value = self.memoized(("full", step), lambda s=step, b=before, a=axes: self.emit(
                s, lambda n: b if n is s.args[0] else self.positions.value(n, 2), a, False))  # fmt: skip
        return value

    def replay(self, node: fx.Node) -> list[fx.Node]:
        """The ops to replay on the full value: those from a head replication on, or a final transpose."""
        chain: list[fx.Node] = []
        current, keep = node, 0
        while op_name(current) in REPLICATES and current.args[0] in self.analysis.content:
            chain.insert(0, current)
            source = current.args[0]
            grows = op_name(current) == "aten::expand" and elements(self.info[current].axes) > elements(self.info[source].axes)
            keep = len(chain) if grows else keep
            current = source  # type: ignore[assignment]
        chain = chain[len(chain) - keep :] if keep else chain[-1:] if chain and self.swaps_rows(chain[-1]) else []
        while chain and op_name(chain[0].args[0]) == "aten::unsqueeze" and keep:  # type: ignore[arg-type]
            chain.insert(0, chain[0].args[0])  # type: ignore[arg-type]
        return chain

    def swaps_rows(self, node: fx.Node) -> bool:
        """k.transpose(-1, -2): the cache keeps k."""
        axes = self.info[node].axes
        return op_name(node) == "aten::transpose" and find(axes, "r") == len(axes) - 1

    def cached(self, node: fx.Node, name: str) -> fx.Node:
        """Writes the rows' value into a new state at their slots; returns the updated state."""
        key = ("cache", node)
        if key in self.memo:
            return self.memo[key]
        axes = self.info[node].axes
        row = find(axes, "r")
        if row is None:
            raise refusal(node, "the keys or values have rows flattened into another axis", "please report the model")
        dims = tuple("S" if i == row else text(a) for i, a in enumerate(axes))
        with self.out.inserting_after(self.last_input):
            store = self.last_input = self.out.placeholder(name)
        spec = Spec(node.meta["val"].dtype, dims)
        self.state[name] = StateSpec("append-kv", spec, 0.0, row)
        self.memo[key] = self.call(aten.index_copy.default, store, row, self.slots, self.new[node], like=node)
        self.memo[key].meta.pop("origin", None)  # it holds all slots, not the rows of the original
        self.updated[name] = self.memo[key]
        return self.memo[key]

    # --- position-only operands --------------------------------------------------------------------------------------

    def position_operand(self, source: fx.Node, info: Info, user: fx.Node) -> fx.Node:
        """A weight as it is; a position table gathered at the rows (and columns); a mask as visibility."""
        dims = self.positions.dims(source)
        axes = info.operands.get(source)
        if source.op == "get_attr":
            return self.memoized(("weight", source), lambda: self.out.get_attr(str(source.target)))
        if not any(isinstance(d, str) for d in dims):
            return self.constant(source, self.checked(source))
        if axes is None or not isinstance(info.axes, tuple):
            raise refusal(user, "a position value is used by an op that is not elementwise", "please report the model")
        beside = broadcast([a for n in tensor_inputs(user) for a in [self.axes_beside(n, info)]])
        row, column = axis_of(axes, "r"), axis_of(axes, "c")
        if row is not None and column is not None:
            above = {"aten::where": False, "aten::masked_fill": True}.get(op_name(user))
            is_mask = self.analysis.mask_of(user, op_name(user), info) is not None
            if is_mask and above is False and self.analysis.is_minimum(user.args[1]):
                above = True
            if is_mask:
                return self.masked_operand(source, axes, beside, above)
        return self.gathered(source, self.checked(source), axes, beside, user in self.tail)

    def axes_beside(self, node: fx.Node, info: Info) -> Axes:
        return self.info[node].axes if node in self.info else info.operands.get(node, ())

    def checked(self, source: fx.Node) -> Tensor:
        return self.positions.table(source)

    def constant(self, source: fx.Node, value: Tensor, kind: str = "") -> fx.Node:
        """A new weight that holds a value evaluated at capture."""

        def make() -> fx.Node:
            name = f"positions.{source.name}{kind}"
            self.constants[name] = self.weights[name] = value.detach().contiguous().clone()
            return self.out.get_attr(name)

        return self.memoized(("constant", source, kind), make)

    def masked_operand(self, mask: fx.Node, axes: Axes, beside: Axes, above: bool | None) -> fx.Node:
        """A mask over rows x slots: bool (hidden where it equals `above`) or a float bias (above=None)."""
        table = self.checked(mask)
        boolean = table.dtype == torch.bool
        row, column = find(axes, "r"), find(axes, "c")
        hidden = hidden_by(table, row, column, above if boolean else None)  # type: ignore[arg-type]
        seen = self.spread(self.visible(hidden), beside)
        if boolean:
            same = hidden_by(~table, row, column, above).logical_not()  # type: ignore[arg-type]
            if not torch.equal(same, hidden):
                raise refusal(mask, "the mask differs from head to head", "please report the model")
            return seen if not above else self.memoized(("not", seen), lambda: self.call(aten.logical_not.default, seen))
        low = float(table.min())
        low = max(low, torch.finfo(table.dtype).min) if low == low else low
        gone = self.scalar(mask, low, table.dtype, "_hidden")
        if bool((table[table > HIDDEN_BELOW] == 0).all()):
            value = self.scalar(mask, 0.0, table.dtype, "_seen")
        else:
            value = self.gathered(mask, table, axes, beside, False)
        return self.memoized(("bias", mask, seen), lambda: self.call(aten.where.self, seen, value, gone))

    def scalar(self, like: fx.Node, value: float, dtype: torch.dtype, kind: str) -> fx.Node:
        return self.constant(like, torch.tensor(value, dtype=dtype), kind)

    def visible(self, hidden: Tensor) -> fx.Node:
        """bool[B, R, S]: which slots each row sees. Known mask shapes are computed, others looked up."""
        kind, width = classify(hidden)
        self.masks.add(f"window {width}" if kind == "window" else kind)
        if kind == "table":
            key: Any = ("visible", kind, hidden.shape, hash(hidden.numpy().tobytes()))
        else:
            key = ("visible", kind, width)
        return self.memoized(key, lambda: self.write_visible(kind, width, hidden))

    def write_visible(self, kind: str, width: int, hidden: Tensor) -> fx.Node:
        call = self.call
        rows = self.memoized("rows3", lambda: call(aten.unsqueeze.default, self.rows, 2))  # [B, R, 1]
        stored = self.memoized("columns3", lambda: call(aten.unsqueeze.default, self.columns, 1))  # [B, 1, S]
        written = self.memoized("written", lambda: call(aten.ge.Scalar, stored, 0))
        if kind == "table":
            name = f"positions.visible_{len(self.constants)}"
            self.constants[name] = self.weights[name] = ~hidden
            table = self.out.get_attr(name)
            index = [call(aten.unsqueeze.default, self.clamped(self.rows), 2),
                     call(aten.unsqueeze.default, self.clamped(self.columns), 1)]  # fmt: skip
            seen = call(aten.index.Tensor, table, index)
        else:
            seen = self.memoized("causal", lambda: call(aten.le.Tensor, stored, rows))
            if kind == "window":
                seen = call(aten.logical_and.default, seen, call(aten.gt.Tensor, stored, call(aten.sub.Tensor, rows, width)))
        return call(aten.logical_or.default, call(aten.logical_and.default, seen, written), self.own_slot())

    def own_slot(self) -> fx.Node:
        """bool[R, S]: a row always sees itself, so that padding rows stay finite."""

        def make() -> fx.Node:
            size = self.memoized(("size", "c"), lambda: self.call(aten.sym_size.int, self.columns, 1))
            slots = self.call(aten.arange.default, size, device=torch.device("cpu"))
            return self.call(aten.eq.Tensor, slots, self.call(aten.unsqueeze.default, self.slots, 1))

        return self.memoized("own", make)

    def clamped(self, node: fx.Node) -> fx.Node:
        return self.memoized(("clamped", node), lambda: self.call(aten.clamp.default, node, 0))

    def spread(self, value: fx.Node, beside: Axes) -> fx.Node:
        """[B, R, S] laid out beside a value with the given axes."""
        return self.memoized(("spread", value, beside), lambda: self.layout(value, ["b", "r", "c"], {}, beside, False))

    def gathered(self, source: fx.Node, table: Tensor, axes: Axes, beside: Axes, tail: bool) -> fx.Node:
        """A position table at the rows' (and columns') positions, laid out beside a value with the given axes."""
        key = ("gathered", source, axes, beside, tail)
        return self.memoized(key, lambda: self.write_gathered(source, table, axes, beside, tail))

    def write_gathered(self, source: fx.Node, table: Tensor, axes: Axes, beside: Axes, tail: bool) -> fx.Node:
        row, column = axis_of(axes, "r"), axis_of(axes, "c")
        order = [i for i in (row, column) if i is not None]
        rest = [i for i in range(table.dim()) if i not in order and table.shape[i] != 1]
        squeezed = [i for i in range(table.dim()) if i not in order and table.shape[i] == 1]
        small = table.permute(*order, *rest, *squeezed).reshape([table.shape[i] for i in order + rest])
        if not order:
            return self.constant(source, table)
        name = self.constant(source, small, f"_{row}_{column}".replace("None", ""))
        index, letters = [], ["b"]
        if row is not None:
            rows = self.clamped(self.rows)
            rows = self.memoized("last rows", lambda: self.call(aten.slice.Tensor, rows, 1, -1, MAXINT)) if tail else rows
            index.append(self.call(aten.unsqueeze.default, rows, 2) if column is not None else rows)
            letters.append("r")
        if column is not None:
            columns = self.clamped(self.columns)
            index.append(self.call(aten.unsqueeze.default, columns, 1) if row is not None else columns)
            letters.append("c")
        if len(index) == 1:  # an embedding lookup is what every target has a fast kernel for
            flat = small.reshape(small.shape[0], -1)
            if flat.shape == small.shape and small.is_floating_point():
                value = self.call(aten.embedding.default, name, index[0])
            else:
                value = self.call(aten.index.Tensor, name, index)
        else:
            value = self.call(aten.index.Tensor, name, index)
        offset = len(beside) - table.dim()
        extra = {offset + i: table.shape[i] for i in rest}
        return self.layout(value, letters + [offset + i for i in rest], extra, beside, tail)

    def layout(self, value: fx.Node, present: list[Any], extra: dict[int, int], beside: Axes, tail: bool) -> fx.Node:
        """Moves axes (named "b", "r", "c" or by their place in `beside`) to where `beside` has them.

        A flattened axis such as B*H takes batch and heads together; missing heads are repeated.
        """
        order: list[int] = []
        shape: list[Any] = []
        grown: list[tuple[int, Axis]] = []
        for i, axis in enumerate(beside):
            kinds = [k for k, _ in axis]
            mine = [present.index(k) for k in kinds if k in present]
            mine += [present.index(i)] if i in extra and i in present else []
            if len(axis) > 1 and "b" in kinds and mine:
                grown.append((i, axis))
            order += mine
            shape.append(self.size(axis, tail) if len(mine) and has(axis, "brc") else extra.get(i, 1))
        if sorted(order) != list(range(len(present))):
            raise NotRowwise("a position value does not line up with what it is combined with")
        if order != sorted(order):
            value = self.call(aten.permute.default, value, order)
        if grown:
            return self.flatten_heads(value, grown[0], present, extra, beside, tail)
        if len(order) == len(beside):
            return value
        for i, axis in enumerate(beside):  # unsqueeze is cheaper than a reshape with sizes
            if not [k for k, _ in axis if k in present] and i not in extra:
                value = self.call(aten.unsqueeze.default, value, i)
        return value

    def flatten_heads(self, value: fx.Node, where: tuple[int, Axis], present: list[Any], extra: dict[int, int],
                      beside: Axes, tail: bool) -> fx.Node:  # fmt: skip
        """[B, R, S] or [B, H, ...] as the axis B*H at the front of `beside`."""
        i, axis = where
        heads = 1
        for kind, n in axis:
            heads *= n if kind == "." else 1
        rest = [self.size(a, tail) if has(a, "rc") and any(k in present for k, _ in a) else extra.get(j, 1)
                for j, a in enumerate(beside) if j != i]  # fmt: skip
        if i != 0:
            raise NotRowwise("heads are flattened into an axis that is not the first")
        if i not in extra:
            batch = self.size((("b", 0),), tail)
            value = self.call(aten.expand.default, self.call(aten.unsqueeze.default, value, 1), [batch, heads, *rest])
        return self.call(aten.reshape.default, value, [-1, *rest])


def elements(axes: Axes) -> int:
    """Elements of a value, its batch and sequence axes counted as one."""
    total = 1
    for axis in axes:
        for kind, n in axis:
            total *= n if kind == "." else 1
    return total


def text(axis: Axis) -> int | str:
    """An axis as a dim of a Spec: 64, "B" or "B*4"."""
    if not has(axis, "brc"):
        return elements((axis,))
    return "*".join({"b": "B", "r": "R", "c": "S"}.get(kind, str(n)) for kind, n in axis)
