"""What requests to a loop over positions vary in: factors, and the ranges that count as their levels.

A level is named as it is reported; the first of each factor is the usual one. Ranges are of ints or floats, ends
included, and what is drawn from one begins with its ends, where faults are most likely.
"""

from __future__ import annotations

from aropt.ir.program import Program
from aropt.ir.units import window
from aropt.loops.requests.design import Row
from aropt.loops.rules import PROCESSORS

Range = tuple[float, float]
Levels = dict[str, dict[str, Range]]
LONGEST = 2048  # rows of a prompt; more would take minutes
LONG = 200  # rows from which on a batch is kept small
SEQUENCES: dict[str, Range] = {"1": (1, 1), "2-3": (2, 3), "4-5": (4, 5), "9": (9, 9)}
MANY = 9  # sequences that make a batch a large one
LENGTHS: tuple[Range, ...] = ((1, 8), (9, 16), (17, 65), (66, LONG))
PADDING: dict[str, Range] = {"0": (0, 0), "1-4": (1, 4), "5-8": (5, 8), "9-60": (9, 60)}
NEW: dict[str, Range] = {"3-8": (3, 8), "1": (1, 1), "9-15": (9, 15)}
TEXT: dict[str, Range] = {"random": (0, 0), "repeating": (1, 1), "one id": (2, 2)}
STOP: dict[str, Range] = {
    "none": (0, 0), "met by some": (1, 1), "late or at once": (2, 3), "by all but the last": (4, 4),
}  # fmt: skip
ENDS = ("", "met by some", "late", "at once", "by all but the last")  # by these numbers
SEED: dict[str, Range] = {"0-99": (0, 99), "31-33 bits": (2**31, 2**33), "40-62 bits": (2**40, 2**62 - 1)}
STREAMS: dict[str, Range] = {
    "in order": (0, 0), "hundreds": (100, 9999), "31-40 bits": (2**31, 2**40), "equal": (7, 7),
}  # fmt: skip
NEGATIVE: dict[str, Range] = {"null class": (0, 0), "given": (1, 1)}
PARAMETERS: dict[str, dict[str, Range]] = {
    "temperature": {"0": (0, 0), "1": (1, 1), "1.5-2.5": (1.5, 2.5), "0.1-0.7": (0.1, 0.7), "4-8": (4.0, 8.0)},
    "top_k": {"off": (0, 0), "1-3": (1, 3), "4-16": (4, 16), "most": (0, 0)},  # of the vocabulary, in `levels`
    "top_p": {"off": (1, 1), "0-0.1": (0.0, 0.1), "0.2-0.9": (0.2, 0.9), "0.93-0.99": (0.93, 0.99)},
    "min_p": {"off": (0, 0), "0.01-0.1": (0.01, 0.1), "0.2-0.9": (0.2, 0.9)},
    "repetition_penalty": {"off": (1, 1), "1.02-1.1": (1.02, 1.1), "1.3-5": (1.3, 5.0), "0.1-0.7": (0.1, 0.7)},
    "bias": {"off": (0, 0), "pattern": (1, 2), "two ids": (3, 4)},  # see `aropt.cases.bias`
    "suppress_tokens": {"none": (0, 0), "a third": (1, 1)},
    "begin_suppress_tokens": {"none": (0, 0), "a third": (1, 1)},
    "min_new_tokens": {"off": (0, 0), "1-4": (1, 4)},
    "guidance": {"off": (1, 1), "1.05-1.6": (1.05, 1.6), "2-9": (2.0, 9.0)},
    "guidance_from": {"0": (0, 0), "1-2": (1, 2), "7-12": (7, 12)},
    "guidance_to": {"always": (2**62, 2**62), "2-4": (2, 4), "12-15": (12, 15)},
}
CHEAP = ("sequences", "padding", "new", "blocks", "block", "stop", "steps")  # where nothing is gained: the usual
# What changes little is drawn at a low temperature, which magnifies it; what cuts off unlikely tokens at a high one.
HOT, SLIGHT, EVEN = ({"temperature": level} for level in ("1.5-2.5", "0.1-0.7", "4-8"))
GUIDED = {"guidance": "2-9", "new": "9-15"}
BESIDE: dict[tuple[str, str], Row] = {
    ("repetition_penalty", "1.02-1.1"): SLIGHT, ("guidance", "1.05-1.6"): SLIGHT,
    ("top_k", "4-16"): EVEN, ("top_k", "most"): EVEN, ("top_p", "0-0.1"): EVEN,
    ("bias", "two ids"): EVEN,
    ("guidance_from", "1-2"): GUIDED, ("guidance_from", "7-12"): GUIDED,
    ("guidance_to", "2-4"): GUIDED, ("guidance_to", "12-15"): GUIDED,
}  # fmt: skip


