"""Requests on which programs are compared: the type, and those for loops over positions."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import Any

import torch

from aropt.frontend.generation_config import SUPPRESSED
from aropt.ir.executor import Values
from aropt.ir.program import Program
from aropt.ir.units import ids_of, rows_for
from aropt.loops.request import Ids, Request
from aropt.loops.requests.design import Row, cover
from aropt.loops.requests.levels import CHEAP, ENDS, LONG, LONGEST, PARAMETERS, Levels, excluded, first, levels, varied
from aropt.loops.requests.prompts import like, prompt
from aropt.loops.runtime import batches, make_inputs
from aropt.loops.scheme import scheme_of

PATTERN = (2.0, -2.0, 1.0)  # repeated over the vocabulary: a bias
aten = torch.ops.aten
HELD_AGAINST = {
    aten.sub.Tensor, aten.add.Tensor, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
}  # fmt: skip
LIKELY = 6.0  # a bias that makes an id 400 times as likely: picked often, but not always
EDGES = (32, 63, 64, 65)  # lengths about which code changes course: caches have 64 slots more, tiles have 32 rows
MORE, ALONE = 60, 9  # new ids of long answers, and of those that vary one parameter
DESIGNS = 4  # of a thorough validation, each with other rows
FORBIDDEN = 64  # ids that are suppressed at once, at most
SHORT = 4  # rows of the design that are enough after a pass
Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Case(Request):
    """A request to compare programs on."""

    name: str = ""
    kind: str = "greedy"  # greedy | sampled | ragged | boundary | stop
    ends: str = ""  # how stop ids are met, where these are yet to be found (see aropt.validate.stops)

    def repro(self, name: str) -> str:
        """A line of Python that runs the case."""
        values = {k: listed(v) if k == "bias" and isinstance(v, tuple) else repr(v) for k, v in self.params}
        for key in ("negative", "streams", "fill"):
            if given := getattr(self, key):
                values[key] = str([t if isinstance(t, int) else list(t) for t in given])
        params = "".join(f", {k}={v}" for k, v in values.items())
        prompts = [list(p) for p in self.prompts]
        return (
            f"aropt.generate({name}, {prompts}, {self.n}, seed={self.seed}, stop={list(self.stop)}{params}, plain=True)"
        )

    def groups(self, program: Program) -> list[list[int]]:
        """Which prompts run as one batch, as in `runtime.answer`."""
        return batches(program, self.prompts)

    def inputs(self, program: Program, group: Sequence[int]) -> Values:
        """The program's inputs for these prompts."""
        return make_inputs(program, self.part(group))


def listed(bias: tuple[float, ...]) -> str:
    """A bias as Python, short for the two kinds that requests have."""
    if bias == (PATTERN * len(bias))[: len(bias)]:
        return f"({list(PATTERN)} * {len(bias)})[:{len(bias)}]"
    given = ", ".join(f"{i}: " + (f"{v}" if isfinite(v) else f"float('{v}')") for i, v in enumerate(bias) if v)
    return f"[{{{given}}}.get(i, 0.0) for i in range({len(bias)})]"


def cases(program: Program, seed: int = 0, quick: bool = False) -> list[Case]:
    """What a program is compared on: boundaries, each parameter's levels alone, and pairs of levels of all factors.

    `quick`: those that are enough after a pass.
    """
    return named(requests(program, seed).everything(quick))


def named(found: Sequence[Case]) -> list[Case]:
    """The cases with their numbers, so that no two have one name."""
    return [replace(case, name=f"{i}: {case.name}") for i, case in enumerate(found)]


def requests(program: Program, seed: int = 0, thorough: bool = False) -> Requests:
    """What a program is compared on, and the design behind it; `thorough`: several designs, each of all pairs."""
    made: Requests = (scheme_of(program).requests or Requests)(program, seed, thorough)
    return made


