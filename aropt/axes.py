"""What each axis of a value means, and how row-wise ops carry that along.

An axis is a product of factors: ("b", 0) batch, ("r", 0) query rows, ("c", extra) key columns (all slots, plus `extra`
appended columns such as attention sinks), (".", n) anything else. An axis of size 1 has no factors. A rule says which
axes an op's result has, given those of its inputs, or raises NotRowwise: the op mixes rows, or is not known.
This is the whitelist of design section 4: what isn't here is refused, never guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

Factor = tuple[str, int]
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]

B: Axis = (("b", 0),)
ROW: Axis = (("r", 0),)
COLUMN: Axis = (("c", 0),)
aten = torch.ops.aten


class NotRowwise(Exception):
    """The op can't be restricted to rows; the text says why."""


def plain(size: int) -> Axis:
    """An axis that is neither batch nor sequence."""
    return ((".", size),) if size != 1 else ()


def has(axis: Axis, kinds: str) -> bool:
    """Whether a factor of the axis is of one of `kinds`."""
    return any(kind in kinds for kind, _ in axis)


def find(axes: Axes, kind: str) -> int | None:
    """Index of the axis that is exactly one factor of `kind`."""
    return next((i for i, axis in enumerate(axes) if len(axis) == 1 and axis[0][0] == kind), None)


def size_text(axis: Axis) -> str:
    """For messages: "B*8", "T"."""
    return "*".join({"b": "B", "r": "T", "c": "T"}.get(k, str(n)) for k, n in axis) or "1"


def from_sizes(dims: Sequence[int | str], sequence: Axis) -> Axes:
    """Axes of a value that depends on no tokens; `sequence` is the meaning of an axis of size T."""
    known = {"T": sequence, "B": B}
    return tuple(plain(d) if isinstance(d, int) else known.get(d, (("?", 0),)) for d in dims)


def broadcast(inputs: Sequence[Axes]) -> Axes:
    """Axes of an elementwise result. Raises when two inputs disagree about an axis."""
    rank = max(len(a) for a in inputs)
    result: list[Axis] = []
    for i in range(rank):
        present = [a[i - rank] for a in inputs if rank - i <= len(a) and a[i - rank]]
        merged = {a for a in present}
        if len(merged) > 1:
            raise NotRowwise("combines rows with columns: " + " and ".join(sorted(map(size_text, merged))))
        result.append(present[0] if present else ())
    return tuple(result)


