"""What each axis of a value means: a product of named factors, and what becomes of these under a reshape.

The kinds of factors are "b" batch, "r" rows, "c" columns (all slots: the last axis of masks), "." free (of `size`
elements), and "?" (of the sequence's length, nothing says which). An axis of size 1 has no factors. `check` compares
the sizes that a rule implies with those of the captured graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class Factor(NamedTuple):
    """A part of an axis; the size of a batch, of rows and of columns is the graph's."""

    kind: str
    size: int = 0


Axis = tuple[Factor, ...]
Axes = tuple[Axis, ...]
Dims = tuple["int | str", ...]  # sizes as captured: ints, or products over B and T

B: Axis = (Factor("b"),)
ROW: Axis = (Factor("r"),)
COLUMN: Axis = (Factor("c"),)


class NotRowwise(Exception):
    """The op can't be restricted to rows; the text says why."""


# --- questions -------------------------------------------------------------------------------------------------------


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


def elements(axes: Axes) -> int:
    """Elements of a value, its batch and sequence axes counted as one."""
    return math.prod(n for axis in axes for kind, n in axis if kind == ".")


def size_text(axis: Axis) -> str:
    """For messages: "B*8", "T"."""
    return "*".join({"b": "B", "r": "T", "c": "T", "?": "T"}.get(k, str(n)) for k, n in axis) or "1"


def only_free(axis: Axis, doing: str, note: str = "") -> None:
    """Raises if the axis has a batch or sequence in it."""
    if has(axis, "rc?"):
        raise NotRowwise(f"{doing} along the sequence{note}")
    if has(axis, "b"):
        raise NotRowwise(f"{doing} along the batch")


def fixed(axes: Axes, message: str) -> None:
    """Raises if any axis has a batch or sequence in it."""
    if any(has(x, "brc?") for x in axes):
        raise NotRowwise(message)


def positive(axis: int, rank: int) -> int:
    return axis % rank if rank else 0


# --- new axes --------------------------------------------------------------------------------------------------------


def free(size: int | str) -> Axis:
    """An axis that is neither batch nor sequence."""
    if not isinstance(size, int):
        raise NotRowwise(f"makes an axis of size {size}")
    return (Factor(".", size),) if size != 1 else ()


def without(axes: Axes, i: int) -> Axes:
    """The axes with axis `i` taken as one element."""
    return replaced(axes, i, ())


def replaced(axes: Axes, i: int, axis: Axis) -> Axes:
    return (*axes[:i], axis, *axes[i + 1 :])


def over_slots(axes: Axes) -> Axes:
    """The axes of a value of all slots, of which the rows are some."""
    return tuple(tuple(Factor("c", n) if kind == "r" else Factor(kind, n) for kind, n in axis) for axis in axes)


def from_sizes(dims: Dims) -> Axes:
    """Axes of a value that depends on no tokens, where nothing says what an axis of size T means ("?")."""
    return tuple(free(d) if isinstance(d, int) else B if d == "B" else (Factor("?"),) for d in dims)


def align(dims: Dims, beside: Axes) -> Axes:
    """Axes of a value that depends on no tokens, from the value that it is combined with elementwise."""
    axes = []
    for i, dim in enumerate(dims):
        other = beside[i - len(dims)] if len(dims) - i <= len(beside) else ()
        if isinstance(dim, int):
            axes.append(free(dim))
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


# --- sizes -----------------------------------------------------------------------------------------------------------


def regroup(axes: Axes, dims: Dims) -> Axes:
    """Axes after a reshape to `dims`: factors are taken in order, free ones are split where they must be."""
    queue = [factor for axis in axes for factor in axis]
    result: list[Axis] = []
    for dim in dims:
        want, batches, rows, extra = monomial(dim)
        taken: list[Factor] = []
        while want > 1 or batches or rows:
            kind, size = queue.pop(0) if queue else Factor("end")
            if kind == "b" and batches:
                batches -= 1
            elif kind in "rc" and rows and not extra:
                rows -= 1
            elif kind == "." and want > 1 and (want % size == 0 or size % want == 0):
                if size > want:
                    queue.insert(0, Factor(".", size // want))
                    size = want
                want //= size
            else:
                raise NotRowwise(f"reshapes to {list(dims)}, which the axes don't allow")
            taken.append(Factor(kind, size))
        result.append(merged(taken))
    if queue:
        raise NotRowwise(f"reshapes to {list(dims)}, which the axes don't allow")
    return tuple(result)


def merged(factors: Sequence[Factor]) -> Axis:
    """Factors as one axis; free neighbours are multiplied."""
    result: list[Factor] = []
    for kind, size in factors:
        if kind == "." and result and result[-1].kind == ".":
            size *= result.pop().size
        result.append(Factor(kind, size))
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
        rows = sum(kind in "rc" for kind, _ in axis)
        if (elements((axis,)), count((axis,), "b"), rows, 0) != monomial(dim):
            raise NotRowwise(f"has an axis of size {dim} where {size_text(axis)} was expected")
