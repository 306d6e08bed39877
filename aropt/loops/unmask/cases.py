"""Requests to loops that unmask: some boundaries, and pairs of levels of all factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from aropt.loops.given import RESERVED
from aropt.loops.requests.cases import Case, Requests, Value
from aropt.loops.requests.design import Row
from aropt.loops.requests.levels import (
    ENDS,
    LONG,
    MANY,
    PARAMETERS,
    SEED,
    STOP,
    STREAMS,
    TEXT,
    Levels,
    Range,
    drawing,
    first,
)
from aropt.loops.requests.prompts import prompt

SHORT, WHOLE = 5, 24  # rows of the design after a pass, and at the end: each round costs a forward of each sequence
SEQUENCES: dict[str, Range] = {"1": (1, 1), "2-3": (2, 3), "5": (5, 5), "9": (9, 9)}
LENGTHS: tuple[Range, ...] = ((1, 8), (9, 24), (25, LONG))
PADDING: dict[str, Range] = {"0": (0, 0), "1-4": (1, 4), "5-24": (5, 24)}
BLOCKS: dict[str, Range] = {"2": (2, 2), "1": (1, 1), "3-4": (3, 4)}
BLOCK: dict[str, Range] = {"4-8": (4, 8), "1": (1, 1), "2-3": (2, 3), "9-15": (9, 15), "16-32": (16, 32)}
FILL: dict[str, Range] = {"masks": (0, 0), "with gaps": (1, 1), "ends given": (2, 2)}
STEPS: dict[str, Range] = {  # of a block, or shares of its rows
    "half": (0.5, 0.5), "one": (1, 1), "each row": (0, 0), "2-3": (2, 3), "most": (0.7, 0.9), "more": (1.2, 1.5),
}  # fmt: skip


class Canvases(Requests):
    """Makes the cases of a program that unmasks."""

    short, most = SHORT, WHOLE

    def factors(self) -> Levels:
        self.mask, self.own = self.program.meta["mask"], int(self.program.meta.get("block") or 0)
        found = {
            "sequences": SEQUENCES,
            "length": self.lengths(),
            "padding": PADDING,
            "blocks": BLOCKS,
        }
        found |= {} if self.own else {"block": BLOCK}
        found |= {
            "fill": FILL,
            "text": TEXT,
            "stop": STOP,
            "temperature": PARAMETERS["temperature"],
            "seed": SEED,
            "streams": STREAMS,
        }
        found |= {"steps": STEPS} if "steps" in self.program.inputs else {}
        return {**found, **{name: self.around(name, value) for name, value in self.usual().items()}}

    def around(self, name: str, usual: float) -> dict[str, Range]:
        """A parameter's usual value, and ranges below and above its default; shares stay below 1."""
        given = self.program.inputs[name]
        default, most = float(given.default or 0), float("inf") if given.maximum is None else given.maximum
        above = (
            (default + 0.3 * (1 - default), default + 0.9 * (1 - default))
            if default < 1
            else (1.3 * default, 3 * default)
        )
        ranges: list[Range] = [(usual / 5, usual), (0.2 * default, 0.6 * default), above]
        if not given.spec.dtype.is_floating_point:
            ranges = [(int(usual), int(usual)), (1, 3), (4, 16)]
        ranges = [(low, min(high, most)) for low, high in ranges if low <= most]
        return {f"{low:.3g}" if low == high else f"{low:.2g}-{high:.2g}": (low, high) for low, high in ranges}

    def lengths(self) -> dict[str, Range]:
        """Lengths of prompts; those that leave room for little are a level of their own."""
        last = max(1, self.capacity - 8)
        found = {f"{low}-{min(high, last - 1)}": (low, min(high, last - 1)) for low, high in LENGTHS if low < last}
        return {**found, f"{last}-{max(last, self.capacity - 1)}": (last, max(last, self.capacity - 1))}

    def usual(self) -> dict[str, float]:
        """Values of the rule's parameters with which rounds differ."""
        vocab = self.program.meta["vocab"]
        known = {"threshold": 0.05, "guide_k": vocab // 2, "guide_share": 0.1, "guide_threshold": 0.5 / vocab}
        known |= {"guide_weight": 0.5, "guide_margin": 0.1}
        params = {n: i for n, i in self.program.inputs.items() if n not in {*RESERVED, "block", "steps", "temperature"}}
        return {
            n: known.get(n, float(i.default)) for n, i in params.items() if i.default is not None and not i.spec.dims
        }

    def excluded(self, one: tuple[str, str], other: tuple[str, str]) -> str:
        row = dict([one, other])
        low, high = ({name: self.levels[name][level][end] for name, level in row.items()} for end in (0, 1))
        if row.get("temperature") == "0" and any(n in drawing() and row[n] != first(self.levels, n) for n in row):
            return "greedy generation draws nothing"
        if high.get("sequences", 2) == 1 and low.get("padding", 0):
            return "a sequence alone has no padding"
        if high.get("length", self.capacity) <= low.get("padding", 0):
            return "a prompt is longer than its padding"
        least = low.get("blocks", 1) * (self.own or low.get("block", 1))
        if low.get("length", 1) + least > self.capacity:
            return "the capacity leaves no room"
        if low.get("length", 1) > LONG and low.get("sequences", 1) > 3:
            return "long prompts are kept to small batches, for time"
        if low.get("sequences", 1) >= MANY and (low.get("length", 1) > 24 or least > max(8, self.own)):
            return "large batches are kept short, for time"
        if low.get("blocks", 1) > (1 if low.get("block", 1) > 15 else 2) and low.get("block", 1) > 8:
            return "large blocks are kept to few, for time"
        return ""

    def varied(self) -> list[tuple[str, Row]]:
        return []

    def often(self) -> dict[str, float]:
        """The rule's usual parameters."""
        return self.params({n: first(self.levels, n) for n in self.levels}, max(2, self.own // 2) if self.own else 4)

    def boundaries(self) -> list[Case]:
        """One token, one block, ragged batches, what is given already, all up to the capacity, an end in a batch."""
        usual = self.often()
        third = max(1, min(9, self.capacity // 3))
        made = [
            self.request("one token", [1], 1, 8, {}), self.request("one block", [3], 8, 8, usual),
            self.request("ragged greedy", [third, 1, 2], 16, 8, usual),
            self.request("infilled", [third, 1], 5 * (self.own or 8), 4, {}, "with gaps"),
            self.request("sampled", [3], 16, 8, {"temperature": 1.0}),
            self.request("ragged sampled", [1, third], 16, 8, {"temperature": 0.8, **usual}),
            self.request("to capacity", [max(1, self.capacity - 8)], 8, 8, usual),
        ]  # fmt: skip
        return made + [ended(made[2]), ended(made[5])]

    def more_boundaries(self) -> list[Case]:
        """Blocks of all sizes, many rounds, an end."""
        large = {**self.often(), **({"steps": 12} if "steps" in self.program.inputs else {})}
        return [
            ended(self.request("one block again", [3], 8, 8, self.often())),
            self.request("one token a round", [2], 40, 8, {"temperature": 1.0}),
            self.request("blocks of two", [4, 2], 12, 2, {}),
            self.request("large blocks", [4], 32, 16, self.often()),
            self.request("one large block", [4], 32, 32, large),
        ]

    def params(self, row: Row, rounds: float) -> dict[str, float]:
        """The rule's parameters, of `rounds` a block."""
        found = {name: self.drawn(row, name) for name in self.usual()}
        return found | ({"steps": rounds} if "steps" in self.program.inputs and rounds else {})

    def request(
        self, name: str, lengths: Sequence[int], n: int, block: int, params: dict[str, float], fill: str = "masks"
    ) -> Case:
        """Random prompts of these lengths; `params["steps"]` counts rounds of a block."""
        room = max(1, min(n, self.capacity - max(lengths)))
        block = self.own or min(block, room)
        room = room if self.own else room - room % block
        params = {**params, **({} if self.own else {"block": block})}
        if params.get("steps") and not self.own:
            params["steps"] *= room // block
        kind = "ragged" if len(set(lengths)) > 1 else "sampled" if params.get("temperature") else "greedy"
        prompts = tuple(self.ids(length) for length in lengths)
        given: dict[str, Value] = {**params}
        filled = self.filled(room, block, fill)
        held = (filled,) * len(prompts) if filled else ()
        return Case(prompts, room, 0, tuple(given.items()), fill=held, name=name, kind=kind)

    def ids(self, length: int, text: int = 0) -> tuple[int, ...]:
        """A prompt without masks."""
        return prompt(self.program, length, text, self.chance)

    def filled(self, n: int, block: int, level: str) -> tuple[int, ...]:
        """What the answers hold: nothing; masks, a block and more, masks in between; its first and last id."""
        ids = self.ids(n)
        if level == "with gaps":
            return tuple(self.mask if i < block // 2 or (i >= 3 * block and i % 3) else ids[i] for i in range(n))
        if level == "ends given":
            return tuple(ids[i] if i in (0, n - 1) else self.mask for i in range(n))
        return ()

    def made(self, row: Row, n: int = 0) -> Case:
        count, pads, blocks = (int(self.drawn(row, name)) for name in ("sequences", "padding", "blocks"))
        block = self.own or int(self.drawn(row, "block"))
        length = max(int(self.drawn(row, "length")), pads + 1)
        length = max(1, min(length, self.capacity - block * blocks))
        lengths = self.shape(count, length, pads)
        text = int(self.drawn(row, "text"))
        share = self.drawn(row, "steps") if "steps" in row else 0
        params = self.params(row, share if isinstance(share, int) else max(1, round(share * block)))
        if row["temperature"] != "0":
            params["temperature"] = self.drawn(row, "temperature")
        made = self.request("", lengths, block * blocks, block, params, row["fill"])
        told = "".join(f", {n} {v:.3g}" for n, v in made.params if isinstance(v, float | int))
        stop = ENDS[int(self.drawn(row, "stop"))]
        return replace(
            made, name=f"{count} of {length}, {made.n} new, {row['fill']}{told}" + (f", stop {stop}" if stop else ""),
            kind="stop" if stop else made.kind, prompts=tuple(self.ids(size, text) for size in lengths), ends=stop,
            seed=int(self.drawn(row, "seed")),
            streams=self.streams(row["streams"], count),
        )  # fmt: skip


def ended(case: Case) -> Case:
    """The case with a stop id that some of its answers hold."""
    return replace(case, name=f"{case.name}, stop token", kind="stop", ends="met by some")
