"""What masks do to attention scores: an abstract interpretation with one range for hidden entries and one for the rest.

A value with rows and columns is described by `Scores`: the matrix [n, n] of entries that some mask has hidden, the
range of the values there (`out`), elsewhere (`seen`) and on the diagonal (`own`), over all heads. Each op maps ranges
to ranges, so "softmax makes the hidden entries exactly zero" is a computed fact, and a clamp, a soft-cap or a sum that
brings hidden entries back is seen as such. Assumes that scores before masking lie within +-LIMIT.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name, tensor_inputs
from aropt.restrict.dims import NotRowwise
from aropt.restrict.positions import hides_future

Range = tuple[float, float]
LIMIT = 1500.0
UNDERFLOW = 104.0  # exp(-104) is exactly 0 in fp32
HIDES = 5e3  # a bias at least this negative is a mask
ANY: Range = (-math.inf, math.inf)
CONTENT: Range = (-LIMIT, LIMIT)
# monotone in each tensor argument, or bilinear: the extremes lie at the corners of the arguments' ranges
CORNERS = {
    "aten::add", "aten::sub", "aten::rsub", "aten::mul", "aten::div", "aten::maximum", "aten::minimum", "aten::tanh",
    "aten::exp", "aten::sigmoid", "aten::relu", "aten::clamp", "aten::clamp_min", "aten::clamp_max", "aten::neg",
    "aten::softplus", "aten::_to_copy", "aten::to", "aten::clone", "aten::dropout", "aten::type_as",
}  # fmt: skip
MIXES = {"aten::conv2d", "aten::linear", "aten::matmul"}  # sums over heads, of scores in their first argument
CASTS = {"aten::_to_copy", "aten::to", "aten::type_as"}
LAYOUT = {
    "aten::unsqueeze", "aten::squeeze", "aten::permute", "aten::transpose", "aten::t", "aten::view", "aten::reshape",
    "aten::_unsafe_view", "aten::expand", "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes",
    "aten::chunk", "aten::unbind", "aten::repeat", "aten::repeat_interleave", "getitem",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Scores:
    """Of a value with rows and columns: which entries are hidden (in all heads), and the ranges by region."""

    hidden: Tensor | None = None
    out: Range = ANY  # hidden entries
    seen: Range = ANY  # all others
    own: Range = ANY  # the diagonal: what a row sees of itself

    def is_zeroed(self, canvas: bool = False) -> bool:
        """Whether nothing hidden, and no row's future unless on a canvas, takes part in a sum over columns."""
        return self.hidden is not None and self.out == (0.0, 0.0) and (canvas or hides_future(self.hidden))


FRESH = Scores(None, ANY, CONTENT, CONTENT)  # q k^T


@dataclass(frozen=True, eq=False)
class Hide:
    """What a mask operand does: it gives `value` (True, False or a number) at the `entries` [n, n] that it hides."""

    entries: Tensor
    value: bool | float


@dataclass(frozen=True, eq=False)
class Bias:
    """A position-only operand with rows and columns: lowest and highest value [n, n] over all heads."""

    low: Tensor
    high: Tensor
    hide: Hide | None
    memo: dict[Any, Any] = field(default_factory=dict)

    def over(self, region: Tensor | None, inside: bool) -> Range:
        """Range over the entries inside (or outside) a region; None: everywhere."""
        key = (id(region), inside)
        if key not in self.memo:
            low, high = self.low, self.high
            if region is not None:
                drop = ~region if inside else region
                low, high = low.masked_fill(drop, math.inf), high.masked_fill(drop, -math.inf)
            found = float(low.min()), float(high.max())
            found = found if found[0] <= found[1] else (0.0, 0.0)
            self.memo[key] = region, found  # the region stays alive: its id is ours
        return self.memo[key][1]  # type: ignore[no-any-return]

    def own(self) -> Range:
        return float(self.low.diagonal().min()), float(self.high.diagonal().max())


Operand = Scores | Bias | Range


