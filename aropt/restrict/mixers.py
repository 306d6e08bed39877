"""Ops that mix the rows of a sequence, by what they say of themselves (`OpDef.mixer`): which calls of them are legal,
and how they are computed for chosen rows.

What a row sees is stored by slots, and a mask says which of these; or it is folded into state of one size, which each
row changes in turn. Torch's own scaled_dot_product_attention (SDPA) is one of the former.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import bind, op_name, tensor_inputs
from aropt.ir.opdef import Mixer
from aropt.ir.program import Spec, StateSpec
from aropt.restrict.dims import COLUMN, ROW, Axes, B, NotRowwise, align, broadcast, find, fixed, free, from_sizes, has
from aropt.restrict.info import Hide, Info
from aropt.restrict.positions import HIDES, LIMIT, Positions, hides_future
from aropt.restrict.written_out import PRODUCTS

UNDERFLOW = 104.0  # exp(-104) is exactly 0 in fp32
SDPA = "aten::scaled_dot_product_attention"
MIXERS = {
    SDPA: Mixer(rows={"query": -2}, slots={"key": -2, "value": -2}, mask="attn_mask", causal="is_causal"),
}


class NotCausal(NotRowwise):
    """A row depends on a later one; no append cache is exact."""


class Analysis(Protocol):
    """What classifies the nodes of a forward (see analysis.py), as far as mixers need it."""

    canvas: bool
    content: set[fx.Node]
    info: dict[fx.Node, Info]
    positions: Positions
    masks: dict[Any, Hide | None]
    causal: Hide
    nothing: Hide

    def dims(self, node: fx.Node) -> Any: ...


class Writes(Protocol):
    """What writes a restricted forward (see rewrite.py), as far as mixers need it."""

    positions: Positions
    info: dict[fx.Node, Info]
    new: dict[fx.Node, fx.Node]
    rows: fx.Node
    state: dict[str, StateSpec]
    updated: dict[str, fx.Node]

    def call(self, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node: ...

    def operand(self, source: fx.Node, user: fx.Node, info: Info) -> Any: ...

    def full(self, node: fx.Node, name: str) -> fx.Node: ...

    layers: int
    recurrences: int

    def next_layer(self) -> int: ...

    def constant(self, source: fx.Node, value: Tensor, kind: str = "") -> fx.Node: ...

    def stored(self, name: str, state: StateSpec) -> fx.Node: ...

    def visible(self, hidden: Tensor) -> fx.Node: ...

    def spread(self, value: fx.Node, beside: Axes) -> fx.Node: ...

    def hiding(self, mask: fx.Node, axes: Axes, hide: Hide, beside: Axes) -> fx.Node: ...


def mixer_of(node: fx.Node) -> Mixer | None:
    """What the op of a call says of the rows that it mixes."""
    own = ops.called(node)
    return own.mixer if own else MIXERS.get(op_name(node))


def mixed(analysis: Analysis, node: fx.Node, mixer: Mixer) -> Info:
    """The axes of a mixer's results. Raises NotRowwise where its call can't be computed for some rows alone."""
    return attended(analysis, node, mixer) if mixer.slots else carried(analysis, node, mixer)


def written(made: Writes, node: fx.Node, info: Info) -> fx.Node:
    """The mixer's call for the rows at hand."""
    mixer = mixer_of(node)
    if mixer is None:
        return write_weighted(made, node, info)
    return write_attended(made, node, mixer, info) if mixer.slots else write_carried(made, node, mixer, info)


# --- by slots: attention ---------------------------------------------------------------------------------------------