def levels(program: Program) -> Levels:
    """The factors of a program and their levels."""
    capacity, vocab = min(program.meta["capacity"], LONGEST), program.meta["vocab"]
    found = {
        "sequences": SEQUENCES, "length": lengths(capacity), "padding": PADDING, "new": NEW, "text": TEXT,
        "stop": STOP, "seed": SEED, "streams": STREAMS,
    }  # fmt: skip
    if "negative" in program.inputs and program.meta.get("null") is not None and not window(program.meta):
        found["negative"] = NEGATIVE
    for name, ranges in PARAMETERS.items():
        if name in program.inputs and not (name == "guidance" and program.meta.get("guidance_free")):
            found[name] = {k: r for k, r in ranges.items() if name != "top_k" or r[0] <= vocab}
            if name == "top_k":  # nearly all and all ids are kept, where a limit below the vocabulary would show
                found[name]["most"] = (vocab // 2, vocab)
    return found


def lengths(capacity: int) -> dict[str, Range]:
    """Lengths of prompts up to the capacity; its last rows are a level of their own."""
    last = max(1, capacity - 3)
    found = {f"{low}-{min(high, last - 1)}": (low, min(high, last - 1)) for low, high in LENGTHS if low < last}
    return {**found, f"{last}-{capacity}": (last, capacity)}


def drawing() -> set[str]:
    """Factors that only matter where ids are drawn."""
    return {n for p in PROCESSORS.values() if p.draws for n in p.params if n != "temperature"} | {"seed", "streams"}


def excluded(found: Levels, capacity: int, one: tuple[str, str], other: tuple[str, str]) -> str:
    """Why two levels can't meet in a request, "" if they can."""
    row = dict([one, other])
    low, high = ({name: found[name][level][end] for name, level in row.items()} for end in (0, 1))
    if row.get("temperature") == "0" and any(n in drawing() and row[n] != first(found, n) for n in row):
        return "greedy generation draws nothing"
    if high.get("sequences", 2) == 1 and low.get("padding", 0):
        return "a sequence alone has no padding"
    if high.get("length", capacity) <= low.get("padding", 0):
        return "a prompt is longer than its padding"
    if low.get("length", 1) + low.get("new", 1) - 1 > capacity:
        return "the capacity leaves no room"
    if low.get("length", 1) > LONG and low.get("sequences", 1) > 3:
        return "long prompts are kept to small batches, for time"
    if low.get("length", 1) > LONG and low.get("stop", 0) > 1:
        return "long prompts meet a few kinds of stops, for time"
    lengths, padded = low.get("length", 1) > LENGTHS[1][1], low.get("padding", 0) > PADDING["5-8"][1]
    if low.get("sequences", 1) >= MANY and (lengths or padded or low.get("new", 1) > NEW["3-8"][1]):
        return "large batches are kept short, for time"
    if high.get("new", 2) == 1 and low.get("stop", 0):
        return "one token ends anyway"
    return ""


def first(found: Levels, name: str) -> str:
    """A factor's usual level."""
    return next(iter(found[name]))


def varied(found: Levels) -> list[tuple[str, Row]]:
    """Each level of a parameter that changes what is picked, by itself, in several sequences: its name, and the row."""
    usual = {name: first(found, name) for name in found}
    length = list(found["length"])[min(1, len(found["length"]) - 1)]
    rows = []
    shape = {"sequences": "4-5", "length": length, "padding": "1-4"}
    for name in [n for n in PARAMETERS if n in found and n != "temperature"]:
        others = list(found[name])[1:]
        for level in [*others, *(n for n in others if len({*found[name][n]}) == 2)]:  # each at both ends
            rows.append((name, {**usual, **shape, **HOT, **BESIDE.get((name, level), {}), name: level}))
    return rows
