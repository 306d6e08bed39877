"""The rounds of a loop over one graph: what they emit, and two sets of buffers that take turns."""

from __future__ import annotations

from typing import Any

import torch

from aropt.ir.control import Call, Loop
from aropt.ir.executor import Values
from aropt.ir.interpreter import endless
from aropt.targets.ort.session import Session


class Emitted:
    """What the rounds of a loop emit. With several rounds a call: `left` until the limit, `spare` after it."""

    def __init__(self, control: Loop, call: Call, left: int, spare: int, most: int) -> None:
        self.targets = list(control.emits.values())
        self.names = [o for name in control.emits for o, value in call.writes.items() if value == name]
        self.rows: list[list[Any]] = []
        self.left, self.spare = left, spare
        self.control, self.most = control, most

    def rows_of(self, outputs: Values, count: int) -> list[list[Any]]:
        """The arrays that each of a call's rounds writes."""
        marks = [*(f"@{number}" for number in range(count - 1)), ""]
        return [[outputs[name + mark].numpy() for name in self.names] for mark in marks]

    def fit(self, count: int) -> bool:
        """Whether so many rounds may run: they are left, or the caches have slots for those that are too many."""
        return count == 1 or self.left + self.spare >= count

    def keep(self, rows: list[list[Any]]) -> None:
        """Of several rounds not those after the limit, nor those after the end, when every sequence emits -1."""
        if len(rows) > 1:
            rows, self.left = rows[: self.left], self.left - len(rows)
            while len(rows) > 1 and all((array < 0).all() for array in rows[-1]):
                rows = rows[:-1]
        self.rows.extend([array.copy() for array in arrays] for arrays in rows)
        if len(self.rows) > self.most:
            raise endless(self.control, self.most)

    def stacked(self) -> Values:
        import numpy as np

        columns = zip(*self.rows, strict=True)
        return {t: torch.from_numpy(np.stack(rows, 1)) for t, rows in zip(self.targets, columns, strict=True)}


def take_turns(session: Session, call: Call, control: Loop, reads: Values, values: Values, emitted: Emitted) -> bool:
    """Calls after one that left its results in `values` and what the next one reads in `reads`.

    Until done, which is returned, or until fewer rounds are left than the session runs.
    """
    key = tuple(t.data_ptr() for t in reads.values())
    if key not in session.turns:
        session.turns[key] = two_sides(session, call, control, reads, values, emitted)
    run, sides, turn, done = session.session.run_with_iobinding, session.turns[key], 0, False
    named: Values = {}
    while not done and emitted.fit(session.rounds):
        binding, named, finished, rows, _ = sides[turn]
        run(binding)
        emitted.keep(rows)
        done, turn = bool(finished), turn ^ 1
    values.update(named)
    return done


def two_sides(
    session: Session, call: Call, control: Loop, reads: Values, values: Values, emitted: Emitted
) -> list[Any]:
    """A call from the results in `values` to other buffers, and one back: (binding, results, until, emitted) each."""
    first = {o: values[value] for o, value in call.writes.items()}
    there, second, _ = session.bind(reads)
    readers = {value: name for name, value in call.reads.items()}
    fed = {readers[value]: second[o] for o, value in call.writes.items() if value in readers}
    back, third, _ = session.bind(reads | fed, first)
    sides = []
    for binding, outputs in ((there, second), (back, third)):
        named = {value: outputs[o] for o, value in call.writes.items()}
        rows = emitted.rows_of(outputs, session.rounds)
        sides.append((binding, named, named[control.until].numpy(), rows, reads))  # the last, to stay alive
    return sides
