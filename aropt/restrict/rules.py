"""Which axes an op's result has, given those of its inputs: a table of families and their parameters.

A rule takes the arguments by name, tensors given by their axes, and the sizes of the result (a list of them for several
results). It raises NotRowwise where the op mixes rows. This is the whitelist of design section 4: what isn't in the
table is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

from aropt.ir.calls import draws, op_name
from aropt.restrict.dims import (
    Axes,
    Dims,
    NotRowwise,
    broadcast,
    fixed,
    free,
    has,
    merged,
    only_free,
    positive,
    regroup,
    replaced,
)

Args = Mapping[str, Any]
Rule = Callable[[Args, Any], Any]
STATE = ", which takes recurrent state"
WEIGHTS = "has weights that depend on the tokens"


def is_axes(value: Any) -> bool:
    """Whether a bound argument is a tensor's axes."""
    return type(value) is tuple and all(type(a) is tuple for a in value)


# --- pointwise -------------------------------------------------------------------------------------------------------


def pointwise(x: Args, dims: Dims) -> Axes:
    return broadcast([value for value in x.values() if is_axes(value)])


def same(x: Args, dims: Dims) -> Axes:
    """The first tensor's axes; others give a dtype or a number."""
    return next(value for value in x.values() if is_axes(value))


# --- along: an op that works on some axes, which must be free --------------------------------------------------------


def named_axes(x: Args, name: str = "dim", of: str = "self") -> set[int]:
    """The axes that an argument names; none named are all."""
    which, rank = x[name], len(x[of])
    if which is None or which == []:
        return set(range(rank))
    return {positive(w, rank) for w in (which if isinstance(which, (list, tuple)) else [which])}


