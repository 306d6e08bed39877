"""Calls of ops that move axes, merge or repeat them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from tests.support.op_values import (
    Call,
    Draw,
    aten,
    axes,
    factor_sizes,
    narrower,
    pick,
    rarely,
    value,
)


def reshape(target: Any) -> Callable[[Draw], Call]:
    """To the same factors grouped otherwise, some free ones split; rarely to a size that cuts through."""

    def call(draw: Draw) -> Call:
        x = value(draw, axes(draw))
        sizes: list[int] = []
        for n in factor_sizes(x.axes):
            parts = [2, n // 2] if n % 2 == 0 and n > 2 and draw(st.booleans()) else [n]
            for part in parts:
                if sizes and rarely(draw, 3):
                    sizes[-1] *= part
                else:
                    sizes.append(part)
        if rarely(draw, 8):
            sizes = list(draw(st.permutations(sizes)))
        if draw(st.booleans()):
            sizes.insert(draw(st.integers(0, len(sizes))), 1)
        return Call(target, (x, sizes))

    return call


def flatten(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    i, j = sorted(draw(st.integers(0, len(x.axes) - 1)) for _ in "ij")
    return Call(aten.flatten.using_ints, (x, i, j))


def unflatten(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    i = draw(st.integers(0, len(x.axes) - 1))
    return Call(aten.unflatten.int, (x, i, factor_sizes((x.axes[i],)) or [1]))


def unsqueeze(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    return Call(aten.unsqueeze.default, (x, draw(st.integers(-len(x.axes) - 1, len(x.axes)))))


def squeeze(draw: Draw) -> Call:
    """Also with axes that are longer than one as captured, and may be one in a step."""
    x = value(draw, (*axes(draw), ()))
    form = pick(draw, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
    chosen = draw(st.lists(st.integers(-len(x.axes), -1), min_size=1, max_size=3, unique=True))
    return Call(form, (x, *{"": (), "dim": chosen[:1], "dims": (chosen,)}[form._overloadname.replace("default", "")]))


def permute(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    order = draw(st.permutations(range(len(x.axes))))
    return Call(aten.permute.default, (x, [i - pick(draw, 0, len(order)) for i in order]))


def transpose(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    return Call(aten.transpose.int, (x, *(draw(st.integers(-len(x.axes), len(x.axes) - 1)) for _ in "ij")))


def t(draw: Draw) -> Call:
    return Call(aten.t.default, (value(draw, axes(draw, least=2)[:2]),))


def expand(draw: Draw) -> Call:
    x = value(draw, narrower(draw, axes(draw, tail=1)))
    sizes = [n if n > 1 else pick(draw, 1, 2, 3) for n in x.tensor.shape]
    return Call(aten.expand.default, (x, [2] * pick(draw, 0, 1) + [pick(draw, n, n, -1) for n in sizes]))


def repeat(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    return Call(aten.repeat.default, (x, [pick(draw, 1, 1, 2, 3) for _ in range(len(x.axes) + pick(draw, 0, 1))]))


def repeat_interleave(draw: Draw) -> Call:
    x = value(draw, axes(draw))
    i = draw(st.integers(-len(x.axes), len(x.axes) - 1))
    return Call(aten.repeat_interleave.self_int, (x, pick(draw, 1, 2, 3), i))


LAYOUT = {
    "view": reshape(aten.view.default), "_unsafe_view": reshape(aten._unsafe_view.default),
    "reshape": reshape(aten.reshape.default), "flatten": flatten, "unflatten": unflatten, "unsqueeze": unsqueeze,
    "squeeze": squeeze, "permute": permute, "transpose": transpose, "t": t, "expand": expand, "repeat": repeat,
    "repeat_interleave": repeat_interleave,
}  # fmt: skip
