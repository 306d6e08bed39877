"""Calls of the ops that `restrict` has rules for, on small tensors with drawn axes, sizes and arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

from aropt.restrict.dims import Factor
from tests.support.op_layouts import LAYOUT
from tests.support.op_own import linear_int8, token_shuffle, token_unshuffle
from tests.support.op_values import (
    SIZES,
    Call,
    Draw,
    Value,
    aten,
    axes,
    free,
    maybe,
    narrower,
    pick,
    rarely,
    several,
    value,
    weight,
    which,
)

# --- families --------------------------------------------------------------------------------------------------------


def is_tensor(argument: Any) -> bool:
    return "Tensor" in str(argument.type)


def pointwise(draw: Draw, target: Any, kind: str = "float") -> Call:
    """Any op on tensors and numbers alone; the first tensor of a choice is bool."""
    full, args, first = axes(draw), [], True
    for argument in target._schema.arguments:
        if is_tensor(argument):
            own = "bool" if argument.name in ("condition", "mask") else kind
            args.append(value(draw, full if first else narrower(draw, full), own))
            first = False
        elif argument.kwarg_only or argument.has_default_value():
            break
        else:
            args.append(2)
    if target in (aten.clamp.default, aten.clip.default):
        args.append(0)  # at least one bound
    named = {"decimals": 1, "rounding_mode": "floor"}
    needed = {a.name: named[a.name] for a in target._schema.arguments if a.kwarg_only and not a.has_default_value()}
    return Call(target, tuple(args), needed)


def of_kind(*targets: Any) -> Callable[[Draw], Call]:
    return lambda draw: pointwise(draw, pick(draw, *targets))


def first(target: Any, *rest: Any, **kwargs: Any) -> Callable[[Draw], Call]:
    return lambda draw: Call(target, (value(draw, axes(draw)), *rest), kwargs)


def over(*targets: Any, kind: str = "float", rest: tuple[Any, ...] = (), **kwargs: Any) -> Callable[[Draw], Call]:
    """An op along one axis, or several where its schema takes them."""

    def call(draw: Draw) -> Call:
        x, target = value(draw, axes(draw, tail=pick(draw, 0, 1, 1)), kind), pick(draw, *targets)
        argument = next(a for a in target._schema.arguments if a.name in ("dim", "dims"))
        many = "List[int]" in str(argument.type)
        chosen = several(draw, x.axes) if many else which(draw, x.axes)
        options = kwargs | ({"stable": True} if target is aten.sort.stable else {})
        if any(a.name == "keepdim" for a in target._schema.arguments) and draw(st.booleans()):
            options["keepdim"] = True
        return Call(target, (x, *rest), {argument.name: chosen, **options})

    return call


def sized_over(draw: Draw) -> tuple[Value, int, int]:
    """A value, an axis of it, and the axis' size."""
    x = value(draw, axes(draw, tail=pick(draw, 0, 1)))
    i = which(draw, x.axes)
    return x, i, x.tensor.shape[i]


def select(draw: Draw) -> Call:
    x, i, n = sized_over(draw)
    return Call(aten.select.int, (x, i, draw(st.integers(-n, n - 1))))


def split(draw: Draw) -> Call:
    x, i, n = sized_over(draw)
    return Call(aten.split.Tensor, (x, draw(st.integers(1, n)), i))