def padded_axes(x: Args) -> set[int]:
    return {len(x["self"]) - 1 - i // 2 for i, n in enumerate(x["pad"]) if n}


def joined_axis(x: Args) -> set[int]:
    return {positive(x["dim"], len(x["tensors"][0]))}


def along(
    doing: str,
    over: Callable[[Args], Collection[int]] = named_axes,
    of: tuple[str, ...] = ("self",),
    note: str = "",
) -> Rule:
    """The axes `over` get the result's sizes, or are gone from it; the tensors agree about all others."""

    def rule(x: Args, dims: Any) -> Any:
        given: list[Any] = [axes for name in of for axes in (x[name] if name == "tensors" else [x.get(name)])]
        tensors: list[Axes] = [axes for axes in given if is_axes(axes)]
        chosen = over(x)
        for axes in tensors:
            for i in chosen:
                only_free(axes[i], doing, note)
        kept = {tuple(axis for i, axis in enumerate(axes) if i not in chosen) for axes in tensors}
        if len(kept) > 1:
            raise NotRowwise("gathers across rows")

        def result(sizes: Dims) -> Axes:
            if len(sizes) != len(tensors[0]):
                return next(iter(kept))
            return tuple(free(sizes[i]) if i in chosen else axis for i, axis in enumerate(tensors[0]))

        return [result(d) for d in dims] if isinstance(dims, list) else result(dims)

    return rule


def convolution(x: Args, dims: Dims) -> Axes:
    """conv1d, conv2d with a kernel of one element: a product over the channels, such as heads that talk."""
    fixed((*x["weight"], *(x.get("bias") or ())), WEIGHTS)
    if any(axis for axis in x["weight"][2:]):
        raise NotRowwise(f"moves rows along the sequence (a token shift or convolution){STATE}")
    if any(n != 1 for n in x["stride"]) or any(n != 0 for n in x["padding"]) or len(x["input"]) != len(x["weight"]):
        raise NotRowwise("is a convolution with a stride or padding")
    return along("convolves", lambda x: [1], ("input",))(x, dims)  # type: ignore[no-any-return]


# --- trailing: an op on the last axes, which must be free, with weights ----------------------------------------------


def trailing(doing: str, kept: int | str | None, value: str = "self") -> Rule:
    """`value[:kept]` are kept (a name: of the argument that lists the others); all other tensors are weights."""

    def rule(x: Args, dims: Dims) -> Axes:
        axes = x[value]
        lead = axes[: -len(x[kept]) if isinstance(kept, str) else kept]
        for axis in axes[len(lead) :]:
            only_free(axis, doing)
        for name, other in x.items():
            if name != value and is_axes(other):
                fixed(other, WEIGHTS)
        return (*lead, *map(free, dims[len(lead) :]))

    return rule


# --- contract: products ----------------------------------------------------------------------------------------------


def contract(left: str, right: str, added: str = "") -> Rule:
    """A product whose contracted axis is free (attention's own two are the analysis'), and what is added to it."""

    def rule(x: Args, dims: Dims) -> Axes:
        a, b = x[left], x[right]
        only_free(a[-1], "contracts")
        only_free(b[max(len(b) - 2, 0)], "contracts")
        product = (*broadcast([a[:-2], b[:-2]]), *a[:-1][-1:], *b[1:][-1:])
        return broadcast([x[added], product]) if added else product

    return rule


# --- layout ----------------------------------------------------------------------------------------------------------


def reshape(x: Args, dims: Dims) -> Axes:
    return regroup(x["self"], dims)


def permute(x: Args, dims: Dims) -> Axes:
    """permute, transpose, t."""
    order = list(x.get("dims", range(len(x["self"]))))
    if "dims" not in x:
        i, j = x.get("dim0", 0), x.get("dim1", -1)
        order[i], order[j] = order[j], order[i]
    return tuple(x["self"][i] for i in order)


def expand(x: Args, dims: Dims) -> Axes:
    """expand, repeat: what is repeated lies outside of the axis' own factors."""
    axes = ((),) * (len(dims) - len(x["self"])) + x["self"]
    times = x["repeats"] if "repeats" in x else [1 if axis else d for axis, d in zip(axes, dims, strict=True)]
    return tuple(merged([*free(n), *axis]) for axis, n in zip(axes, times, strict=True))


def repeat_interleave(x: Args, dims: Dims) -> Axes:
    i = positive(x["dim"], len(x["self"]))
    return replaced(x["self"], i, merged([*x["self"][i], *free(x["repeats"])]))


def stack(x: Args, dims: Dims) -> Axes:
    i, axes = positive(x["dim"], len(dims)), broadcast(x["tensors"])
    return (*axes[:i], free(dims[i]), *axes[i:])


# --- lookup ----------------------------------------------------------------------------------------------------------


def index(x: Args, dims: Dims) -> Axes:
    """Neighbouring axes indexed: a table that depends on no tokens by tokens, or free axes by constants."""
    indices: list[Any] = x.get("indices") or [*[None] * positive(x["dim"], len(x["self"])), x["index"]]
    where = [i for i, chosen in enumerate(indices) if chosen is not None]
    first, last = where[0], where[-1] + 1
    if where != list(range(first, last)):
        raise NotRowwise("indexes axes that are not neighbours")
    chosen = broadcast(indices[first:last])
    for axis in x["self"][first:last]:
        only_free(axis, "indexes")
    if any(has(a, "brc?") for a in chosen):
        fixed(x["self"], "indexes by tokens into a value of the sequence")
    return (*x["self"][:first], *chosen, *x["self"][last:])


# --- the table -------------------------------------------------------------------------------------------------------

FAMILIES: tuple[tuple[Rule, str], ...] = (  # and any op that torch tags as pointwise
    (pointwise, "where maximum minimum copy"),
    (same, "clone type_as _to_copy to dropout contiguous zeros_like ones_like full_like fill"),
    (along("selects"), "select unbind"),
    (along("splits"), "split split_with_sizes chunk glu"),
    (along("reduces or sorts"), "mean sum prod amax amin max min var std norm linalg_vector_norm logsumexp any all"),
    (along("reduces or sorts"), "softmax _softmax log_softmax _log_softmax argmax argmin topk sort argsort"),
    (along("accumulates"), "cumsum cumprod"),
    (along("gathers or scatters", of=("self", "index", "src")), "gather scatter scatter_add"),
    (along("slices", of=("self", "src")), "slice_scatter"),
    (along("moves rows", padded_axes, note=f" (a token shift){STATE}"), "pad constant_pad_nd"),
    (along("moves rows", lambda x: named_axes(x, "dims"), note=f" (a token shift){STATE}"), "roll"),
    (along("slices", note=f" (as a token shift does){STATE}"), "slice"),
    (convolution, "conv1d conv2d"),
    (trailing("normalizes", "normalized_shape", "input"), "layer_norm rms_norm"),
    (trailing("normalizes", 1, "input"), "group_norm"),
    (trailing("multiplies", -1, "input"), "linear"),
    (trailing("multiplies", -1, "x"), "aropt::linear_int8 aropt::token_unshuffle"),
    (trailing("gathers", -1, "ids"), "aropt::token_shuffle"),
    (trailing("pairs", -1), "view_as_complex"),
    (trailing("pairs", None), "view_as_real one_hot"),
    (trailing("looks up", None, "indices"), "embedding"),
    (contract("self", "other"), "matmul"),
    (contract("self", "mat2"), "mm bmm"),
    (contract("mat1", "mat2", "self"), "addmm"),
    (reshape, "view _unsafe_view reshape flatten unflatten unsqueeze squeeze"),
    (permute, "permute transpose t"),
    (expand, "expand repeat"),
    (repeat_interleave, "repeat_interleave"),
    (stack, "stack"),
    (along("concatenates", joined_axis, ("tensors",)), "cat"),
    (index, "index index_select"),
)
RULES = {n if "::" in n else f"aten::{n}": rule for rule, names in FAMILIES for n in names.split()}
RESHAPES = {f"aten::{name}" for name in ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "expand")}


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a row-wise op, or None: not on the whitelist."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or draws(node):
        return None
    return pointwise if torch.Tag.pointwise in target.tags else RULES.get(op_name(node))
