"""Ways to do the same thing, timed in turns on several prompts, and what the figures say together.

A row is what was measured on one prompt, its times under "ms": {way: `spread`}. What is said of all rows is of the sums
of their medians, so that one figure divided by another is the third.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from aropt.bench.ratios import over, spread
from perf.drafts import PAUSE

Row = dict[str, Any]


def in_turns(calls: Mapping[str, Callable[[], Any]], runs: int, repeats: int = 1) -> tuple[Row, dict[str, Any]]:
    """Milliseconds of each call (of so many at once), and what it gave; the first one is not counted."""
    given, ms = {name: call() for name, call in calls.items()}, {name: list[float]() for name in calls}
    for _ in range(runs):
        for name, call in calls.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            ms[name].append((time.perf_counter() - start) * 1e3 / repeats)
    return {name: spread(times) for name, times in ms.items()}, given


def faster(rows: Sequence[Row], slow: str, fast: str) -> dict[str, float]:
    return over([(row["ms"][slow]["median"], row["ms"][fast]["median"]) for row in rows])


def mean(rows: Sequence[Row], way: str) -> str:
    return f"{statistics.fmean(row['ms'][way]['median'] for row in rows):.3g} ms"


def told(ratio: Mapping[str, float], unit: str = "x") -> tuple[str, str]:
    """The ratio of all rows, and from where to where it goes."""
    return f"{ratio['all']:.2f}{unit}", f"{ratio['p10']:.2f} to {ratio['p90']:.2f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table; columns after the second hold figures."""
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [head, rule, *lines])
