"""Rows of several ids: a model of image windows reads and writes `unit` ids a row (Token-Shuffle, 2504.17789).

Callers give and get flat ids. Of these, ids from `single` on (text, classes) fill a row of their own, repeated; others
come in whole windows. `meta` is a program's: without "unit", a row is an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aropt.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def window(meta: Mapping[str, Any]) -> tuple[int, ...]:
    """The axes of a row: () where a row is an id, (W,) where it holds W of them."""
    return (int(meta["unit"]),) if meta.get("unit") else ()


def ids_of(meta: Mapping[str, Any], rows: int) -> int:
    """New ids that so many rows hold."""
    return rows * int(meta.get("unit") or 1)


def rows_for(meta: Mapping[str, Any], ids: int) -> int:
    """Rows that so many new ids take; the last one may be cut."""
    return -(-ids // int(meta.get("unit") or 1))


def rows(meta: Mapping[str, Any], ids: Sequence[int]) -> list[Any]:
    """Flat ids as rows. Raises UsageError for a window that is not whole."""
    if not window(meta):
        return [int(t) for t in ids]
    (unit,), single = window(meta), int(meta.get("single", meta.get("input_vocab", meta["vocab"])))
    made: list[list[int]] = []
    whole = True
    for token in map(int, ids):
        if not whole and token < single:
            made[-1].append(token)
        elif whole:
            made.append([token] * unit if token >= single else [token])
        else:
            break
        whole = len(made[-1]) == unit
    if not whole:
        raise UsageError(
            what=f"a window has {len(made[-1])} of its {unit} ids",
            where=f"row {len(made) - 1} of a prompt",
            why=f"the model reads {unit} neighbouring image ids as one row; ids from {single} on stand alone",
            hint=f"give image ids in windows of {unit}, or cut the prompt after the last whole one",
        )
    return made


def flat(generated: Tensor) -> list[list[int]]:
    """Ids of each sequence, of rows [B, N] or [B, N, W]; -1 after its end."""
    return generated.flatten(1).tolist()
