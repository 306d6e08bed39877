"""What each axis of a value means, and how row-wise ops carry that along.

An axis is a product of factors: ("b", 0) batch, ("r", 0) query rows, ("c", extra) key columns (all slots, plus `extra`
appended columns such as attention sinks), (".", n) anything else. An axis of size 1 has no factors. A rule says which
axes an op's result has, given those of its inputs, or raises NotRowwise: the op mixes rows, or is not known.
This is the whitelist of design section 4: what isn't here is refused, never guessed. `check` then compares the sizes
that a rule's answer implies with those of the captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

Factor = tuple[str, int]
Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]
Dims = tuple["int | str", ...]

B: Axis = (("b", 0),)
ROW: Axis = (("r", 0),)
COLUMN: Axis = (("c", 0),)
aten = torch.ops.aten


ALIASES = {
    "aten::max.other": "aten::maximum", "aten::min.other": "aten::minimum", "aten::concat": "aten::cat",
    "aten::concatenate": "aten::cat",
}  # fmt: skip


class NotRowwise(Exception):
    """The op can't be restricted to rows; the text says why."""


# --- calls ---------------------------------------------------------------------------------------------------------


def op_name(node: fx.Node) -> str:
    """ "aten::add" of a call, or the function's name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return ALIASES.get(target.name()) or target.name().split(".")[0]
    return getattr(target, "__name__", str(target))


def bind(node: fx.Node) -> dict[str, Any]:
    """The call's arguments by the names of the op's schema, defaults filled in."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)
    bound: dict[str, Any] = {}
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, repeats kept."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), (Tensor, list, tuple))]


# --- axes ------------------------------------------------------------------------------------------------------------


def plain(size: int | str) -> Axis:
    """An axis that is neither batch nor sequence."""
    if not isinstance(size, int):
        raise NotRowwise(f"makes an axis of size {size}")
    return ((".", size),) if size != 1 else ()


def has(axis: Axis, kinds: str) -> bool:
    """Whether a factor of the axis is of one of `kinds`."""
    return any(kind in kinds for kind, _ in axis)


def find(axes: Any, kind: str) -> int | None:
    """Index of the axis that is exactly one factor of `kind`; None for several results or no such axis."""
    if not isinstance(axes, tuple):
        return None
    return next((i for i, axis in enumerate(axes) if len(axis) == 1 and axis[0][0] == kind), None)


def count(axes: Axes, kind: str) -> int:
    """How many factors of `kind` the axes hold."""
    return sum(k == kind for axis in axes for k, _ in axis)


def size_text(axis: Axis) -> str:
    """For messages: "B*8", "T"."""
    return "*".join({"b": "B", "r": "T", "c": "T", "?": "T"}.get(k, str(n)) for k, n in axis) or "1"


def without(axes: Axes, i: int) -> Axes:
    """The axes with axis `i` taken as one element."""
    return (*axes[:i], (), *axes[i + 1 :])


def replaced(axes: Axes, i: int, axis: Axis) -> Axes:
    return (*axes[:i], axis, *axes[i + 1 :])


def from_sizes(dims: Dims) -> Axes:
    """Axes of a value that depends on no tokens, where nothing says what an axis of size T means ("?")."""
    return tuple(plain(d) if isinstance(d, int) else B if d == "B" else (("?", 0),) for d in dims)


def align(dims: Dims, beside: Axes) -> Axes:
    """Axes of a value that depends on no tokens, from the value that it is combined with elementwise."""
    axes = []
    for i, dim in enumerate(dims):
        other = beside[i - len(dims)] if len(dims) - i <= len(beside) else ()
        if isinstance(dim, int):
            axes.append(plain(dim))
        elif has(other, "rcb"):
            check((other,), (dim,))
            axes.append(other)
        elif dim == "B":
            axes.append(B)
        else:
            raise NotRowwise(f"combines a value of size {dim} with one that has no such axis")
    return tuple(axes)


def broadcast(inputs: Sequence[Axes]) -> Axes:
    """Axes of an elementwise result. Raises when two inputs disagree about an axis."""
    rank = max((len(a) for a in inputs), default=0)
    result: list[Axis] = []
    for i in range(rank):
        present = {a[i - rank] for a in inputs if rank - i <= len(a) and a[i - rank]}
        if len(present) > 1:
            raise NotRowwise("combines different axes: " + " and ".join(sorted(map(size_text, present))))
        result.append(present.pop() if present else ())
    return tuple(result)