def attended(analysis: Analysis, node: fx.Node, mixer: Mixer) -> Info:
    """Each row of the queries over all rows of keys and values, as a mask says."""
    x = bind(node)
    query, (_, value) = next(iter(mixer.rows)), list(mixer.slots)[:2]
    names = (*mixer.rows, *mixer.slots)
    if x.get("dropout_p"):
        raise NotRowwise("has dropout; call model.eval()")
    if any(x[k] not in analysis.content for k in names):
        raise NotRowwise("attends to something that does not depend on the tokens")
    axes = {k: analysis.info[x[k]].axes for k in names}
    batches = [tuple(a if has(a, "brc") else () for a in one[:-2]) for one in axes.values()]
    if not all(len(a) >= 3 and a[-2] == ROW and not has(a[-1], "brc") for a in axes.values()) or len(set(batches)) > 1:
        raise NotRowwise("attends over something other than the sequence")
    out = (*axes[query][:-1], axes[value][-1])
    info = Info([out, axes[query][:-1]] if isinstance(node.meta["val"], (tuple, list)) else out, role="mixer")
    hide(analysis, x[query], x[mixer.mask], bool(x.get(mixer.causal)), info)
    return info


def hide(analysis: Analysis, query: fx.Node, mask: Any, causal: bool, info: Info) -> None:
    """Notes what a mask hides. Raises NotRowwise where it is not one that an append cache is exact with."""
    if causal:
        info.hides[query] = analysis.causal
    elif mask is None and analysis.canvas:
        info.hides[query] = analysis.nothing
    elif mask is None:
        raise NotCausal("has no mask: each position sees later ones")
    elif mask in analysis.content:
        raise NotRowwise("has a mask that depends on the tokens")
    else:
        info.operands[mask] = align(analysis.positions.dims(mask), (*analysis.info[query].axes[:-1], COLUMN))
        found = hidden(analysis, mask, info.operands[mask])
        if found is None and not analysis.canvas:
            raise NotCausal("has no mask that hides later positions")
        if analysis.canvas and plain(analysis.positions, mask, info.operands[mask]):
            info.hides[query] = analysis.nothing
        else:
            info.hides[mask] = found or bias_alone(analysis.nothing, mask)


def plain(positions: Positions, mask: fx.Node, axes: Axes) -> bool:
    """Whether a mask changes nothing at any length: all of it is True, or zero."""
    value = positions.table(mask, axes).value
    return value.dim() == 0 and bool(value == (value.dtype == torch.bool))


def bias_alone(nothing: Hide, mask: fx.Node) -> Hide:
    """Of a canvas: a bias that hides nothing, or not in all heads, takes its value; only empty slots are hidden."""
    dtype = mask.meta["val"].dtype
    return Hide(nothing.entries, False if dtype == torch.bool else torch.finfo(dtype).min)


def hidden(analysis: Analysis, mask: fx.Node, axes: Axes) -> Hide | None:
    """What a mask hides in all heads. Raises NotRowwise where an append cache is not exact with it."""
    row, column = find(axes, "r"), find(axes, "c")
    if row is None or column is None:
        return None
    key = mask, row, column
    if key not in analysis.masks:
        table = analysis.positions.value(mask, analysis.positions.capacity)
        table = table.movedim((row, column), (-2, -1)).flatten(0, -3) if table.dim() > 2 else table[None]
        analysis.masks[key] = found = hide_of(table)
        if found is not None and not analysis.canvas:
            require_causal(table, found.entries)
    return analysis.masks[key]


def hide_of(table: Tensor) -> Hide | None:
    """What a mask [heads, rows, columns] hides in all heads; None if it hides nothing."""
    if table.is_complex():
        raise NotRowwise("has complex attention scores")
    if table.dtype == torch.bool:
        entries, value = ~table.any(0), False
        return Hide(entries, value) if entries.any() else None
    clamped = table.float().clamp(min=torch.finfo(table.dtype).min)
    entries = clamped.amax(0) <= -HIDES
    return Hide(entries, float(clamped[:, entries].min())) if entries.any() else None


def require_causal(table: Tensor, entries: Tensor) -> None:
    """Raises NotRowwise unless what is hidden covers each row's future, far below what the row sees of itself."""
    if not hides_future(entries):
        i, j = (int(x) for x in (~entries).triu(1).nonzero()[0])
        raise NotCausal(f"has a mask that lets position {i} see position {j}")
    if entries.diagonal().any():
        raise NotRowwise("has a mask that hides a position from itself")
    if table.dtype != torch.bool:
        own, most = float(table.diagonal(0, -2, -1).min()), float(table[:, entries].max())
        if not most + LIMIT <= own - LIMIT - UNDERFLOW:
            raise NotRowwise("has a mask, but not one that still hides when it comes to its softmax")