def regroup(axes: Axes, dims: Sequence[int | str]) -> Axes:
    """Axes after a reshape to `dims` (ints, or products over B and T)."""
    queue = [f for axis in axes for f in axis]
    result: list[Axis] = []
    for dim in dims:
        want, batches, rows, extra = monomial(dim)
        taken: list[Factor] = []
        while want > 1 or batches or rows:
            if not queue:
                raise NotRowwise(f"reshapes to {list(dims)}, which the axes don't allow")
            kind, size = queue.pop(0)
            if kind == "b" and batches:
                batches -= 1
            elif kind in "rc" and rows and (kind == "r" or size == extra):
                rows -= 1
            elif kind == "." and want % size == 0:
                want //= size
            elif kind == "." and size % want == 0 and want > 1:
                queue.insert(0, (".", size // want))
                size, want = want, 1
            else:
                raise NotRowwise(f"reshapes across the axis {size_text(((kind, size),))}")
            taken.append((kind, size))
        result.append(tuple(taken))
    if queue:
        raise NotRowwise(f"reshapes to {list(dims)}, which the axes don't allow")
    return tuple(result)


def monomial(dim: int | str) -> tuple[int, int, int, int]:
    """(coefficient, powers of B, powers of T, added constant) of a dim such as 64, "B*T" or "T+1"."""
    if isinstance(dim, int):
        return dim, 0, 0, 0
    base, _, extra = dim.partition("+")
    parts = base.split("*")
    if not set(parts) - {p for p in parts if p.isdigit()} <= {"B", "T"} or (extra and not extra.isdigit()):
        raise NotRowwise(f"has an axis of size {dim}")
    return math.prod(int(p) for p in parts if p.isdigit()), parts.count("B"), parts.count("T"), int(extra or 0)


def positive(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def only_plain(axes: Axes, axis: int, doing: str) -> None:
    """Raises unless the axis is neither batch nor sequence."""
    if has(axes[axis], "rc?"):
        raise NotRowwise(f"{doing} along the sequence")
    if has(axes[axis], "b"):
        raise NotRowwise(f"{doing} along the batch")


# --- rules: (node, axes of its tensor inputs in order, dims of its result) -> axes of its result ------------------


def arg(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def unsqueeze(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(node.args[1], len(a[0]) + 1)  # type: ignore[arg-type]
    return (*a[0][:i], (), *a[0][i:])


def squeeze(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    which = node.args[1] if len(node.args) > 1 else [i for i, x in enumerate(a[0]) if not x]
    wanted = {positive(i, len(a[0])) for i in (which if isinstance(which, (list, tuple)) else [which])}  # type: ignore[list-item]
    return tuple(x for i, x in enumerate(a[0]) if i not in wanted or x)


def permute(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return tuple(a[0][positive(i, len(a[0]))] for i in node.args[1])  # type: ignore[union-attr,arg-type]


def transpose(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    axes = list(a[0])
    i, j = (0, 1) if node.target is aten.t.default else (positive(k, len(axes)) for k in node.args[1:3])  # type: ignore[arg-type]
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def view(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return regroup(a[0], dims)


def expand(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    axes = ((),) * (len(dims) - len(a[0])) + a[0]
    return tuple(x or (plain(d) if isinstance(d, int) else unknown(d)) for x, d in zip(axes, dims, strict=True))


def unknown(dim: Any) -> Axis:
    raise NotRowwise(f"repeats a value along an axis of size {dim}")


def slice_(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(arg(node, 1, "dim", 0), len(a[0]))
    axis = a[0][i]
    start, end = arg(node, 2, "start"), arg(node, 3, "end")
    if len(axis) == 1 and axis[0][0] == "c" and axis[0][1] and start in (0, None) and end == -axis[0][1]:
        return (*a[0][:i], COLUMN, *a[0][i + 1 :])  # drops the appended columns again
    only_plain(a[0], i, "slices")
    return (*a[0][:i], plain(dims[i]), *a[0][i + 1 :])


def select(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(node.args[1], len(a[0]))  # type: ignore[arg-type]
    only_plain(a[0], i, "selects")
    return (*a[0][:i], *a[0][i + 1 :])


def split(node: fx.Node, a: list[Axes], dims: Any) -> list[Axes]:  # type: ignore[return]
    default = 0 if node.target is not aten.split_with_sizes.default else 0
    i = positive(arg(node, 2, "dim", default), len(a[0]))
    only_plain(a[0], i, "splits")
    return [(*a[0][:i], plain(d[i]), *a[0][i + 1 :]) for d in dims]


def cat(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(arg(node, 1, "dim", 0), len(a[0]))
    rest = broadcast([(*x[:i], (), *x[i + 1 :]) for x in a])
    axis = a[0][i]
    if axis == COLUMN and all(not has(x[i], "brc?") for x in a[1:]):  # attention sinks: columns after all slots
        extra = sum(x[i][0][1] if x[i] else 1 for x in a[1:])
        return (*rest[:i], (("c", extra),), *rest[i + 1 :])
    for x in a:
        only_plain(x, i, "concatenates")
    return (*rest[:i], plain(dims[i]), *rest[i + 1 :])


def reduce(node: fx.Node, a: list[Axes], dims: Any) -> Any:
    """Reductions and searches over axes that are not the sequence (columns are checked by the caller)."""
    which = arg(node, 1, "dim") if node.target not in SECOND_IS_K else arg(node, 2, "dim", -1)
    listed = which if isinstance(which, (list, tuple)) else [-1 if which is None and node.target in SECOND_IS_K else which]
    if which is None and node.target not in SECOND_IS_K or listed == []:
        raise NotRowwise("reduces over all axes at once")
    for w in listed:
        i = positive(w, len(a[0]))  # type: ignore[arg-type]
        if not has(a[0][i], "c") or has(a[0][i], "r"):
            only_plain(a[0], i, "reduces or sorts")
    many = isinstance(dims, list)
    drop = {positive(w, len(a[0])) for w in listed}  # type: ignore[arg-type]

    def shape(d: Any) -> Axes:
        if len(d) == len(a[0]):
            return tuple((a[0][i] if has(a[0][i], "c") and d[i] != 1 else plain(d[i])) if i in drop else x
                         for i, x in enumerate(a[0]))  # fmt: skip
        return tuple(x for i, x in enumerate(a[0]) if i not in drop)

    return [shape(d) for d in dims] if many else shape(dims)


def normalize(node: fx.Node, a: list[Axes], dims: Any) -> Any:
    """layer_norm and rms_norm over trailing axes."""
    for i in range(len(node.args[1])):  # type: ignore[arg-type]
        only_plain(a[0], len(a[0]) - 1 - i, "normalizes")
    return a[0]


def group_norm(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    if any(has(x, "rc?") for x in a[0][1:]):
        raise NotRowwise("normalizes along the sequence")
    return a[0]


def linear(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    only_plain(a[0], len(a[0]) - 1, "multiplies")
    if any(has(x, "brc?") for x in a[1]):
        raise NotRowwise("has weights that depend on the tokens")
    return (*a[0][:-1], plain(dims[-1]))


def addmm(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    result = linear(node, a[1:], dims)
    return broadcast([a[0], result])


def matmul(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    """Matrix products whose contracted axis is not the sequence; attention's own two are rules of restrict."""
    left, right = a[-2], a[-1]
    only_plain(left, len(left) - 1, "contracts")
    if len(right) == 1:
        only_plain(right, 0, "contracts")
        return left[:-1]
    only_plain(right, len(right) - 2, "contracts")
    lead = broadcast([left[:-2], right[:-2]]) if len(left) > 1 else right[:-2]
    if has(right[-1], "rc?"):
        raise NotRowwise("multiplies by a matrix whose columns are rows of the sequence")
    rows = (left[-2],) if len(left) > 1 else ()
    result = (*lead, *rows, right[-1])
    return broadcast([a[0], result]) if len(a) == 3 else result


def embedding(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    if any(has(x, "brc?") for x in a[0]):
        raise NotRowwise("looks up a table that depends on the tokens")
    return (*a[1], plain(dims[-1]))


def index(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    """table[i, :, j] where the table does not depend on the sequence (experts' weights, one index or leading ones)."""
    positions = [i for i, x in enumerate(node.args[1]) if x is not None]  # type: ignore[union-attr,arg-type]
    if positions != list(range(len(positions))):
        raise NotRowwise("indexes inner axes")
    table, chosen = a[0], broadcast(a[1:])
    if any(has(x, "brc?") for x in table):
        raise NotRowwise("indexes by tokens into a value of the sequence")
    return (*chosen, *table[len(positions) :])


def gather(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(node.args[1], len(a[0]))  # type: ignore[arg-type]
    only_plain(a[0], i, "gathers or scatters")
    for x in a[1:]:
        only_plain(x, i, "gathers or scatters")
    others = [(*x[:i], (), *x[i + 1 :]) for x in a]
    if len({o for o in others}) > 1:
        raise NotRowwise("gathers across rows")
    return (*a[0][:i], plain(dims[i]), *a[0][i + 1 :])


def one_hot(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return (*a[0], plain(dims[-1]))


def same(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return a[0]


def pointwise(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return broadcast(a)


def unflatten(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    return regroup(a[0], dims)


def cumulative(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    only_plain(a[0], positive(arg(node, 1, "dim"), len(a[0])), "accumulates")
    return a[0]


def stack(node: fx.Node, a: list[Axes], dims: Any) -> Axes:
    i = positive(arg(node, 1, "dim", 0), len(dims))
    merged = broadcast(a)
    return (*merged[:i], plain(dims[i]), *merged[i:])


Rule = Callable[[fx.Node, list[Axes], Any], Any]
SECOND_IS_K = {aten.topk.default, aten.sort.stable}
RESHAPES = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::expand"}
RULES: dict[str, Rule] = {
    "aten::unsqueeze": unsqueeze, "aten::squeeze": squeeze, "aten::permute": permute, "aten::transpose": transpose,
    "aten::t": transpose, "aten::view": view, "aten::_unsafe_view": view, "aten::reshape": view, "aten::flatten": view,
    "aten::unflatten": view, "aten::expand": expand, "aten::slice": slice_, "aten::select": select,
    "aten::split_with_sizes": split, "aten::split": split, "aten::chunk": split,
    "aten::cat": cat, "aten::stack": stack, "aten::mean": reduce, "aten::sum": reduce, "aten::amax": reduce,
    "aten::amin": reduce, "aten::max": reduce, "aten::min": reduce, "aten::var": reduce, "aten::std": reduce,
    "aten::logsumexp": reduce, "aten::softmax": reduce, "aten::_softmax": reduce, "aten::log_softmax": reduce,
    "aten::_log_softmax": reduce, "aten::argmax": reduce, "aten::topk": reduce, "aten::sort": reduce,
    "aten::linalg_vector_norm": reduce, "aten::norm": reduce, "aten::any": reduce, "aten::all": reduce,
    "aten::layer_norm": normalize, "aten::rms_norm": normalize, "aten::native_layer_norm": normalize,
    "aten::group_norm": group_norm, "aten::linear": linear, "aten::mm": linear, "aten::addmm": addmm,
    "aten::matmul": matmul, "aten::bmm": matmul, "aten::baddbmm": matmul, "aten::embedding": embedding,
    "aten::index": index, "aten::gather": gather, "aten::scatter": gather, "aten::one_hot": one_hot,
    "aten::clone": same, "aten::_to_copy": same, "aten::to": same, "aten::dropout": same, "aten::contiguous": same,
    "aten::zeros_like": same, "aten::ones_like": same, "aten::full_like": same, "aten::cumsum": cumulative,
    "aten::where": pointwise, "aten::masked_fill": pointwise, "aten::clamp": pointwise,
}  # fmt: skip


def op_name(node: fx.Node) -> str:
    """ "aten::add" of a call, or the function's name."""
    target = node.target
    return target.name().split(".")[0] if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a row-wise op, or None: not on the whitelist."""
    known = RULES.get(op_name(node))
    if known is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        return pointwise
    return known
