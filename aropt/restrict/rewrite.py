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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.ir.program import Graph, Spec, StateSpec
from aropt.ir.torch_compat import build, propagate
from aropt.restrict import mixers, moves
from aropt.restrict.analysis import FULL_SIZE, Analysis, unsupported
from aropt.restrict.bodies import check_bodies
from aropt.restrict.convolved import normalize_convolutions
from aropt.restrict.dims import (
    Axis,
    B,
    NotRowwise,
    count,
    elements,
    find,
    has,
    over_slots,
    positive,
    replaced,
)
from aropt.restrict.info import Info
from aropt.restrict.normalize import normalize_attention
from aropt.restrict.places import Places
from aropt.restrict.positions import HINT, is_number, refusal
from aropt.restrict.prepare import prepared
from aropt.restrict.rules import RESHAPES, named_axes

aten = torch.ops.aten
MAXINT = 2**63 - 1
REPLICATES = {
    "aten::expand", "aten::clone", "aten::_unsafe_view", "aten::view", "aten::reshape", "aten::unsqueeze",
    "aten::transpose", "aten::permute", "aten::repeat_interleave",
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
        graph = graph if canvas else normalize_convolutions(graph, weights, never)
        traced, names = graph.fx, propagate(graph.fx, graph.inputs, weights)
        if not canvas:
            traced, names = prepared(graph, weights, names, capacity, never)
        check_bodies(traced, capacity)
        analysis = Analysis(traced, weights, names, capacity, canvas, never)
        return Restriction(analysis, weights, last=rows == "last").result(graph.name)
    except Unsupported:
        raise
    except Exception as error:  # of shape rules, by what the model does; it goes on as Unsupported
        raise unsupported(error, "the forward can't be rewritten to chosen rows") from error


class Restriction(Places):
    """Writes the restricted graph node by node, from the analysis."""

    def __init__(self, analysis: Analysis, weights: Mapping[str, Tensor], last: bool) -> None:
        super().__init__(analysis, weights)
        self.info = analysis.info
        self.state: dict[str, StateSpec] = {}
        self.updated: dict[str, fx.Node] = {}
        self.new: dict[fx.Node, fx.Node] = {}
        self.layers = self.recurrences = 0  # ops that mix rows, and those of them that do so by state
        self.tail = self.find_tail() if last else set()

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
        facts = {
            "masks": sorted(self.masks),
            "attentions": self.layers - self.recurrences,
            "recurrences": self.recurrences,
            "reach": self.seen.tolist(),
        }
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
        value = self.gathered(source, self.positions.table(source, axes), beside, tail)
        if op_name(user) in FULL_SIZE:
            return self.call(aten.expand.default, value, self.shape(beside, tail, False))
        return value


def always(value: fx.Node, _: fx.Node) -> fx.Node:
    return value


def text(axis: Axis) -> int | str:
    """An axis as a dim of a Spec: 64, "B" or "B*4"."""
    if not has(axis, "brc"):
        return elements((axis,))
    return "*".join({"b": "B", "r": "R", "c": "S"}.get(kind, str(n)) for kind, n in axis)
