"""Recognises cached attention by what it computes: parts of a step are run on probes and compared with a formula.

A restricted step may write rotary embedding and masks in any way. What the targets' kernels take is narrow: heads split
from a flat projection, turned by the angle of their slot, causal. So the nodes between projection and attention are cut
out and evaluated on chosen inputs, for rows that fill consecutive slots of a batch without padding ("dense"). On a
canvas the mask is taken as it is, and rows may have any slots; so it is of the nodes of a tree, whose rows stand beside
the cache (`tree.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.program import Graph
from aropt.kernels import canvas_attention
from aropt.kernels.cached_attention import rotated, unsupported

aten = torch.ops.aten
LAYOUT = {
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.transpose.int, aten.permute.default,
    aten.clone.default, aten.contiguous.default, aten.unsqueeze.default,
}  # fmt: skip
TURN = LAYOUT | {
    aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.slice.Tensor, aten.select.int,
    aten.cat.default, aten.stack.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
    aten.chunk.default, aten.flatten.using_ints,
}  # fmt: skip
PLACES = ("slots", "positions", "slot_positions")  # what a restricted step is told about its rows
EPS = 1e-6
Form = Literal["dense", "canvas", "tree"]


class NotThis(Unsupported):
    """The node is not what the kernel computes; says why."""


@dataclass(frozen=True, eq=False)
class Rotary:
    """cos, sin float [capacity, r/2] by position."""

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def equals(self, other: Rotary) -> bool:
        alike = torch.equal(self.cos, other.cos) and torch.equal(self.sin, other.sin)
        return alike and self.interleaved == other.interleaved


@dataclass(frozen=True)
class Source:
    """Features of a value: [B, R, W] from `offset` on, or all of [B, R, heads, D]."""

    node: fx.Node
    offset: int


@dataclass(frozen=True)
class Match:
    """One attention: what the op takes, and the nodes that it replaces."""

    node: fx.Node
    result: fx.Node  # [B, R, heads*D]
    last: bool  # only the last row is used: [B, 1, heads*D]
    stored: tuple[fx.Node, fx.Node]  # the updates of both caches, or these with a tree's rows behind them
    rows: tuple[Source, ...]  # of queries, keys and values; one if a value has all of them, in order
    rotary: Rotary | None
    numbers: tuple[Any, ...]  # heads, kv_heads, scale, window, interleaved


class Probe:
    """Evaluates pieces of a restricted step's graph for dense rows."""

    def __init__(self, graph: Graph, weights: dict[str, Tensor], capacity: int, form: Form) -> None:
        self.graph, self.weights, self.capacity = graph, weights, capacity
        self.inputs = {n.name: n for n in graph.fx.nodes if n.op == "placeholder"}
        self.form = form  # on a canvas each sequence has rows of its own

    def placed(self, node: fx.Node) -> bool:
        """Computed from where the rows are, not from what they hold (sizes of `ids` count as the former)."""
        if node.target is aten.sym_size.int:
            return True
        if node.op == "placeholder":
            return node.name in PLACES
        return all(self.placed(n) for n in node.all_input_nodes)

    def places(self, rows: int, filled: int, slots: int) -> dict[str, Tensor]:
        """The inputs of a dense step of one sequence."""
        at = torch.arange(filled, filled + rows)
        stored = torch.arange(slots)
        return {
            "ids": torch.zeros(1, rows, dtype=torch.int64),
            "slots": at[None] if self.form == "canvas" else at,
            "positions": at[None],
            "slot_positions": torch.where(stored < filled, stored, -1)[None],
        }

    def run(self, wanted: fx.Node, given: dict[fx.Node, Tensor], places: dict[str, Tensor]) -> Tensor:
        """The value of a node, with some nodes' values given."""
        values: dict[fx.Node, Any] = dict(given)
        values |= {self.inputs[n]: v for n, v in places.items() if n in self.inputs}

        def value(node: fx.Node) -> Any:
            if node not in values:
                if node.op == "get_attr":
                    values[node] = self.weights[str(node.target)]
                elif node.op == "call_function":
                    for n in node.all_input_nodes:
                        value(n)
                    values[node] = self.call(node, values)
                else:
                    raise NotThis(what=f"{wanted.name} reads {node.name}")
            return values[node]

        with torch.no_grad():
            result = value(wanted)
        assert isinstance(result, Tensor)
        return result

    def call(self, node: Any, values: dict[fx.Node, Any]) -> Any:
        """One op on probes, which not every op takes."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
        try:
            return node.target(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            why = str(error).splitlines()[0][:120]
            raise NotThis(what=f"{node.name} ({node.target}) does not take a probe: {why}") from error

    def projection(self, operand: fx.Node, heads: int, size: int) -> Source:
        """The features that an attention's operand is laid out and turned from."""
        found, seen, queue = set(), {operand}, [operand]
        while queue:
            node = queue.pop()
            piece = is_getitem(node) or node.target is aten.slice.Tensor
            if (flat(node, heads, size) and not piece) or not (piece or node.target in TURN):
                found.add(node)
                continue
            new = {n for n in node.all_input_nodes if n.op != "get_attr" and not self.placed(n)} - seen
            seen |= new
            queue += new
        if len(found) != 1:
            raise NotThis(what=f"{operand.name} mixes {len(found)} values")
        (node,) = found
        shape = node.meta["val"].shape
        if tuple(shape[2:]) == (heads, size):
            return Source(node, 0)
        if len(shape) != 3:
            raise NotThis(what=f"{node.name} ({node.target}) lies between projection and attention")
        return Source(node, self.offset(operand, node, heads * size))

    def offset(self, operand: fx.Node, node: fx.Node, count: int) -> int:
        """Where the operand's features begin in a wider projection: each shows its number, as no angle turns row 0."""
        numbers = torch.arange(1.0, int(node.meta["val"].shape[2]) + 1)
        got = self.run(operand, {node: numbers[None, None]}, self.places(1, 0, 1)).flatten()
        scale = (got[-1] - got[0]) / max(count - 1, 1)  # a table may scale all features alike
        first = int((got[0] / scale).round()) if scale else 0
        if first < 1 or not torch.allclose(got, scale * torch.arange(first, first + count), rtol=EPS):
            raise NotThis(what=f"{operand.name} does not have the features of {node.name} in order")
        return first - 1

    def rotary(self, operand: fx.Node, source: Source, heads: int, size: int) -> Rotary | None:
        """How `operand` [B, heads, R, D] is turned from `source`: None if it only is laid out."""
        rows = self.capacity
        places = self.places(rows, 0, rows)
        generator = torch.Generator().manual_seed(0)

        def turned(x: Tensor) -> Tensor:
            shape = source.node.meta["val"].shape
            if len(shape) == 3:
                after = int(shape[2]) - source.offset - heads * size
                x = torch.nn.functional.pad(x.flatten(2), (source.offset, after))
            return self.run(operand, {source.node: x}, places)

        x = torch.randn(1, rows, heads, size, generator=generator)
        want, plain = turned(x), x.transpose(1, 2)
        if want.shape != plain.shape:
            raise NotThis(what=f"{operand.name} is not [batch, heads, rows, features]")
        if torch.equal(want, plain):
            return None
        basis = torch.eye(size)
        for width in [w for w in range(size, 1, -2) if (want[..., w:] == plain[..., w:]).all()]:
            for interleaved in (False, True):
                firsts = torch.arange(0, width, 2) if interleaved else torch.arange(width // 2)
                one = turned(basis[firsts].sum(0).expand(1, rows, heads, size))[0, 0]
                seconds = firsts + (1 if interleaved else width // 2)
                cos, sin = one[:, firsts].contiguous(), one[:, seconds].contiguous()
                if torch.allclose(rotated(plain, cos, sin, interleaved), want, rtol=EPS, atol=EPS):
                    return Rotary(cos, sin, interleaved)
        raise NotThis(what=f"{operand.name} is not a rotation by position")

    def window(self, mask: fx.Node) -> int:
        """0 for a causal mask, or how many slots a row sees."""
        if not self.placed(mask):
            raise NotThis(what="the mask depends on what the rows hold")
        full = self.capacity
        last = self.seen(mask, 1, full - 1, full)[0]
        window = int(last.sum()) if int(last.sum()) < full else 0
        for rows, filled, slots in ((1, 0, 1), (1, 0, 4), (3, 0, 5), (4, 0, 4), (1, 3, 7), (2, 3, 6), (full, 0, full)):
            if filled + rows > full:
                continue
            stored, at = torch.arange(slots), torch.arange(filled, filled + rows)[:, None]
            want = (stored <= at) & (stored > at - (window or full))
            if not torch.equal(self.seen(mask, rows, filled, slots), want):
                raise NotThis(what="the mask is neither causal nor a causal window")
        return window

    def seen(self, mask: fx.Node, rows: int, filled: int, slots: int) -> Tensor:
        """bool [rows, slots] of a mask that is the same for all heads."""
        value = self.run(mask, {}, self.places(rows, filled, slots))
        if value.dtype != torch.bool:
            if not ((value == 0) | (value <= torch.finfo(value.dtype).min)).all():
                raise NotThis(what="the mask adds to the scores")
            value = value == 0
        value = value.broadcast_to(1, *value.shape[1:-2], rows, slots)
        first = value.reshape(-1, rows, slots)
        if not (first == first[:1]).all():
            raise NotThis(what="the mask differs between heads")
        return first[0]

    def flattened(self, attention: fx.Node, heads: int, size: int) -> tuple[fx.Node, bool]:
        """The node [B, R, heads*D] that an attention's result becomes by layout, and whether of its last row only."""
        node = attention
        while not flat(node, heads, size):
            users = list(node.users)
            if len(users) != 1 or users[0].target not in LAYOUT | {aten.slice.Tensor}:
                raise NotThis(what=f"the result {node.name} is not laid out as rows")
            node = users[0]
        x = torch.randn(1, heads, 3, size)
        value = self.run(node, {attention: x}, self.places(3, 0, 3))
        want = x.transpose(1, 2).reshape(1, 3, heads * size)
        last = value.shape[1] == 1
        if not torch.equal(value, want[:, -1:] if last else want):
            raise NotThis(what=f"{node.name} does not have the heads in order")
        return node, last


def is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def flat(node: fx.Node, heads: int, size: int) -> bool:
    """A value [B, R, heads*D]."""
    shape: Any = getattr(node.meta.get("val"), "shape", ())
    return len(shape) == 3 and shape[2] == heads * size


def matches(graph: Graph, weights: dict[str, Tensor], capacity: int, form: Form = "dense") -> list[Match]:
    """All attentions of a restricted step. Raises NotThis if one of them is not what the op computes."""
    probe = Probe(graph, weights, capacity, form)
    known: dict[Any, Any] = {}
    found = []
    for node in graph.fx.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            try:
                found.append(match(node, probe, known))
            except NotThis as reason:
                raise NotThis(what=f"{node.meta.get('where') or node.name}: {reason.what}", where=node.name) from None
        elif node.target is ops.load("attention").overload:
            raise NotThis(what=f"{node.meta.get('where') or node.name}: a soft-cap, sinks or a memory", where=node.name)
    return found


def match(node: Any, probe: Probe, known: dict[Any, Any]) -> Match:
    """What the op takes in place of an SDPA node; `known` keeps tables and masks that layers share."""
    query, keys, values, mask = node.args[:4]
    assert all(isinstance(n, fx.Node) for n in (query, keys, values, mask))
    new_keys, new_values = (written_rows(n, probe.form) for n in (keys, values))
    heads, size = (int(query.meta["val"].shape[i]) for i in (1, 3))
    kv_heads = int(keys.meta["val"].shape[1])
    if values.meta["val"].shape != keys.meta["val"].shape or keys.meta["val"].dtype != torch.float32:
        raise NotThis(what="keys and values differ in shape, or are not float32")
    operands = ((query, heads), (new_keys, kv_heads), (new_values, kv_heads))
    sources = [probe.projection(n, count, size) for n, count in operands]
    turns = [probe.rotary(n, s, count, size) for (n, count), s in zip(operands, sources, strict=True)]
    if turns[2] is not None or (turns[0] is None) != (turns[1] is None):
        raise NotThis(what="queries and keys are not turned alike, or values are")
    rotary = same(turns[0], turns[1], known) if turns[0] else None
    if mask not in known:
        known[mask] = probe.window(mask) if probe.form == "dense" else check_mask(mask)
    width, canvas = 2 * rotary.cos.shape[1] if rotary else 0, probe.form == "canvas"
    refused = canvas_attention.unsupported(size, width) if canvas else unsupported(heads, kv_heads, size, width)
    if canvas and heads != kv_heads:
        refused = "the kernel has no groups of heads"
    if refused:
        raise NotThis(what=refused)
    scale = node.kwargs.get("scale")
    numbers = (
        heads,
        kv_heads,
        float(size**-0.5 if scale is None else scale),
        known[mask],
        bool(rotary and rotary.interleaved),
    )
    rows = packed(sources, [heads * size, kv_heads * size, kv_heads * size])
    return Match(node, *probe.flattened(node, heads, size), (keys, values), rows, rotary, numbers)


def written_rows(stored: Any, form: Form) -> fx.Node:
    """The rows [B, heads, R, D] that a cache of their own is updated with, or that stand behind it."""
    if form == "tree":
        return beside(stored)[1]
    if form == "canvas":
        right, index = stored.target is ops.load("write_rows").overload and stored.args[3] == 2, 2
    else:
        right, index = stored.target is aten.index_copy.default and stored.args[1] == 2, 3
    if not right or len(stored.users) != 2:
        raise NotThis(what=f"{stored.name} is not the update of a cache of its own, [batch, heads, slots, features]")
    rows: fx.Node = stored.args[index]
    return rows


def beside(both: Any) -> tuple[fx.Node, fx.Node]:
    """A cache and the rows of a tree's nodes behind it."""
    cache, *rows = both.args[0] if both.target is aten.cat.default and both.args[1:] == (2,) else (both,)
    if len(rows) != 1 or cache.op != "placeholder":
        raise NotThis(what=f"{both.name} is not a cache and the rows of nodes behind it")
    return cache, rows[0]


def check_mask(mask: fx.Node) -> int:
    """0, for a mask of which slots each row sees, the same for all heads."""
    value = mask.meta["val"]
    if value.dtype != torch.bool or value.dim() != 4 or value.shape[1] != 1:
        raise NotThis(what="the mask is not bool [batch, 1, rows, slots]")
    return 0


def same(first: Rotary | None, second: Rotary | None, known: dict[Any, Any]) -> Rotary:
    """The tables of both, one object for all layers that have them."""
    assert first is not None and second is not None
    if not first.equals(second):
        raise NotThis(what="queries and keys are turned by different angles")
    tables: list[Rotary] = known.setdefault("tables", [])
    found = next((other for other in tables if other.equals(first)), None)
    if found is None:
        tables.append(first)
    return found or first


def packed(sources: list[Source], widths: list[int]) -> tuple[Source, ...]:
    """One source if a value is made of all three, in order; else the three."""
    node = sources[0].node
    whole = len(node.meta["val"].shape) == 3 and int(node.meta["val"].shape[2]) == sum(widths)
    starts = [0, widths[0], widths[0] + widths[1]]
    if whole and all(s.node is node for s in sources) and [s.offset for s in sources] == starts:
        return (sources[0],)
    return tuple(sources)
