"""Sizes of axes: numbers, or expressions over a graph's symbols such as "B" or "4*B+1"."""

from __future__ import annotations

from collections.abc import Mapping

Dim = int | str  # a size, or an expression over the graph's symbols such as "B" or "4*B"


def resolve(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The integer value of a dim, e.g. resolve("4*B", {"B": 2}) == 8. Raises KeyError for an unknown symbol."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    total = 0
    for term in dim.replace("-", "+-").split("+"):
        if term.strip():
            value = 1
            for factor in term.split("*"):
                factor = factor.strip()
                sign, factor = (-1, factor[1:].strip()) if factor.startswith("-") else (1, factor)
                value *= sign * (int(factor) if factor.isdigit() else sizes[factor])
            total += value
    return total


def symbols(dim: Dim) -> set[str]:
    """The symbols of a dim."""
    if isinstance(dim, int):
        return set()
    parts = dim.replace("+", " ").replace("-", " ").replace("*", " ").split()
    return {part for part in parts if not part.isdigit()}