def write_attended(made: Writes, node: fx.Node, mixer: Mixer, info: Info) -> fx.Node:
    """The rows' queries over all slots, with the mask's rows."""
    x, layer = bind(node), made.next_layer()
    query, (key, value), mask = x[next(iter(mixer.rows))], list(mixer.slots)[:2], x[mixer.mask]
    whole = {x[key]: made.full(x[key], f"k_{layer}"), x[value]: made.full(x[value], f"v_{layer}")}
    beside = (*made.info[query].axes[:-1], COLUMN)
    if query in info.hides:  # causal, or none that hides anything
        bias = made.spread(made.visible(info.hides[query].entries), beside)
    else:
        bias = made.hiding(mask, info.operands[mask], info.hides[mask], beside)
    given = {key: whole[x[key]], value: whole[x[value]], mixer.mask: bias, mixer.causal: False}
    return call_with(made, node, info, given)


# --- by slots without a softmax: weights of a canvas that are made element by element (YOSO) -------------------------


def weighted(analysis: Analysis, node: fx.Node) -> Info | None:
    """The axes of scores q k^T, or of a sum of values by weights, on a canvas; None for any other product."""
    if not analysis.canvas or op_name(node) not in PRODUCTS:
        return None
    first, second = tensor_inputs(node)
    if first not in analysis.content or second not in analysis.content:
        return None
    left, right = analysis.info[first].axes, analysis.info[second].axes
    if len(left) < 3 or len(left) != len(right):
        return None
    lead = broadcast([left[:-2], right[:-2]])
    if left[-2] == ROW and right[-1] == ROW and not has(left[-1], "brc") and not has(right[-2], "brc"):
        return Info((*lead, ROW, COLUMN), role="score")
    if left[-1] == COLUMN and right[-2] == ROW and not has(right[-1], "brc"):
        return Info((*lead, left[-2], right[-1]), role="mix", hides={node: analysis.nothing})
    return None


def write_weighted(made: Writes, node: fx.Node, info: Info) -> fx.Node:
    """The product with the second operand over all slots; what is empty has no weight."""
    first, second = tensor_inputs(node)
    layer = made.next_layer() if info.role == "score" else made.layers - 1
    whole = made.full(second, f"{'k' if info.role == 'score' else 'v'}_{layer}")
    weights = made.new[first]
    if node in info.hides:
        seen = made.spread(made.visible(info.hides[node].entries), made.info[first].axes)
        nothing = made.constant(first, torch.zeros((), dtype=first.meta["val"].dtype), "_empty")
        weights = made.call(torch.ops.aten.where.self, seen, weights, nothing)
    return made.call(node.target, weights, whole, like=node)


# --- by state: recurrences -------------------------------------------------------------------------------------------


def carried(analysis: Analysis, node: fx.Node, mixer: Mixer) -> Info:
    """Each row changes the state that earlier ones left, which the forward itself neither gives nor takes."""
    x, dims = bind(node), analysis.dims(node)
    first = len(dims) - kept_by(x, mixer)
    if analysis.canvas:
        raise NotRowwise("carries state from row to row, and rows of a canvas change in any order")
    if any(tensors(x.get(name)) for name in (*mixer.state, mixer.positions)):
        raise NotRowwise("is given state or positions by the forward itself")
    if any(bind(user)["1"] >= first for user in node.users):
        raise NotRowwise("leaves state behind that the forward reads")
    for name, value in x.items():
        for source in tensors(value):
            if source in analysis.content:
                require_rows(name, analysis.info[source].axes, mixer)
            elif name in mixer.rows:
                raise NotRowwise("mixes rows that do not depend on the tokens")
    info = Info([], role="mixer")
    for source in [s for name, value in x.items() if name != mixer.initial for s in tensors(value)]:
        if source not in analysis.content:
            info.operands[source] = from_sizes(analysis.positions.dims(source))
            fixed(info.operands[source], "has weights that depend on the length")
    axis = next(iter(mixer.rows.values()))
    axes = [axis + len(sizes) if axis < 0 else axis for sizes in dims[:first]]
    given = [[B if i == 0 else ROW if i == axis else free(d) for i, d in enumerate(s)] for s, axis in zip(dims, axes)]
    info.axes = [*map(tuple, given), *((B, *map(free, sizes[1:])) for sizes in dims[first:])]
    return info


