"""Tensors with drawn axes and sizes, for calls of ops.

A batch has 11 sequences, a sequence 13 rows; free axes are small, so that a size tells what it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from aropt.restrict.dims import Axes, Dims, Factor, merged

aten = torch.ops.aten
SIZES = {"b": 11, "r": 13, "c": 13}
Draw = Callable[..., Any]


@dataclass(eq=False)
class Value:
    """A tensor and what its axes mean. `below`: its integers are 0 to below - 1."""

    tensor: Tensor
    axes: Axes
    below: int = 5


@dataclass
class Call:
    """An op and its arguments, with values in place of tensors."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def mapped(argument: Any, change: Callable[[Value], Any]) -> Any:
    """An argument with its values changed, also those in lists."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(mapped(a, change) for a in argument)
    return change(argument) if isinstance(argument, Value) else argument


def factor_sizes(axes: Axes) -> list[int]:
    return [SIZES[kind] + n if kind in SIZES else n for axis in axes for kind, n in axis]


def shape(axes: Axes) -> list[int]:
    return [math.prod(factor_sizes((axis,))) for axis in axes]


def dims(tensor: Tensor) -> Dims:
    """The sizes as capture would name them."""
    return tuple(map(dim, tensor.shape))


def dim(size: int) -> int | str:
    if size - SIZES["r"] in (1, 2):
        return f"T+{size - SIZES['r']}"
    letters = []
    for letter, kind in (("B", "b"), ("T", "r")):
        while size and size % SIZES[kind] == 0:
            size //= SIZES[kind]
            letters.append(letter)
    return "*".join([str(size)] * (size != 1) + letters) if letters else size


def pick(draw: Draw, *options: Any) -> Any:
    return draw(st.sampled_from(options))


def rarely(draw: Draw, one_in: int) -> bool:
    return draw(st.integers(1, one_in)) == one_in


def axes(draw: Draw, tail: int = 0, kinds: str = "brc", least: int = 0) -> Axes:
    """Drawn axes: kinds in any order with free axes between them, some merged; then `tail` free axes."""
    held = draw(st.lists(st.sampled_from(kinds), unique=True, min_size=1)) if kinds else []
    around = draw(st.lists(st.sampled_from((1, 2, 3, 4)), min_size=max(0, least - len(held) - tail), max_size=2))
    found: list[Any] = []
    for factor in draw(st.permutations([Factor(kind) for kind in held] + [Factor(".", n) for n in around])):
        axis = () if factor == (".", 1) else (factor,)
        if found and rarely(draw, 5) and len(found) > least - tail:
            found[-1] = merged([*found[-1], *axis])
        else:
            found.append(axis)
    return tuple(found) + tuple(free(draw) for _ in range(tail))


def free(draw: Draw) -> Any:
    size = pick(draw, 1, 2, 3, 4)
    return (Factor(".", size),) if size > 1 else ()


def value(draw: Draw, of: Axes, kind: str = "float", below: int = 5) -> Value:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if kind == "float":
        return Value(torch.randn(shape(of), generator=generator, dtype=torch.float64), of)
    numbers = torch.randint(0, 2 if kind == "bool" else below, shape(of), generator=generator)
    return Value(numbers.bool() if kind == "bool" else numbers, of, below)


def weight(draw: Draw, *sizes: int, kind: str = "float", below: int = 5) -> Value:
    return value(draw, tuple((Factor(".", n),) if n != 1 else () for n in sizes), kind, below)


def maybe(draw: Draw, one: Value) -> Value | None:
    return None if draw(st.booleans()) else one


def narrower(draw: Draw, of: Axes) -> Axes:
    """Axes that broadcast to these; rarely of another meaning."""
    some = tuple(() if rarely(draw, 4) else axis for axis in of)
    if rarely(draw, 6):  # rows beside columns: of equal size, and not the same
        swap = {"r": "c", "c": "r"}
        some = tuple(tuple(Factor(swap.get(kind, kind), n) for kind, n in axis) for axis in some)
    return some[1:] if some and not some[0] and draw(st.booleans()) else some


def which(draw: Draw, of: Axes) -> int:
    """An axis, mostly a free one."""
    fit = [i for i, axis in enumerate(of) if all(kind == "." for kind, _ in axis)]
    i = draw(st.sampled_from(fit if fit and not rarely(draw, 6) else range(len(of))))
    return i - len(of) if draw(st.booleans()) else i


def several(draw: Draw, of: Axes) -> list[int]:
    return list({which(draw, of) % len(of): 0 for _ in range(pick(draw, 1, 1, 2))})