def regroup(axes: Axes, dims: Dims) -> Axes:
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
            elif kind == "." and want > 1 and size % want == 0:
                queue.insert(0, (".", size // want))
                size, want = want, 1
            else:
                raise NotRowwise(f"reshapes across the axis {size_text(((kind, size),))}")
            taken.append((kind, size))
        result.append(merged(taken))
    if queue:
        raise NotRowwise(f"reshapes to {list(dims)}, which the axes don't allow")
    return tuple(result)


def merged(factors: Sequence[Factor]) -> Axis:
    """Factors as one axis; plain neighbours are multiplied."""
    result: list[Factor] = []
    for kind, size in factors:
        if kind == "." and result and result[-1][0] == ".":
            result[-1] = (".", result[-1][1] * size)
        else:
            result.append((kind, size))
    return tuple(result)


def monomial(dim: int | str) -> tuple[int, int, int, int]:
    """(coefficient, powers of B, powers of T, added constant) of a dim such as 64, "B*T" or "T+1"."""
    if isinstance(dim, int):
        return dim, 0, 0, 0
    base, _, extra = dim.partition("+")
    parts = base.split("*")
    numbers = [int(p) for p in parts if p.isdigit()]
    if {p for p in parts if not p.isdigit()} - {"B", "T"} or (extra and not extra.isdigit()):
        raise NotRowwise(f"has an axis of size {dim}")
    return math.prod(numbers), parts.count("B"), parts.count("T"), int(extra or 0)


def check(axes: Axes, dims: Dims) -> None:
    """Raises unless the axes have the captured sizes, and batch, rows and columns occur at most once each."""
    if len(axes) != len(dims):
        raise NotRowwise(f"has {len(dims)} axes where {len(axes)} were expected")
    if count(axes, "?"):
        raise NotRowwise("uses a value of the sequence's length in a way that is not elementwise")
    if any(count(axes, kind) > 1 for kind in "brc"):
        raise NotRowwise("pairs rows with rows, or sequences with sequences, outside attention")
    for axis, dim in zip(axes, dims, strict=True):
        extra = sum(n for kind, n in axis if kind == "c")
        rows = sum(kind in "rc" for kind, _ in axis)
        plain_size = math.prod(n for kind, n in axis if kind == ".")
        if (plain_size, count((axis,), "b"), rows, extra) != monomial(dim) or (extra and len(axis) > 1):
            raise NotRowwise(f"has an axis of size {dim} where {size_text(axis)} was expected")


def positive(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


def only_plain(axis: Axis, doing: str) -> None:
    """Raises unless the axis is neither batch nor sequence."""
    if has(axis, "rc?"):
        raise NotRowwise(f"{doing} along the sequence")
    if has(axis, "b"):
        raise NotRowwise(f"{doing} along the batch")


def fixed(axes: Axes, message: str) -> None:
    """Raises if any axis is batch or sequence."""
    if any(has(x, "brc?") for x in axes):
        raise NotRowwise(message)


# --- rules: (arguments by name, tensors given by their axes; dims of the result) -> axes of the result -----------

Args = Mapping[str, Any]


def unsqueeze(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]) + 1)
    return (*x["self"][:i], (), *x["self"][i:])


def squeeze(x: Args, dims: Dims) -> Axes:
    axes = x["self"]
    which = x.get("dim", [i for i, axis in enumerate(axes) if not axis])
    wanted = {positive(i, len(axes)) for i in (which if isinstance(which, (list, tuple)) else [which])}
    return tuple(axis for i, axis in enumerate(axes) if i not in wanted or axis)


def permute(x: Args, dims: Dims) -> Axes:
    return tuple(x["self"][positive(i, len(x["self"]))] for i in x["dims"])


def transpose(x: Args, dims: Dims) -> Axes:
    axes = list(x["self"])
    i, j = (positive(x.get(k, default), len(axes)) for k, default in (("dim0", 0), ("dim1", -1)))
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]
    return tuple(axes)


def view(x: Args, dims: Dims) -> Axes:
    return regroup(x["self"], dims)


def expand(x: Args, dims: Dims) -> Axes:
    axes = ((),) * (len(dims) - len(x["self"])) + x["self"]
    return tuple(axis or plain(d) for axis, d in zip(axes, dims, strict=True))


def repeat(x: Args, dims: Dims) -> Axes:
    axes = ((),) * (len(dims) - len(x["self"])) + x["self"]
    return tuple(merged([(".", n), *a]) if n != 1 else a for a, n in zip(axes, x["repeats"], strict=True))