def tensors(value: Any) -> list[fx.Node]:
    """The nodes of an argument, which may be a list."""
    return [v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node)]


def kept_by(x: Mapping[str, Any], mixer: Mixer) -> int:
    """How many of the op's results are state: the last ones."""
    return len(tensors(x[mixer.initial])) if mixer.initial else len(mixer.state)


def require_rows(name: str, axes: Axes, mixer: Mixer) -> None:
    """Raises NotRowwise unless an argument that depends on the tokens has rows where the mixer has them."""
    if name not in mixer.rows:
        raise NotRowwise(f"has {name} that depend on the tokens" if mixer.initial else
                         f"has a {name} that depends on the tokens")  # fmt: skip
    if axes[0] != B or axes[mixer.rows[name]] != ROW or sum(has(a, "brc?") for a in axes) > 2:
        raise NotRowwise("runs over something other than the sequence")


def write_carried(made: Writes, node: fx.Node, mixer: Mixer, info: Info) -> fx.Node:
    """The rows' call, on the state that earlier rows left behind."""
    given: dict[str, Any] = {mixer.positions: made.rows} if mixer.positions else {}
    layer, results = made.next_layer(), node.meta["val"]
    made.recurrences += 1
    begun, given[mixer.initial] = starts(made, node, mixer)
    first = len(results) - kept_by(bind(node), mixer)
    names = [f"{mixer.state[0]}_{layer}_{i}" for i in range(len(begun))] if mixer.initial else [
        f"{name}_{layer}" for name in mixer.state
    ]  # fmt: skip
    stored = []
    for name, value, start in zip(names, results[first:], begun or [0.0] * len(names), strict=False):
        dims = tuple("B" if i == 0 else int(size) for i, size in enumerate(value.shape))
        stored.append(made.stored(name, StateSpec("recurrent", Spec(value.dtype, dims), start)))
    if len(begun) > len(stored):  # whether there was a row
        stored.append(made.stored(names[-1], StateSpec("recurrent", Spec(torch.bool, ("B",)), 0)))
    given |= {mixer.state[0]: stored} if mixer.initial else dict(zip(mixer.state, stored, strict=True))
    given.pop("", None)
    result = call_with(made, node, info, given)
    for i, name in enumerate(names, first):
        made.updated[name] = made.call(operator.getitem, result, i)
    return result


def starts(made: Writes, node: fx.Node, mixer: Mixer) -> tuple[list[float], list[fx.Node]]:
    """What fills the values of a state that starts from given ones, and the nodes of these where no number does.

    Then there is one value of state more. Raises NotRowwise where they are not the same for all sequences and lengths.
    """
    given = tensors(bind(node)[mixer.initial]) if mixer.initial else []
    values = [made.positions.start(one) for one in given]
    if all(bool((value == value.flatten()[0]).all()) for value in values):
        return [value.flatten()[0].item() for value in values], []
    constants = [made.constant(one, value, "_start") for one, value in zip(given, values, strict=True)]
    return [0.0] * (len(given) + 1), constants


def call_with(made: Writes, node: fx.Node, info: Info, given: dict[str, Any]) -> fx.Node:
    """The op's call with some arguments given, and the others for the rows at hand."""
    assert isinstance(node.target, torch._ops.OpOverload)
    arguments = node.target._schema.arguments
    rest = {name: value for name, value in bind(node).items() if name not in given}
    values = {**fx.node.map_arg(rest, lambda source: made.operand(source, node, info)), **given}
    by_place = [a for a in arguments if not a.kwarg_only]
    while by_place and by_place[-1].has_default_value() and values[by_place[-1].name] == by_place[-1].default_value:
        by_place.pop()
    options = {a.name: values[a.name] for a in arguments if a.kwarg_only and values[a.name] != a.default_value}
    return made.call(node.target, *[values[a.name] for a in by_place], like=node, **options)