def parted(target: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        x, i, n = sized_over(draw)
        head = draw(st.integers(1, n))
        return Call(target, (x, [head, n - head] if n > head else [n], i))

    return call


def chunk(draw: Draw) -> Call:
    x, i, _ = sized_over(draw)
    return Call(aten.chunk.default, (x, pick(draw, 1, 2, 3), i))


def glu(draw: Draw) -> Call:
    of = list(axes(draw, kinds="br"))
    i = draw(st.integers(0, len(of)))
    of.insert(i, (Factor(".", pick(draw, 2, 4, 6)), *((Factor("c"),) if rarely(draw, 6) else ())))
    return Call(aten.glu.default, (value(draw, tuple(of)), i - len(of) if draw(st.booleans()) else i))


def topk(draw: Draw) -> Call:
    x, i, n = sized_over(draw)
    return Call(aten.topk.default, (x, draw(st.integers(1, min(n, 3))), i), {"largest": draw(st.booleans())})


def gather(target: Any, source: Any = None, **kwargs: Any) -> Callable[[Draw], Call]:
    """gather, scatter and kin; rarely with an index that has other rows than the value."""

    def call(draw: Draw) -> Call:
        x, i, n = sized_over(draw)
        i %= len(x.axes)
        new = [*x.axes]
        new[i] = free(draw)
        if rarely(draw, 6):
            j = draw(st.integers(0, len(new) - 1))
            new[j] = ()
        at = value(draw, tuple(new), "int", n)
        rest = () if source is None else (value(draw, tuple(new)),) if source == "src" else (source,)
        return Call(target, (x, i, at, *rest), kwargs)

    return call


def slice_scatter(draw: Draw) -> Call:
    x, i, n = sized_over(draw)
    start = draw(st.integers(0, n - 1))
    end = draw(st.integers(start + 1, n))
    new = [*x.axes]
    new[i % len(new)] = (Factor(".", end - start),) if end - start > 1 else ()
    if end - start == n:
        new = [*x.axes]
    return Call(aten.slice_scatter.default, (x, value(draw, tuple(new)), i, start, end))


def pad(target: Any) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        x = value(draw, axes(draw, tail=pick(draw, 0, 1, 2)))
        pads = [pick(draw, 0, 0, 1, 2) for _ in range(2 * pick(draw, 1, min(2, len(x.axes))))]
        return Call(target, (x, pads, *(["constant"] if target is aten.pad.default else []), 1.0))

    return call


def roll(draw: Draw) -> Call:
    x = value(draw, axes(draw, tail=pick(draw, 0, 1)))
    chosen = [] if rarely(draw, 8) else several(draw, x.axes)
    return Call(aten.roll.default, (x, [draw(st.integers(-2, 2)) for _ in chosen or "1"], chosen))


def slice_(draw: Draw) -> Call:
    if draw(st.booleans()):
        x, i, n = sized_over(draw)
        start = draw(st.integers(0, n - 1))
        return Call(aten.slice.Tensor, (x, i, start, draw(st.integers(start + 1, n)), pick(draw, 1, 1, 2)))
    extra = pick(draw, 1, 2)  # appended columns, of which the slice drops or takes some
    of = (*axes(draw, kinds="br"), (Factor("c", extra),))
    start, end = pick(draw, (0, -extra), (0, SIZES["c"]), (-extra, None), (-1, None), (0, -1), (1, None), (2, None))
    return Call(aten.slice.Tensor, (value(draw, of), -1, start, end))


def convolution(space: int) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        first = () if rarely(draw, 4) else (Factor(pick(draw, *"br")),)
        kinds = [k for k in "brc" if first != (Factor(k),)]
        rest = [(Factor(k),) if draw(st.booleans()) else free(draw) for k in draw(st.permutations(kinds))[:space]]
        inner, groups = pick(draw, (2, 1), (4, 2), (3, 1), (1, 1))
        channel = (Factor(".", inner),) if inner > 1 else ()
        x = value(draw, (first, channel, *rest))
        odd = pick(draw, "", "", "", "", "kernel", "stride", "padding")  # what makes it mix neighbours, or skip rows
        kernel = [min(2 if odd == "kernel" else 1, n) for n in x.tensor.shape[2:]]
        w = weight(draw, 4, inner // groups, *kernel)
        options = {"stride": [2] * space} if odd == "stride" else {"padding": [1] * space} if odd == "padding" else {}
        target = aten.conv1d.default if space == 1 else aten.conv2d.default
        return Call(target, (x, w, maybe(draw, weight(draw, 4))), {"groups": groups, **options})

    return call


def norm(target: Any, biased: bool) -> Callable[[Draw], Call]:
    def call(draw: Draw) -> Call:
        over = pick(draw, 1, 2)
        x = value(draw, axes(draw, tail=pick(draw, over, over, over, 0, 1), least=2))
        sizes = list(x.tensor.shape[-over:])
        weights = [maybe(draw, weight(draw, *sizes)) for _ in range(1 + biased)]
        return Call(target, (x, sizes, *weights))

    return call


def group_norm(draw: Draw) -> Call:
    kept = axes(draw, kinds=pick(draw, "b", "r"), least=1)[:1] if draw(st.booleans()) else (axes(draw)[0],)
    groups = pick(draw, 1, 2)
    rest = axes(draw, tail=1, kinds="c")[:2] if rarely(draw, 5) else (free(draw),)
    x = value(draw, (*kept, (Factor(".", 2 * groups),), *rest))
    return Call(aten.group_norm.default, (x, groups, maybe(draw, weight(draw, 2 * groups))))


def linear(draw: Draw) -> Call:
    x = value(draw, axes(draw, tail=0 if rarely(draw, 6) else 1))
    w = weight(draw, 3, x.tensor.shape[-1])
    return Call(aten.linear.default, (x, w, maybe(draw, weight(draw, 3))))


def product(target: Any) -> Callable[[Draw], Call]:
    """Matrix products: any split of drawn axes over the two sides; the contracted axis is mostly free."""

    def call(draw: Draw) -> Call:
        if target is aten.matmul.default:
            lead = axes(draw, kinds=pick(draw, "", "b", "br", "brc"))[:2]
        else:
            lead = ((Factor(pick(draw, *"brc")),) if draw(st.booleans()) else free(draw),) * (
                target is aten.bmm.default
            )
        used = {kind for axis in lead for kind, _ in axis}
        left = [k for k in "brc" if k not in used]
        rows, columns, inner = (
            (Factor(draw(st.sampled_from(left))),) if left and draw(st.booleans()) else free(draw) for _ in range(3)
        )
        inner = inner if rarely(draw, 6) else free(draw)
        if len(lead) == 0 and target is aten.matmul.default and draw(st.booleans()):
            a, b = (inner,), (inner, columns)
            a, b = (a, b) if draw(st.booleans()) else ((rows, inner), a)
        else:
            a, b = (*lead, rows, inner), (*lead, inner, columns)
        if target is aten.matmul.default:
            b = (*narrower(draw, b[:-2]), *b[-2:])
        x, y = value(draw, a), value(draw, b)
        if target is aten.addmm.default:
            return Call(target, (value(draw, narrower(draw, (rows, columns))), x, y))
        return Call(target, (x, y))

    return call


def embedding(draw: Draw) -> Call:
    n = pick(draw, 2, 3)
    return Call(aten.embedding.default, (weight(draw, n, pick(draw, 1, 2, 3)), value(draw, axes(draw), "int", n)))


def one_hot(draw: Draw) -> Call:
    return Call(aten.one_hot.default, (value(draw, axes(draw), "int", 4), 4))


def as_complex(draw: Draw) -> Call:
    return Call(aten.view_as_complex.default, (value(draw, (*axes(draw), (Factor(".", 2),))),))


def as_real(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    return Call(aten.view_as_real.default, (Value(torch.complex(x.tensor, -x.tensor), x.axes),))


def index(draw: Draw) -> Call:
    """A table by tokens, or free axes by constants; rarely the wrong way round."""
    if draw(st.booleans()):
        sizes = [pick(draw, 2, 3) for _ in range(pick(draw, 1, 2, 3))]
        by = pick(draw, *range(1, len(sizes) + 1))
        full = axes(draw)
        chosen = [value(draw, full if i == 0 else narrower(draw, full), "int", sizes[i]) for i in range(by)]
        lead = [None] * pick(draw, 0, len(sizes) - by)
        return Call(
            aten.index.Tensor, (weight(draw, *(sizes if not lead else sizes[by:] + sizes[:by])), [*lead, *chosen])
        )
    x = value(draw, axes(draw, tail=1))
    i = which(draw, x.axes) % len(x.axes)
    by_rows = rarely(draw, 6)
    n = x.tensor.shape[i]
    at = (
        value(draw, axes(draw, kinds="br"), "int", n)
        if by_rows
        else weight(draw, pick(draw, 2, 3), kind="int", below=n)
    )
    return Call(aten.index.Tensor, (x, [*[None] * i, at]))


def index_select(draw: Draw) -> Call:
    if rarely(draw, 3):
        return Call(aten.index_select.default, (weight(draw, 3, 2), 0, value(draw, ((Factor("r"),),), "int", 3)))
    x, i, n = sized_over(draw)
    return Call(aten.index_select.default, (x, i, weight(draw, pick(draw, 2, 3), kind="int", below=n)))


def stack(draw: Draw) -> Call:
    of = axes(draw)
    x = [value(draw, of) for _ in range(pick(draw, 1, 2, 3))]
    return Call(aten.stack.default, (x, draw(st.integers(-len(of) - 1, len(of)))))


def cat(draw: Draw) -> Call:
    if rarely(draw, 3):  # columns beside all slots
        lead, extra = axes(draw, kinds="br"), pick(draw, 1, 2)
        added = (Factor(".", extra),) if extra > 1 else ()
        return Call(aten.cat.default, ([value(draw, (*lead, (Factor("c"),))), value(draw, (*lead, added))], -1))
    x, i, _ = sized_over(draw)
    return Call(aten.cat.default, ([x, *(value(draw, x.axes) for _ in range(pick(draw, 0, 1, 2)))], i))


# --- the table -------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "mean": over(aten.mean.dim), "sum": over(aten.sum.dim_IntList), "prod": over(aten.prod.dim_int),
    "amax": over(aten.amax.default), "amin": over(aten.amin.default), "max": over(aten.max.dim),
    "min": over(aten.min.dim), "var": over(aten.var.dim, aten.var.correction),
    "std": over(aten.std.dim, aten.std.correction), "norm": over(aten.norm.ScalarOpt_dim, p=2),
    "linalg_vector_norm": over(aten.linalg_vector_norm.default), "logsumexp": over(aten.logsumexp.default),
    "any": over(aten.any.dim, aten.any.dims, kind="bool"), "all": over(aten.all.dim, aten.all.dims, kind="bool"),
    "softmax": over(aten.softmax.int), "_softmax": over(aten._softmax.default, half_to_float=False),
    "log_softmax": over(aten.log_softmax.int), "_log_softmax": over(aten._log_softmax.default, half_to_float=False),
    "argmax": over(aten.argmax.default), "argmin": over(aten.argmin.default), "topk": topk,
    "sort": over(aten.sort.default, aten.sort.stable, descending=True),
    "argsort": over(aten.argsort.default), "cumsum": over(aten.cumsum.default), "cumprod": over(aten.cumprod.default),
}  # fmt: skip
ALONG = {
    "select": select, "unbind": over(aten.unbind.int), "split": split, "chunk": chunk, "glu": glu,
    "split_with_sizes": parted(aten.split_with_sizes.default), "slice_scatter": slice_scatter,
    "gather": gather(aten.gather.default), "scatter_add": gather(aten.scatter_add.default, "src"),
    "pad": pad(aten.pad.default), "constant_pad_nd": pad(aten.constant_pad_nd.default), "roll": roll, "slice": slice_,
    "conv1d": convolution(1), "conv2d": convolution(2), "stack": stack, "cat": cat,
}  # fmt: skip
SAME = {
    "clone": first(aten.clone.default), "contiguous": first(aten.contiguous.default),
    "type_as": lambda draw: Call(aten.type_as.default, (value(draw, axes(draw)), value(draw, axes(draw), "int"))),
    "_to_copy": first(aten._to_copy.default, dtype=torch.float32), "to": first(aten.to.dtype, torch.float32),
    "dropout": first(aten.dropout.default, 0.5, False), "zeros_like": first(aten.zeros_like.default),
    "ones_like": first(aten.ones_like.default), "full_like": first(aten.full_like.default, 3.0),
    "fill": first(aten.fill.Scalar, 3.0),
}  # fmt: skip
PRODUCTS = {name: product(getattr(aten, name).default) for name in ("matmul", "mm", "bmm", "addmm")}
TRAILING = {
    "layer_norm": norm(aten.layer_norm.default, True), "rms_norm": norm(aten.rms_norm.default, False),
    "group_norm": group_norm, "linear": linear, "embedding": embedding, "one_hot": one_hot,
    "view_as_complex": as_complex, "view_as_real": as_real, "index": index, "index_select": index_select,
    "aropt::linear_int8": linear_int8, "aropt::token_shuffle": token_shuffle, "aropt::token_unshuffle": token_unshuffle,
}  # fmt: skip
POINTWISE = {
    "where": of_kind(aten.where.self, aten.where.ScalarOther), "maximum": of_kind(aten.maximum.default),
    "minimum": of_kind(aten.minimum.default), "copy": of_kind(aten.copy.default),
}  # fmt: skip


def scatter(draw: Draw) -> Call:
    forms = (aten.scatter.src, "src"), (aten.scatter.value, 2.0), (aten.scatter.reduce, "src")
    target, source = pick(draw, *forms)
    return gather(target, source, **({"reduce": "add"} if target is aten.scatter.reduce else {}))(draw)


SAMPLES: dict[str, Callable[[Draw], Call]] = {
    name if "::" in name else f"aten::{name}": sample
    for table in (REDUCTIONS, ALONG, SAME, PRODUCTS, TRAILING, LAYOUT, POINTWISE, {"scatter": scatter})
    for name, sample in table.items()
}
