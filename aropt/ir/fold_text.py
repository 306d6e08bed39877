"""Folding of text: a block of lines that repeats in a row, such as a model's layers, is printed once.

Blocks are the same if they differ only in node ids, in numbers within names, and in values handed from one to the next;
what differs is named in the line above the block. Anything else stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

WORTH = 4  # lines that a fold must save
TOKEN = re.compile(r"%(\d+)\b|(?<=[%@])[A-Za-z_][\w.]*|(?<= )[A-Za-z_]\w*(?=: | = )")  # ids and names


@dataclass(frozen=True)
class Line:
    """A line with ids and the numbers in names taken out (`shape`)."""

    shape: str
    ids: tuple[int, ...]
    indices: tuple[tuple[str, int], ...]  # (name up to the number, number)
    defines: int | None


def parse(line: str) -> Line:
    ids: list[int] = []
    indices: list[tuple[str, int]] = []

    def replace(found: re.Match[str]) -> str:
        if found[1]:
            ids.append(int(found[1]))
            return "%#"
        sigil = line[found.start() - 1].strip()
        indices.extend((sigil + found[0][: n.start()], int(n[0])) for n in re.finditer(r"\d+", found[0]))
        return re.sub(r"\d+", "#", found[0])

    shape = TOKEN.sub(replace, line)
    return Line(shape, tuple(ids), tuple(indices), ids[0] if shape.lstrip().startswith("%#:") else None)


def folded(lines: Iterable[str]) -> list[str]:
    """The lines, with blocks that repeat in a row printed once."""
    found = list(lines)
    parsed = [parse(line) for line in found]
    result: list[str] = []
    i = 0
    while i < len(found):
        period, count = best_fold(parsed, i)
        if count > 1:
            margin = " " * (len(found[i]) - len(found[i].lstrip()))
            varies = variation(blocks(parsed, i, period, count)) or []
            result.append(f"{margin}x {count} ({', '.join(varies)})")
        result.extend(("  " if count > 1 else "") + line for line in found[i : i + period])
        i += period * count
    return result


def blocks(lines: list[Line], start: int, period: int, count: int) -> list[list[Line]]:
    return [lines[start + period * k : start + period * (k + 1)] for k in range(count)]


def best_fold(lines: list[Line], start: int) -> tuple[int, int]:
    """(period, count) of the repetition from here that saves most lines; (1, 1) if none is worth it."""
    best = (1, 1)
    for period in range(1, (len(lines) - start) // 2 + 1):
        if lines[start].shape != lines[start + period].shape:
            continue
        count = 1
        while start + period * (count + 1) <= len(lines) and repeats(lines, start, period, count):
            count += 1
        saved = period * (count - 1)
        if saved >= WORTH and saved > best[0] * (best[1] - 1):
            best = (period, count)
    return best


def repeats(lines: list[Line], start: int, period: int, count: int) -> bool:
    """Whether the block repeats once more after `count` times."""
    last = start + period * count
    if any(lines[start + i].shape != lines[last + i].shape for i in range(period)):
        return False
    return variation(blocks(lines, start, period, count + 1)) is not None


def variation(rounds: list[list[Line]]) -> list[str] | None:
    """What varies over repetitions: indices, and values handed from one to the next. None if anything else does."""
    local = [{line.defines: i for i, line in enumerate(block) if line.defines is not None} for block in rounds]
    outer: dict[int, int] = {}  # a value from outside -> what stands in its place in the second round
    notes: dict[str, None] = {}
    steps: set[int] = set()  # of indices; one for all
    for row in zip(*rounds):
        for numbers in zip(*(line.indices for line in row)):
            values = [n for _, n in numbers]
            step = stride(values)
            if step is None or step < 0 or (step and steps and step not in steps):
                return None
            notes |= span(numbers[0][0], values)
            steps |= {step} if step else set()
        for uses in zip(*(line.ids for line in row)):
            places = [names.get(use) for names, use in zip(local, uses)]
            if places[0] is not None:
                if len(set(places)) > 1:
                    return None
                continue
            if outer.setdefault(uses[0], uses[1]) != uses[1]:
                return None
            handed = {names.get(use) for names, use in zip(local, uses[1:])}  # where the round before defines it
            if len(set(uses)) == 1:
                continue
            if len(handed) == 1 and None not in handed:
                notes[f"%{uses[0]} then %{uses[1]}"] = None
            elif stride(uses) is not None and not local[0] and steps == {1}:  # what layers that were folded return
                notes |= span("%", uses)
            else:
                return None
    return ([f"ids +{len(local[0])}"] if local[0] else []) + list(notes)


def stride(values: Sequence[int]) -> int | None:
    """The step between neighbours if it is always the same."""
    steps = {b - a for a, b in pairwise(values)}
    return steps.pop() if len(steps) == 1 else None


def span(prefix: str, values: Sequence[int]) -> dict[str, None]:
    """A note that these values follow each other; none if they are all the same."""
    step = values[1] - values[0]
    by = "" if step == 1 else f" by {step}"
    return {f"{prefix}{values[0]}..{values[-1]}{by}": None} if step else {}
