"""Covering designs: a few rows in which every two levels of two factors meet (AETG: Cohen et al. 1997, IEEE TSE 23(7)).

Each row is the best of a few candidates; a candidate starts at a pair that no row holds yet, and takes for each other
factor the level that adds most such pairs. What is asked for first (`fixed` rows) counts. All is decided by the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Row = dict[str, str]  # the level of each factor
Excluded = Callable[[tuple[str, str], tuple[str, str]], str]  # why two levels can't meet, "" if they can
TRIES = 6


@dataclass
class Design:
    """Rows, how many pairs of levels they hold of all that can meet, and why others can't: {reason: pairs}."""

    rows: list[Row]
    pairs: int = 0
    covered: int = 0
    excluded: dict[str, int] = field(default_factory=dict)


def cover(
    factors: Mapping[str, Sequence[str]],
    excluded: Excluded = lambda a, b: "",
    seed: int = 0,
    fixed: Sequence[Row] = (),
    most: int = 1000,
    cheap: Sequence[str] = (),
) -> Design:
    """At most `most` rows that cover the pairs of levels, besides the fixed ones.

    Where all levels of a factor add as much, one is drawn; of those in `cheap`, the first one is taken.
    """
    chance, table = random.Random(seed), Table(factors, excluded)
    made = Design([], table.left(), excluded=table.reasons)
    for row in fixed:
        table.take([table.at[pair] for pair in row.items() if pair in table.at])
    while table.left() and len(made.rows) < most:
        tries = [table.candidate(chance, n == 0, cheap) for n in range(TRIES)]
        best = max(tries, key=table.gain)
        if not table.gain(best):  # no row can hold the pair it started from
            table.drop(best)
            continue
        table.take(best)
        made.rows.append({table.names[i][0]: table.names[i][1] for i in sorted(best)})
    made.pairs -= table.dropped
    made.covered = made.pairs - table.left()
    return made


class Table:
    """Which pairs of levels are still to be covered, as bits: `open[i]` has those of level `i`."""

    def __init__(self, factors: Mapping[str, Sequence[str]], excluded: Excluded) -> None:
        self.names = [(factor, level) for factor, levels in factors.items() for level in levels]
        self.at = {name: i for i, name in enumerate(self.names)}
        self.groups = [[self.at[factor, level] for level in levels] for factor, levels in factors.items()]
        self.open, self.barred = [0] * len(self.names), [0] * len(self.names)
        self.reasons: dict[str, int] = {}
        self.dropped = 0
        for i, first in enumerate(self.names):
            for j, second in enumerate(self.names[:i]):
                if first[0] == second[0]:
                    continue
                reason = excluded(second, first)
                bits = self.barred if reason else self.open
                bits[i] |= 1 << j
                bits[j] |= 1 << i
                if reason:
                    self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def left(self) -> int:
        return sum(bits.bit_count() for bits in self.open) // 2

    def candidate(self, chance: random.Random, first: bool, cheap: Sequence[str]) -> list[int]:
        """A row around an open pair: of the level with most of them if `first`, else of any."""
        some = [i for i, bits in enumerate(self.open) if bits]
        start = max(some, key=lambda i: self.open[i].bit_count()) if first else chance.choice(some)
        partners = [j for j in range(len(self.names)) if self.open[start] >> j & 1]
        row = [start, partners[0] if first else chance.choice(partners)]
        mask = 1 << row[0] | 1 << row[1]
        for group in chance.sample(self.groups, len(self.groups)):
            if any(i in group for i in row[:2]):
                continue
            free = [i for i in group if not self.barred[i] & mask]
            if not free:
                return row[:2]
            ties = 0.0 if self.names[group[0]][0] in cheap else 1.0
            chosen = max(free, key=lambda i: ((self.open[i] & mask).bit_count(), ties * chance.random()))
            row.append(chosen)
            mask |= 1 << chosen
        return row

    def gain(self, row: Sequence[int]) -> int:
        """Open pairs that a row holds; none if it is not whole."""
        mask = sum(1 << i for i in row)
        return sum((self.open[i] & mask).bit_count() for i in row) if len(row) == len(self.groups) else 0

    def take(self, row: Sequence[int]) -> None:
        mask = sum(1 << i for i in row)
        for i in row:
            self.open[i] &= ~mask

    def drop(self, row: Sequence[int]) -> None:
        """Gives up the pair that a row started from."""
        self.take(row[:2])
        self.dropped += 1
        reason = "no request holds both"
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