def bias_of(table: Tensor, rows: int, columns: int, kind: str) -> Bias:
    """A Bias from its table; `kind` is how it is used: "add", "mul", "yes" (True hides) or "no" (False hides)."""
    matrix = table.movedim((rows, columns), (-2, -1)).reshape(-1, table.shape[rows], table.shape[columns])
    if matrix.is_complex():
        raise NotRowwise("has complex attention scores")
    matrix = matrix.float()
    if table.is_floating_point():
        matrix = matrix.clamp(min=torch.finfo(table.dtype).min)
    low, high = matrix.amin(0), matrix.amax(0)
    zero = (low == 0) & (high == 0)
    hidden = {"add": high <= -HIDES, "sub": low >= HIDES, "mul": zero, "yes": low == 1, "no": high == 0}.get(kind)
    if hidden is None or not hidden.any():
        return Bias(low, high, None)
    if kind in ("yes", "no"):
        return Bias(low, high, Hide(hidden, kind == "yes"))
    value = float(low[hidden].min()) if kind != "sub" else float(high[hidden].max())
    return Bias(low, high, Hide(hidden, value))


def use_of(node: fx.Node, operand: fx.Node, scored: Sequence[fx.Node]) -> str:
    """How a position operand with rows and columns may hide entries of the scores (see `bias_of`)."""
    name, x = op_name(node), bind(node)
    if name == "aten::where" and x["condition"] is operand:
        return "no" if x["self"] in scored else "yes"
    if name == "aten::masked_fill" and x["mask"] is operand:
        return "yes"
    if name in ("aten::add", "aten::sub") and x.get("alpha", 1) == 1 and operand not in scored:
        return "sub" if name == "aten::sub" and x["other"] is operand else "add"
    return "mul" if name == "aten::mul" else ""


def transfer(node: fx.Node, operands: dict[fx.Node, Operand]) -> Scores:
    """Scores of an elementwise or layout op's result, from those of its inputs."""
    if op_name(node) in LAYOUT:
        return next(o for o in operands.values() if isinstance(o, Scores))
    masks = {n: m for n, o in operands.items() if (m := entries_of(o)) is not None}
    hidden = union(list(masks.values()))
    combine: Callable[[dict[fx.Node, Range]], Range] = partial(evaluate, node)
    seen = combine({n: at(o, "seen", hidden) for n, o in operands.items()})
    if op_name(node) in ("aten::cat", "aten::stack"):
        seen = joined([at(o, "seen", hidden) for o in operands.values()])
        operands = {n: o for n, o in operands.items() if not isinstance(o, tuple)}  # appended columns are all seen
        combine = lambda ranges: joined(list(ranges.values()))  # noqa: E731
    own = combine({n: at(o, "own", hidden) for n, o in operands.items()})
    if hidden is None:  # scores before masking: bounded, whatever the op
        return Scores(None, ANY, CONTENT if seen == ANY else seen, CONTENT if own == ANY else own)
    cells = []  # a hidden entry is hidden by at least one of the masks
    for choice in itertools.product((False, True), repeat=len(masks)):
        if all(choice) or (any(choice) and overlap(list(masks.values()), choice)):  # all of them hide empty slots
            where = dict(zip(masks, ["out" if c else "seen" for c in choice]))
            cells.append(combine({n: at(o, where.get(n, "seen"), masks.get(n)) for n, o in operands.items()}))
    return Scores(hidden, joined(cells), seen, own)


def overlap(regions: Sequence[Tensor], inside: Sequence[bool]) -> bool:
    """Whether some entry lies in (or outside, as `inside` says) each of the regions."""
    left = torch.ones((), dtype=torch.bool)
    for region, wanted in zip(regions, inside):
        left = left & (region if wanted else ~region)
    return bool(left.any())


def entries_of(operand: Operand) -> Tensor | None:
    """The entries that the operand itself hides."""
    if isinstance(operand, Bias):
        return operand.hide.entries if operand.hide else None
    return operand.hidden if isinstance(operand, Scores) else None


def at(operand: Operand, where: str, hidden: Tensor | None) -> Range:
    """Range of an operand at the entries that it hides ("out"), at those not `hidden` ("seen"), or on the diagonal."""
    if isinstance(operand, Scores):
        return {"out": operand.out, "seen": operand.seen, "own": operand.own}[where]
    if isinstance(operand, Bias):
        return operand.own() if where == "own" else operand.over(hidden, where == "out")
    return operand


