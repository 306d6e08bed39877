"""Rows of a canvas that are moved along it, or mixed with their neighbours: slices with padding, and convolutions.

What is moved is stored for all slots, as keys are. The op runs over these, with zeros where a slot is empty, and the
rows at hand are taken of its result: slots stand in the order of positions, empty ones lie before the first and after
the last, where the op itself pads with zeros. So it is exact while nothing is dropped and padded at the same end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name, tensor_inputs
from aropt.ir.program import StateSpec
from aropt.restrict.dims import ROW, Axes, Axis, Factor, NotRowwise, find, free, has, over_slots, positive, replaced
from aropt.restrict.info import Info

aten = torch.ops.aten
DROPPED, PADDED = "d", "p"  # kinds of factors: so many rows fewer or more at the front, or at the back (negative)
PADS = {"aten::constant_pad_nd", "aten::pad"}
CONVOLUTIONS = {"aten::conv1d", "aten::conv2d"}
END = 2**62


def on_the_way(axes: Any) -> int | None:
    """The axis that has rows fewer or more than the sequence; None if there is none."""
    if not isinstance(axes, tuple):
        return None
    return next((i for i, axis in enumerate(axes) if has(axis, DROPPED + PADDED)), None)


def moved(node: fx.Node, info: Mapping[fx.Node, Info]) -> tuple[Axes, int] | None:
    """Axes of what an op moves along the sequence, and how far ahead a row then sees; None for anything else.

    Raises NotRowwise for a move that is not known.
    """
    name, sources = op_name(node), [s for s in tensor_inputs(node) if s in info]
    axes = info[sources[0]].axes if len(sources) == 1 else None
    if axes is not None and (row := on_the_way(axes) if find(axes, "r") is None else find(axes, "r")) is not None:
        found = None
        if name == "aten::slice":
            found = sliced(bind(node), axes, row)
        elif name in PADS:
            found = padded(bind(node), axes, row)
        elif name in CONVOLUTIONS and axes[row] == ROW:
            found = convolved(node, axes, row)
        if found is not None:
            return found
    if any(on_the_way(info[s].axes) is not None for s in sources):
        raise NotRowwise("moves rows along the sequence in a way that is not known")
    return None


def sliced(x: Mapping[str, Any], axes: Axes, row: int) -> tuple[Axes, int] | None:
    """x[n:] or x[:-n]."""
    if positive(x["dim"], len(axes)) != row:
        return None
    start, end = x["start"] or 0, END if x["end"] is None else x["end"]
    if type(start) is not int or type(end) is not int or start < 0 or x["step"] != 1 or (start > 0) == (end < 0):
        return None
    if end >= 0 and end < END:
        return None
    count = start or end
    if axes[row] == ROW:
        return replaced(axes, row, (Factor(DROPPED, count),)), max(count, 0)
    return back(axes, row, PADDED, -count)


def padded(x: Mapping[str, Any], axes: Axes, row: int) -> tuple[Axes, int] | None:
    """Zeros before the first row, or after the last."""
    pads = [0] * (2 * len(axes) - len(x["pad"])) + [
        p for i in range(len(x["pad"]) - 2, -1, -2) for p in x["pad"][i : i + 2]
    ]
    front, after = pads[2 * row : 2 * row + 2]
    others = pads[: 2 * row] + pads[2 * row + 2 :]
    if any(others) or x["value"] or x.get("mode", "constant") != "constant" or (front > 0) == (after > 0):
        return None
    if min(front, after) < 0:
        return None
    count = front or -after
    if axes[row] == ROW:
        return replaced(axes, row, (Factor(PADDED, count),)), max(-count, 0)
    return back(axes, row, DROPPED, -count)


def back(axes: Axes, row: int, kind: str, count: int) -> tuple[Axes, int] | None:
    """The sequence's own length again, where `count` rows were dropped or added at the other end."""
    return (replaced(axes, row, ROW), 0) if axes[row] == (Factor(kind, count),) else None


def convolved(node: fx.Node, axes: Axes, row: int) -> tuple[Axes, int] | None:
    """A convolution with as much padding as it needs; None where each row is by itself."""
    x, i = bind(node), row - 2
    size = x["weight"].meta["val"].shape
    if i < 0 or size[row] == 1 or isinstance(x["padding"], str):
        return None
    around = int(x["dilation"][i]) * (int(size[row]) - 1)
    if x["stride"][i] != 1 or 2 * int(x["padding"][i]) != around:
        raise NotRowwise("makes a sequence of another length")
    rest: list[Axis] = [free(d) if isinstance(d, int) else () for d in node.meta["val"].shape]
    if any(has(axis, "br?") for j, axis in enumerate(axes) if j not in (0, row)):
        raise NotRowwise("mixes sequences")
    return (axes[0], *(ROW if j == row else rest[j] for j in range(1, len(axes)))), around // 2


# --- in a restricted forward -----------------------------------------------------------------------------------------


class Writes(Protocol):
    """What writes a restricted forward (see rewrite.py), as far as moves need it."""

    info: dict[fx.Node, Info]
    new: dict[fx.Node, fx.Node]
    state: dict[str, StateSpec]
    out: fx.Graph
    columns: fx.Node

    def weight(self, node: fx.Node) -> fx.Node: ...

    def call(self, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node: ...

    def memoized(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node: ...

    def spread_slots(self, axes: Axes) -> fx.Node: ...

    def cached(self, source: fx.Node, name: str) -> fx.Node: ...

    def layout(self, node: fx.Node, kinds: list[str], axes: Axes, rows: bool) -> fx.Node: ...

    def constant(self, node: fx.Node, value: Tensor, name: str) -> fx.Node: ...


def write(made: Writes, node: fx.Node) -> fx.Node:
    """The op over all slots; of its result the rows at hand, where it has as many rows as the sequence again."""
    axes, (source,) = made.info[node].axes, [s for s in tensor_inputs(node) if s in made.info]
    value = made.new[source] if on_the_way(made.info[source].axes) is not None else filled(made, source)

    def operand(n: fx.Node) -> Any:
        return value if n is source else made.weight(n)

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
    full = made.out.call_function(node.target, args, kwargs)  # type: ignore[arg-type]
    row = find(axes, "r")
    if row is None:
        return full
    index = made.memoized(("rows of", axes), lambda: made.spread_slots(axes))
    return made.call(aten.gather.default, full, row, index, like=node)


def filled(made: Writes, source: fx.Node) -> fx.Node:
    """A value over all slots, with zeros where they are empty."""
    return made.memoized(("filled", source), partial(write_filled, made, source))


def write_filled(made: Writes, source: fx.Node) -> fx.Node:
    stored = made.cached(source, f"rows_{sum(name.startswith('rows_') for name in made.state)}")
    written = made.memoized("slots written", lambda: made.call(aten.ge.Scalar, made.columns, 0))
    seen = made.layout(written, ["b", "c"], over_slots(made.info[source].axes), False)
    nothing = made.constant(source, torch.zeros((), dtype=source.meta["val"].dtype), "_nothing")
    return made.call(aten.where.self, seen, stored, nothing)
