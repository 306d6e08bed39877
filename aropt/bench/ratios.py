"""What figures of several prompts say together: of two figures of each, how many times the one is the other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np


def spread(values: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(values, (0.1, 0.9))
    return {"median": statistics.median(values), "p10": float(low), "p90": float(high), "n": len(values)}


def over(figures: Sequence[tuple[float, float]]) -> dict[str, float]:
    """The ratio of two figures of each row: of their sums, with 95 % by bootstrap (low, high), and over the rows."""
    pairs = np.array(figures, float)
    drawn = pairs[np.random.default_rng(0).integers(len(pairs), size=(2000, len(pairs)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    above, below = pairs.sum(0)
    each = spread((pairs[:, 0] / pairs[:, 1]).tolist())
    return {"all": float(above / below), "low": float(low), "high": float(high), **each}