class Requests:
    """Makes the cases of one program."""

    short, most = SHORT, 1000  # rows of the design after a pass, and at the end

    def __init__(
        self, program: Program, seed: int, thorough: bool = False, only: Mapping[str, Sequence[str]] = {}
    ) -> None:
        self.program, self.seed, self.chance = program, seed, random.Random(seed)
        self.thorough = thorough
        self.capacity = min(program.meta["capacity"], LONGEST)
        self.levels = {n: {k: r for k, r in v.items() if k in only.get(n, v)} for n, v in self.factors().items()}
        self.used: dict[tuple[str, str], int] = {}
        self.one: Requests | None = None
        self.always: list[Case] = []
        self.last: list[Case] = []
        self.cheap = (*CHEAP, "length") if self.capacity > LONG else CHEAP
        varied = [] if only else self.varied()
        rows, found = [row for _, row in varied], {n: list(v) for n, v in self.levels.items()}
        self.design = cover(found, self.excluded, seed, rows, 1000 if thorough else self.most, self.cheap)
        for more in range(1, DESIGNS if thorough else 1):
            self.design.rows += cover(found, self.excluded, seed + more, cheap=self.cheap).rows
        self.single = [self.made(row, ALONE if row["new"] == first(self.levels, "new") else 0) for row in rows]
        self.singled = [name for name, _ in varied]  # the parameter that each of these varies
        self.pairs = [self.made(row) for row in self.design.rows]

    def factors(self) -> Levels:
        return levels(self.program)

    def varied(self) -> list[tuple[str, Row]]:
        """Each level of a parameter that changes what is picked, by itself."""
        return varied(self.levels)

    def excluded(self, one: tuple[str, str], other: tuple[str, str]) -> str:
        return excluded(self.levels, self.capacity, one, other)

    def places(self, factors: Iterable[str]) -> list[list[int]]:
        """Where `single` has the levels of each of these factors."""
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.singled):
            found.setdefault(name, []).append(i)
        return [places for name, places in found.items() if name in factors]

    def coverage(self) -> dict[str, Any]:
        """What the requests cover: {factor: levels}, pairs of levels, why some of these can't meet."""
        return {
            "factors": {name: list(ranges) for name, ranges in self.levels.items()},
            "requests": len(self.single) + len(self.pairs),
            "pairs": self.design.pairs, "covered": self.design.covered, "excluded": dict(self.design.excluded),
            "seed": self.seed,
        }  # fmt: skip

    def everything(self, quick: bool) -> list[Case]:
        return [*self.bounds(quick), *self.single, *self.pairs[: self.short if quick else None]]

    def alone(self) -> Requests:
        """The requests for one sequence."""
        if self.one is None:
            self.one = type(self)(self.program, self.seed + 1, self.thorough, {"sequences": ("1",), "padding": ("0",)})
        return self.one

    def bounds(self, quick: bool) -> list[Case]:
        """Boundaries; `quick`: those that come after each pass, always the same, as the reference has answered them."""
        self.always = self.always or self.boundaries()
        if quick:
            return self.always
        self.last = self.last or self.more_boundaries()
        return [*self.always, *self.last]

    def boundaries(self) -> list[Case]:
        """One token, none, prompts as long as the capacity, an interval without rounds."""
        found = [self.case("one token", [1], 6), self.case("no tokens", [min(2, self.capacity)], 0)]
        found += [self.case(f"prompt of {n}", [n], 3) for n in (self.capacity - 1, self.capacity) if n > 1]
        if "guidance_to" in self.program.inputs:
            empty: Params = (("guidance", 3.0), ("guidance_from", 3), ("guidance_to", 3))
            found.append(self.case("an empty interval", [2], 5, empty))
        return found

    def more_boundaries(self) -> list[Case]:
        """Prompts as long as a block of the cache, or as what the forward compares positions with; long answers."""
        ends = sorted(n for n in {*EDGES, *self.named_lengths()} if n < self.capacity - 1)
        prompts = [self.case(f"prompts up to {n}", [n, max(1, n - 3), (n + 1) // 2], 3) for n in ends]
        crowd = [1 + (5 * i) % min(7, self.capacity) for i in range(17)]
        many = self.case("17 sequences", crowd, 4, (("temperature", 1.5),))
        return [*prompts, many, *self.long(1), self.case("to capacity", [max(1, self.capacity - 100)], 101)]

    def named_lengths(self) -> list[int]:
        """A few numbers that positions are held against, such as the length of an attention's window."""
        nodes = [n for g in self.program.graphs.values() for n in g.fx.nodes if n.target in HELD_AGAINST]
        found = {abs(a) for n in nodes for a in n.args if type(a) is int}
        return sorted(n for n in found if 2 < n < self.capacity)[:4]

    def long(self, more: int = 0) -> list[Case]:
        """Long answers, greedy and drawn (for `more` sequences too), whole and with a stop id that comes up late."""
        third = max(1, self.capacity // 3)
        marks: Params = (("repetition_penalty", 1.3),) if "repetition_penalty" in self.program.inputs else ()
        many = self.case("many", [min(16, third)], MORE, marks)
        drawn = self.case("many, sampled", [min(40, third), *[1] * more], MORE, (("temperature", 1.5), *marks))
        return [
            many,
            drawn,
            *(replace(c, name=f"{c.name}, stop late", kind="stop", ends="late") for c in (many, drawn)),
        ]

    def case(self, name: str, lengths: Sequence[int], n: int, params: Params = ()) -> Case:
        """Random prompts of these lengths."""
        prompts = tuple(prompt(self.program, length, 0, self.chance) for length in lengths)
        others = self.others(prompts)
        return Case(prompts, self.fits(max(lengths), n), 0, params, negative=others, name=name, kind="boundary")

    def fits(self, length: int, n: int) -> int:
        """As many new ids of `n` as the capacity leaves room for after a prompt of so many rows."""
        return max(0, min(n, ids_of(self.program.meta, self.capacity - length + 1)))

    def others(self, prompts: Ids, given: bool = False) -> Ids:
        """Unconditional prompts, where the program needs them or they are to be `given`."""
        if "negative" in self.program.inputs and (given or self.program.meta.get("null") is None):
            return tuple(like(self.program, p, self.chance) for p in prompts)
        return ()

    def drawn(self, row: Row, name: str) -> float:
        """A value of a factor's level: its lower end, then its upper one, then any between."""
        low, high = self.levels[name][row[name]]
        turn = self.used[name, row[name]] = self.used.get((name, row[name]), -1) + 1
        if turn < 2 or low == high:
            return high if turn % 2 else low
        return self.chance.randint(int(low), int(high)) if isinstance(low, int) else self.chance.uniform(low, high)

    def shape(self, count: int, length: int, pads: int) -> list[int]:
        """Lengths of so many prompts: the longest, the one with most padding, any between."""
        shortest = max(1, length - pads)
        return [length, shortest, *(self.chance.randint(shortest, length) for _ in range(count))][:count]

    def streams(self, level: str, count: int) -> tuple[int, ...]:
        """Numbers of streams of noise; none where they count up."""
        low, high = (int(end) for end in self.levels["streams"][level])
        if low == high:
            return (low,) * count if high else ()
        return tuple(self.chance.sample(range(low, high + 1), count))

    def made(self, row: Row, n: int = 0) -> Case:
        """The request that a row of the design stands for; with `n` new ids, if that is given."""
        count, new, pads = (int(self.drawn(row, name)) for name in ("sequences", "new", "padding"))
        n = n or new
        room = self.capacity + 1 - rows_for(self.program.meta, n)
        length = max(1, min(max(int(self.drawn(row, "length")), pads + 1), room))
        lengths = self.shape(count, length, pads)
        text = int(self.drawn(row, "text"))
        prompts = tuple(prompt(self.program, size, text, self.chance) for size in lengths)
        params = {name: self.drawn(row, name) for name in PARAMETERS if name in row}
        kind = "ragged" if pads else "sampled" if params["temperature"] else "greedy"
        ends = ENDS[int(self.drawn(row, "stop"))]
        kind = "stop" if ends else kind
        given = tuple((n, v) for n, v in self.values(params).items() if v != self.program.inputs[n].default)
        told = "".join(f", {n} {f'{v:.3g}' if isinstance(v, float) else 'given'}" for n, v in given)
        name = f"{count} of {length}, {n} new{told}" + (f", stop {ends}" if ends else "")
        return Case(
            prompts, self.fits(length, n), int(self.drawn(row, "seed")), given,
            streams=self.streams(row["streams"], count),
            negative=self.others(prompts, row.get("negative") == "given"), name=name, kind=kind, ends=ends,
        )  # fmt: skip

    def values(self, params: dict[str, float]) -> dict[str, Value]:
        """Parameters as the program takes them."""
        found: dict[str, Value] = {}
        vocab = self.program.meta["vocab"]
        for name, value in params.items():
            integer = not self.program.inputs[name].spec.dtype.is_floating_point
            found[name] = int(min(value, vocab) if name == "top_k" else value) if integer else float(value)
        if "bias" in found:
            found["bias"] = bias(int(params["bias"]), vocab)
        for start, name in enumerate(SUPPRESSED):  # ids that differ, so that some are left
            if name in found:
                found[name] = tuple(range(start, vocab, max(3, vocab // FORBIDDEN))) if found[name] else -1
        return found


def bias(kind: int, vocab: int) -> Value:
    """0: no bias; 1, 2: one on all ids, on the later half; 3, 4: on the two at the ends, one forbidden, one likely."""
    if kind == 0:
        return 0.0
    if kind < 3:
        none = vocab // 2 if kind == 2 else 0
        return (*[0.0] * none, *PATTERN * vocab)[:vocab]
    ends = (-inf, LIKELY) if kind == 3 else (LIKELY, -inf)
    return (ends[0], *[0.0] * (vocab - 2), ends[1])


Params = tuple[tuple[str, Value], ...]