def repeat_interleave(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    return replaced(x["self"], i, merged([*x["self"][i], *plain(x["repeats"])]))


def slice_(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    axis = x["self"][i]
    if len(axis) == 1 and axis[0][0] == "c" and axis[0][1] and x["start"] in (0, None) and dims[i] == "T":
        return replaced(x["self"], i, COLUMN)  # drops the appended columns again
    if len(axis) == 1 and axis[0][0] == "c" and axis[0][1] == -(x["start"] or 0) == dims[i]:
        return replaced(x["self"], i, plain(dims[i]))  # takes them alone
    if has(axis, "rc"):
        raise NotRowwise("slices along the sequence (as a token shift does, which takes recurrent state)")
    only_plain(axis, "slices")
    return replaced(x["self"], i, plain(dims[i]))


def select(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    only_plain(x["self"][i], "selects")
    return (*x["self"][:i], *x["self"][i + 1 :])


def split(x: Args, dims: Any) -> list[Axes]:
    i = positive(x["dim"], len(x["self"]))
    only_plain(x["self"][i], "splits")
    return [replaced(x["self"], i, plain(d[i])) for d in dims]


def unbind(x: Args, dims: Any) -> list[Axes]:
    return [select(x, d) for d in dims]


def cat(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["tensors"][0]))
    axes = [t[i] for t in x["tensors"]]
    rest = broadcast([without(t, i) for t in x["tensors"]])
    if axes[0] == COLUMN and not any(has(a, "brc?") for a in axes[1:]):  # attention sinks: columns after all slots
        return replaced(rest, i, (("c", sum(a[0][1] if a else 1 for a in axes[1:])),))
    for axis in axes:
        only_plain(axis, "concatenates")
    return replaced(rest, i, plain(dims[i]))


def stack(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(dims))
    axes = broadcast(x["tensors"])
    return (*axes[:i], plain(dims[i]), *axes[i:])


def reduced_axes(x: Args) -> set[int]:
    """The axes that a reduction, search or softmax goes over."""
    which = x["dim"]
    rank = len(x["self"])
    if which is None or which == []:
        return set(range(rank))
    return {positive(w, rank) for w in (which if isinstance(which, (list, tuple)) else [which])}


def reduce(x: Args, dims: Any) -> Any:
    """Reductions, sorts and softmax over axes that are neither batch nor sequence."""
    axes, drop = x["self"], reduced_axes(x)
    for i in drop:
        only_plain(axes[i], "reduces or sorts")

    def shape(d: Dims) -> Axes:
        if len(d) == len(axes):
            return tuple(plain(d[i]) if i in drop else axis for i, axis in enumerate(axes))
        return tuple(axis for i, axis in enumerate(axes) if i not in drop)

    return [shape(d) for d in dims] if isinstance(dims, list) else shape(dims)


def cumulative(x: Args, dims: Dims) -> Axes:
    only_plain(x["self"][positive(x["dim"], len(x["self"]))], "accumulates")
    return x["self"]  # type: ignore[no-any-return]


def glu(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    only_plain(x["self"][i], "splits")
    return replaced(x["self"], i, plain(dims[i]))


def normalize(x: Args, dims: Dims) -> Axes:
    """layer_norm and rms_norm over trailing axes."""
    for axis in x["input"][len(x["input"]) - len(x["normalized_shape"]) :]:
        only_plain(axis, "normalizes")
    for name in ("weight", "bias"):
        fixed(x.get(name) or (), "has weights that depend on the tokens")
    return x["input"]  # type: ignore[no-any-return]


def group_norm(x: Args, dims: Dims) -> Axes:
    for axis in x["input"][1:]:
        only_plain(axis, "normalizes")
    return x["input"]  # type: ignore[no-any-return]


def linear(x: Args, dims: Dims) -> Axes:
    fixed((*x["weight"], *(x.get("bias") or ())), "has weights that depend on the tokens")
    only_plain(x["input"][-1], "multiplies")
    return (*x["input"][:-1], plain(dims[-1]))


def linear_int8(x: Args, dims: Dims) -> Axes:
    return linear({"input": x["x"], "weight": (*x["weight"], *x["scales"])}, dims)


def matmul(x: Args, dims: Dims) -> Axes:
    """Matrix products whose contracted axis is not the sequence; attention's own two are rules of the analysis."""
    left, right = x["self"], x["other"] if "other" in x else x["mat2"]
    only_plain(left[-1], "contracts")
    only_plain(right[max(len(right) - 2, 0)], "contracts")
    lead = broadcast([left[:-2], right[:-2]])
    rows = (left[-2],) if len(left) > 1 else ()
    columns = (right[-1],) if len(right) > 1 else ()
    return (*lead, *rows, *columns)


def pointwise_convolution(x: Args, dims: Dims) -> Axes:
    """conv1d, conv2d with a kernel of one element: a product over the channels, such as heads that talk."""
    fixed((*x["weight"], *(x.get("bias") or ())), "has weights that depend on the tokens")
    if any(axis for axis in x["weight"][2:]):
        raise NotRowwise("moves rows along the sequence (a token shift or convolution), which takes recurrent state")
    if any(n != 1 for n in x["stride"]) or any(n != 0 for n in x["padding"]) or len(x["input"]) != len(x["weight"]):
        raise NotRowwise("is a convolution with a stride or padding")
    only_plain(x["input"][1], "convolves")
    return replaced(x["input"], 1, plain(dims[1]))


def shifts(x: Args, dims: Dims) -> Axes:
    """Ops that move rows; along other axes they are fine."""
    if isinstance(x.get("pad"), list):
        moved = [len(x["self"]) - 1 - i // 2 for i, n in enumerate(x["pad"]) if n]
    else:
        moved = [positive(d, len(x["self"])) for d in x["dims"]] if x["dims"] else list(range(len(x["self"])))
    for i in moved:
        if has(x["self"][i], "rc"):
            raise NotRowwise("moves rows along the sequence (a token shift), which takes recurrent state")
        only_plain(x["self"][i], "pads")
    return tuple(plain(d) if i in moved else axis for i, (axis, d) in enumerate(zip(x["self"], dims, strict=True)))


def addmm(x: Args, dims: Dims) -> Axes:
    return broadcast([x["self"], matmul({"self": x["mat1"], "mat2": x["mat2"]}, dims)])


def embedding(x: Args, dims: Dims) -> Axes:
    fixed(x["weight"], "looks up a table that depends on the tokens")
    return (*x["indices"], plain(dims[-1]))


def token_shuffle(x: Args, dims: Dims) -> Axes:
    fixed(x["table"], "looks up a table that depends on the tokens")
    only_plain(x["ids"][-1], "gathers")
    return (*x["ids"][:-1], plain(dims[-1]))


def token_unshuffle(x: Args, dims: Dims) -> Axes:
    for name in ("weight", "bias", "head", "head_bias"):
        fixed(x.get(name) or (), "has weights that depend on the tokens")
    only_plain(x["x"][-1], "multiplies")
    return (*x["x"][:-1], plain(dims[-2]), plain(dims[-1]))


def index(x: Args, dims: Dims) -> Axes:
    """Neighbouring axes indexed: a table that depends on no tokens by tokens, or plain axes by constants."""
    where = [i for i, chosen in enumerate(x["indices"]) if chosen is not None]
    first, last = where[0], where[-1] + 1
    if where != list(range(first, last)):
        raise NotRowwise("indexes axes that are not neighbours")
    chosen = broadcast(x["indices"][first:last])
    for axis in x["self"][first:last]:
        only_plain(axis, "indexes")
    if any(has(a, "brc?") for a in chosen):
        fixed(x["self"], "indexes by tokens into a value of the sequence")
    return (*x["self"][:first], *chosen, *x["self"][last:])


def index_select(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    indices: list[Any] = [None] * i
    return index({"self": x["self"], "indices": [*indices, x["index"]]}, dims)


def copy(x: Args, dims: Dims) -> Axes:
    return broadcast([x["self"], x["src"]])


def slice_scatter(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    for axis in (x["self"][i], x["src"][i]):
        only_plain(axis, "slices")
    return replaced(broadcast([without(x["self"], i), without(x["src"], i)]), i, plain(dims[i]))


def gather(x: Args, dims: Dims) -> Axes:
    """gather and scatter along an axis that is neither batch nor sequence; all other axes are the same."""
    i = positive(x["dim"], len(x["self"]))
    tensors = [x["self"], x["index"], *([x["src"]] if isinstance(x.get("src"), tuple) else [])]
    for t in tensors:
        only_plain(t[i], "gathers or scatters")
    if len({without(t, i) for t in tensors}) > 1:
        raise NotRowwise("gathers across rows")
    return replaced(x["self"], i, plain(dims[i]))


def one_hot(x: Args, dims: Dims) -> Axes:
    return (*x["self"], plain(dims[-1]))


def as_complex(x: Args, dims: Dims) -> Axes:
    only_plain(x["self"][-1], "pairs")
    return x["self"][:-1]  # type: ignore[no-any-return]


def as_real(x: Args, dims: Dims) -> Axes:
    return (*x["self"], plain(2))


def same(x: Args, dims: Dims) -> Axes:
    return x["self"] if "self" in x else x["input"]  # type: ignore[no-any-return]


def pointwise(x: Args, dims: Dims) -> Axes:
    return broadcast([value for value in x.values() if is_axes(value)])


def is_axes(value: Any) -> bool:
    """Whether a bound argument is a tensor's axes."""
    return type(value) is tuple and all(type(a) is tuple for a in value)


Rule = Callable[[Args, Any], Any]
RESHAPES = {"aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten", "aten::unflatten", "aten::expand"}
RULES: dict[str, Rule] = {
    "aten::unsqueeze": unsqueeze, "aten::squeeze": squeeze, "aten::permute": permute, "aten::transpose": transpose,
    "aten::t": transpose, "aten::view": view, "aten::_unsafe_view": view, "aten::reshape": view, "aten::flatten": view,
    "aten::unflatten": view, "aten::expand": expand, "aten::repeat": repeat,
    "aten::repeat_interleave": repeat_interleave, "aten::slice": slice_, "aten::select": select,
    "aten::split_with_sizes": split, "aten::split": split, "aten::chunk": split, "aten::unbind": unbind,
    "aten::cat": cat, "aten::stack": stack, "aten::mean": reduce, "aten::sum": reduce, "aten::prod": reduce,
    "aten::amax": reduce, "aten::amin": reduce, "aten::max": reduce, "aten::min": reduce, "aten::var": reduce,
    "aten::std": reduce, "aten::logsumexp": reduce, "aten::softmax": reduce, "aten::_softmax": reduce,
    "aten::log_softmax": reduce, "aten::_log_softmax": reduce, "aten::argmax": reduce, "aten::argmin": reduce,
    "aten::topk": reduce, "aten::sort": reduce, "aten::argsort": reduce, "aten::linalg_vector_norm": reduce,
    "aten::norm": reduce, "aten::any": reduce, "aten::all": reduce, "aten::cumsum": cumulative,
    "aten::cumprod": cumulative, "aten::glu": glu, "aten::layer_norm": normalize, "aten::rms_norm": normalize,
    "aten::group_norm": group_norm, "aten::linear": linear, "aten::mm": matmul, "aten::addmm": addmm,
        "aten::matmul": matmul, "aten::bmm": matmul, "aten::embedding": embedding, "aten::index": index,
    "aten::index_select": index_select, "aten::copy": copy, "aten::slice_scatter": slice_scatter,
    "aten::gather": gather, "aten::scatter": gather, "aten::scatter_add": gather, "aten::one_hot": one_hot,
    "aten::view_as_complex": as_complex, "aten::view_as_real": as_real, "aten::clone": same, "aten::type_as": same,
    "aten::_to_copy": same, "aten::to": same, "aten::dropout": same, "aten::contiguous": same,
    "aten::where": pointwise, "aten::maximum": pointwise, "aten::minimum": pointwise, "aten::zeros_like": same,
    "aten::ones_like": same, "aten::full_like": same, "aten::fill": same, "aropt::token_shuffle": token_shuffle,
    "aropt::token_unshuffle": token_unshuffle, "aropt::linear_int8": linear_int8,
    "aten::conv1d": pointwise_convolution, "aten::conv2d": pointwise_convolution, "aten::constant_pad_nd": shifts,
    "aten::pad": shifts, "aten::roll": shifts,
}  # fmt: skip


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a row-wise op, or None: not on the whitelist."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or draws(node):
        return None
    return pointwise if torch.Tag.pointwise in target.tags else RULES.get(op_name(node))


def draws(node: fx.Node) -> bool:
    """Whether the op draws random numbers."""
    target = node.target
    seeded = isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
    return seeded and not (op_name(node) == "aten::dropout" and not bind(node)["train"])


def elements(axes: Axes) -> int:
    """Elements of a value, its batch and sequence axes counted as one."""
    return math.prod(n for axis in axes for kind, n in axis if kind == ".")
