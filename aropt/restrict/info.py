"""What the analysis of a captured forward says of each node that depends on its ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from aropt.restrict.dims import Axes


@dataclass(frozen=True, eq=False)
class Hide:
    """What a mask does: it says `value` (False, or a number that is added) at the `entries` [n, n] that it hides."""

    entries: Tensor
    value: bool | float


@dataclass
class Info:
    """Facts about a content node."""

    axes: Any  # Axes, or a list of them for an op with several results
    role: str = "row"  # row | mixer | score | mix | moved
    ahead: int = 0  # how many rows ahead it sees, where it is moved
    operands: dict[fx.Node, Axes] = field(default_factory=dict)  # meaning of each position operand's axes
    hides: dict[fx.Node, Hide] = field(default_factory=dict)  # masks that hide entries; queries where there is none
