"""What the analysis of a captured forward says of each node that depends on its ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from aropt.restrict.bounds import CONTENT, Hide, Range, Scores
from aropt.restrict.dims import Axes


@dataclass
class Info:
    """Facts about a content node."""

    axes: Any  # Axes, or a list of them for an op with several results
    scores: Scores | None = None  # of a value with columns
    range: Range = CONTENT  # of a value without
    role: str = "row"  # row | score (q k^T) | mix (p v) | mixer | moved
    ahead: int = 0  # how many rows ahead it sees, where it is moved
    operands: dict[fx.Node, Axes] = field(default_factory=dict)  # meaning of each position operand's axes
    hides: dict[fx.Node, Hide] = field(default_factory=dict)  # those of them that hide entries