def evaluate(node: fx.Node, ranges: dict[fx.Node, Range]) -> Range:
    """Range of an op's result over the given ranges of its tensor arguments."""
    name, x = op_name(node), bind(node)
    if name in ("aten::where", "aten::masked_fill"):
        condition, yes, no = ((x["condition"], x["self"], x["other"]) if name == "aten::where"
                              else (x["mask"], x["value"], x["self"]))  # fmt: skip
        low, high = ranges[condition]
        taken = [range_of(v, ranges) for v, used in ((yes, high > 0), (no, low < 1)) if used]
        return joined(taken)
    if name in MIXES and x.get("bias") is None and ranges[tensor_inputs(node)[0]] == (0.0, 0.0):
        return 0.0, 0.0  # of all heads, as ranges are
    if name not in CORNERS:
        return ANY
    tensors = list(dict.fromkeys(tensor_inputs(node)))
    factors = {"aten::mul": tensors, "aten::div": [x["self"]] if name == "aten::div" else []}.get(name, [])
    if any(ranges[f] == (0.0, 0.0) for f in factors):
        return 0.0, 0.0  # the other factor is finite, or the forward itself gives no number
    if name == "aten::div":
        low, high = range_of(x["other"], ranges)
        if low <= 0 <= high or x.get("rounding_mode"):
            return ANY
    if name in CASTS:
        return ranges[tensors[0]]
    corners = torch.tensor(list(itertools.product(*(ranges[t] for t in tensors))), dtype=torch.float64)
    values = dict(zip(tensors, corners.unbind(1), strict=True))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
    results = node.target(*args, **kwargs).tolist()  # type: ignore[operator]
    return ANY if any(math.isnan(r) for r in results) else (min(results), max(results))


def range_of(value: Any, ranges: dict[fx.Node, Range]) -> Range:
    return ranges[value] if isinstance(value, fx.Node) else (float(value), float(value))


def joined(ranges: Sequence[Range]) -> Range:
    """The smallest range that holds all of them."""
    return (min(r[0] for r in ranges), max(r[1] for r in ranges)) if ranges else ANY


def union(regions: Sequence[Tensor]) -> Tensor | None:
    """Entries in any of the regions (the same object when they are all equal)."""
    result: Tensor | None = None
    for region in regions:
        if result is None:
            result = region
        elif region is not result and not torch.equal(region, result):
            result = result | region
    return result


def column_reduction(node: fx.Node, source: Scores, columns: int, canvas: bool = False) -> tuple[Scores | None, Range]:
    """Softmax and reductions over columns: (Scores of the result if it still has columns, else its range)."""
    name = op_name(node)
    if name in ("aten::softmax", "aten::_softmax"):
        require_causal(source, UNDERFLOW, "its softmax", canvas)
        return Scores(source.hidden, (0.0, 0.0), (0.0, 1.0), (0.0, 1.0)), ANY
    if name in ("aten::amax", "aten::max"):
        require_causal(source, 0.0, "its maximum", canvas)
        return None, (source.own[0], source.seen[1])
    if name == "aten::logsumexp":
        require_causal(source, UNDERFLOW, "its logsumexp", canvas)
        return None, (source.own[0], source.seen[1] + math.log(columns + 1))
    if name == "aten::sum" and source.is_zeroed(canvas):
        return None, ANY
    raise NotRowwise("reduces or sorts along the sequence")


class NotCausal(NotRowwise):
    """A row depends on a later one; no append cache is exact."""


def require_causal(source: Scores, gap: float, where: str, canvas: bool = False) -> None:
    """Raises unless the hidden entries cover each row's future and lie `gap` below what the row sees of itself.

    On a canvas they may cover less; where nothing is hidden before a reduction, empty slots would take part in it.
    """
    if source.hidden is None:
        raise NotCausal("has no mask that hides later positions")
    if not canvas and not hides_future(source.hidden):
        i, j = (int(x) for x in (~source.hidden).triu(1).nonzero()[0])
        raise NotCausal(f"has a mask that lets position {i} see position {j}")
    if source.hidden.diagonal().any():
        raise NotRowwise("has a mask that hides a position from itself")
    if not source.out[1] <= source.own[0] - gap:
        raise NotRowwise(f"has a mask, but not one that still hides when it comes to {where}")
