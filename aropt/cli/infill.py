"""Texts of the command line that are not prompts: answers with blanks in them, and what ends a sequence."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.loops.scheme import scheme_of

BLANK = re.compile(r"\[MASK(?:\*(\d{1,6}))?\]")
Encode = Callable[[str], list[int]]


def answers(texts: Sequence[str], n: int | None, program: Program, encode: Encode) -> list[list[int]]:
    """Ids of answers, the mask id for each [MASK], so many for [MASK*8]; with `n` masks follow up to that length.

    Raises UsageError for a program without a canvas, and for an answer without a blank.
    """
    if not scheme_of(program).fills:
        raise UsageError(
            what="the program has no canvas to fill",
            where="--fill",
            why="it generates one token after the other",
            hint="leave it out, or optimize a model that unmasks",
        )
    mask, found = program.meta["mask"], []
    for text in texts:
        ids, at = list[int](), 0
        for blank in BLANK.finditer(text):
            ids += [*encode(text[at : blank.start()]), *[mask] * int(blank[1] or 1)]
            at = blank.end()
        ids += encode(text[at:])
        ids += [mask] * max(0, (n or 0) - len(ids))
        if mask not in ids:
            raise UsageError(
                what=f"nothing is to be found in '{text[:40]}'",
                where="--fill",
                why="an answer says where ids are missing",
                hint="write [MASK] for one id, [MASK*8] for eight: --fill 'the [MASK*3] sat'",
            )
        found.append(ids)
    return found


def stops(texts: Sequence[str], encode: Encode) -> list[int]:
    """Ids that end a sequence, from ids and from texts of one id; an empty one is none.

    Raises UsageError for a text of several.
    """
    found = []
    for text in filter(None, texts):
        ids = [int(text)] if re.fullmatch(r"-?\d+", text.strip()) else encode(text)
        if len(ids) != 1:
            raise UsageError(
                what=f"{text!r:.40} is {len(ids)} tokens",
                where="--stop",
                why="a sequence ends at one token",
                hint="give a text that is one token, or an id; repeat --stop for several",
            )
        found += ids
    return found
