"""Prompts of requests: random ids, phrases that repeat (n-gram drafts then hit), one id over and over."""

from __future__ import annotations

import random
from collections.abc import Sequence

from aropt.ir.program import Program
from aropt.ir.units import window
from aropt.loops.scheme import scheme_of

PHRASE = (3, 5)  # rows of what repeats


def prompt(program: Program, rows: int, text: int, chance: random.Random) -> tuple[int, ...]:
    """Ids that fill so many rows; `text`: 0 random, 1 repeating, 2 one id."""
    distinct = {0: rows, 1: min(rows, chance.randint(*PHRASE)), 2: 1}[text]
    phrase = [row(program, chance) for _ in range(distinct)]
    return tuple(token for i in range(rows) for token in phrase[i % distinct])


def like(program: Program, ids: tuple[int, ...], chance: random.Random) -> tuple[int, ...]:
    """Other ids in as many rows of the same sizes."""
    if not window(program.meta):
        return prompt(program, len(ids), 0, chance)
    single = int(program.meta.get("single", vocabulary(program)))
    return tuple(chance.randrange(single) if t < single else chance.randrange(single, vocabulary(program)) for t in ids)


def row(program: Program, chance: random.Random) -> list[int]:
    """The ids of a row: one, or of windows a whole one or an id that stands alone."""
    if not window(program.meta):
        return [chance.choice(allowed(program))]
    first, single = chance.randrange(vocabulary(program)), int(program.meta.get("single", vocabulary(program)))
    size = 1 if first >= single else window(program.meta)[0]
    return [first, *(chance.randrange(single) for _ in range(size - 1))]


def allowed(program: Program) -> Sequence[int]:
    """Ids that a prompt may hold: no mask, none without which the forward counts its rows."""
    without = {*program.meta.get("never", ()), *scheme_of(program).hidden(program.meta)}
    every = range(vocabulary(program))
    return [t for t in every if t not in without] if without else every


def vocabulary(program: Program) -> int:
    """How many ids the model reads."""
    return int(program.meta.get("input_vocab", program.meta["vocab"]))
