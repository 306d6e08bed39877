"""Requests on which programs are compared: the type, and those for loops over positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from aropt.excluded import others
from aropt.interpreter import Values
from aropt.program import Program
from aropt.runtime import batches, make_inputs
from aropt.units import ids_of, window

BLOCK = 64  # caches grow in blocks of so many slots
PATTERN = (2.0, -2.0, 1.0)  # repeated over the vocabulary: a bias
# Parameters that decide most draws, each in a case of its own: what goes wrong with one is then seen in few tokens.
# A repetition penalty far below 1 makes tokens win that were seen before, so that it shows which ones count as seen.
STRONG: tuple[tuple[str, float], ...] = (
    ("top_k", 2), ("top_p", 0.2), ("min_p", 0.5), ("guidance", 4.0), ("repetition_penalty", 5.0),
    ("repetition_penalty", 0.1), ("bias", 0.0),
)  # fmt: skip
Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """One generation to compare: prompts (several make a ragged batch), tokens, rule parameters."""

    name: str
    kind: str  # greedy | sampled | ragged | boundary | stop
    prompts: tuple[tuple[int, ...], ...]
    n: int
    seed: int = 0
    params: tuple[tuple[str, Value], ...] = ()
    stop: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()  # empty: 0, 1, ...
    negative: tuple[tuple[int, ...], ...] = ()  # empty: the program's null class
    fill: tuple[int, ...] = ()  # of a canvas: what the answers hold already, the same for all

    def repro(self, name: str) -> str:
        """A line of Python that runs the case."""
        prompts, negative = [list(p) for p in self.prompts], [list(p) for p in self.negative] or None
        values = {
            k: f"({list(PATTERN)} * {len(v)})[:{len(v)}]" if isinstance(v, tuple) else repr(v) for k, v in self.params
        }
        params = "".join(f", {k}={v}" for k, v in values.items()) + (f", negative={negative}" if negative else "")
        params += f", streams={list(self.streams)}" if self.streams else ""
        params += f", fill={[list(self.fill)] * len(prompts)}" if self.fill else ""
        return f"{name}.generate({prompts}, {self.n}, seed={self.seed}, stop={list(self.stop)}{params})"

    def row(self, i: int) -> tuple[Any, ...]:
        """All that prompt `i` depends on."""
        stream, negative = self.streams[i] if self.streams else i, self.negative[i] if self.negative else ()
        return self.prompts[i], self.n, self.seed, self.params, self.stop, stream, negative, self.fill

    def groups(self, program: Program) -> list[list[int]]:
        """Which prompts run as one batch, as in `runtime.generate`."""
        return batches(program, self.prompts)

    def inputs(self, program: Program, group: Sequence[int]) -> Values:
        """The program's inputs for these prompts."""
        streams = [self.streams[i] if self.streams else i for i in group]
        negative = [self.negative[i] for i in group] if self.negative else None
        fill = [self.fill] * len(group) if self.fill else None
        return make_inputs(program, [self.prompts[i] for i in group], self.n, self.seed, self.stop, streams, negative,
                           dict(self.params), fill)  # fmt: skip


def cases(program: Program, seed: int = 0, quick: bool = False) -> list[Case]:
    """Boundary lengths, ragged batches, greedy and sampled, each parameter alone; all within the program's capacity."""
    if program.meta.get("loop") == "unmask":
        from aropt import cases_canvas

        return cases_canvas.cases(program, seed, quick)
    capacity, vocab = int(program.meta["capacity"]), int(program.meta.get("input_vocab", program.meta["vocab"]))
    generator = torch.Generator().manual_seed(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return random_rows(program, vocab, max(length, 1), generator)

    def case(
        name: str,
        kind: str,
        lengths: Sequence[int],
        n: int,
        seed: int = 0,
        params: Params = (),
        streams: Sequence[int] = (),
    ) -> None:
        prompts = tuple(prompt(length) for length in lengths)
        negative = tuple(prompt(len(p)) for p in prompts) if needs_negative else ()
        room = max(0, min(n, ids_of(program.meta, capacity - max(*lengths, 1) + 1)))
        made.append(Case(name, kind, prompts, room, seed, params, (), tuple(streams), negative))

    made: list[Case] = []
    needs_negative = "negative" in program.inputs and program.meta.get("null") is None
    some, fixed = parameters(program)
    few, many = (6, 12) if quick else (16, 40)
    two, three, five, nine = (min(n, max(capacity // 3, 1)) for n in (2, 3, 5, 9))
    case("one token", "boundary", [1], few, params=fixed)
    case("no tokens", "boundary", [two], 0, params=fixed)
    case("ragged greedy", "ragged", [five, 1, three], few, params=fixed)
    case("sampled", "sampled", [three], many, seed + 1, (("temperature", 1.0), *fixed))
    case("ragged sampled", "ragged", [1, five], few, seed + 2, some, (3, 1))
    for name, value in STRONG:
        if name in program.inputs and not (name == "guidance" and program.meta.get("guidance_free")):
            strong = bias_pattern(program) if name == "bias" else value
            label = name if name == "bias" else f"{name} {value:g}"
            case(label, "sampled", [nine, 1, 1], few, seed + 3, (("temperature", 2.0), (name, strong)))
    ends = {capacity - 1, capacity} if quick else {BLOCK - 1, BLOCK, BLOCK + 1, capacity - 3, capacity - 1, capacity}
    for length in sorted(n for n in ends if 1 < n <= min(capacity, 2048)):
        case(f"prompt of {length}", "boundary", [length], 3, params=fixed)
    if not quick:
        case("greedy", "greedy", [min(16, capacity // 2)], many, params=fixed)
        case("to capacity", "boundary", [max(1, capacity - 100)], 101, params=fixed)
        case("other seed", "sampled", [two, two], few, 2**40 + seed, some, (2, 10**9))
    return made


Params = tuple[tuple[str, Value], ...]


def random_rows(program: Program, vocab: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Ids that fill so many rows: one each, or of windows a whole one or an id that stands alone."""
    if not window(program.meta):
        known = others(vocab, program.meta.get("never", ()))
        return tuple(known[torch.randint(0, len(known), (count,), generator=generator)].tolist())
    ids: list[int] = []
    for first in torch.randint(0, vocab, (count,), generator=generator).tolist():
        single = int(program.meta.get("single", vocab))
        rest = torch.randint(0, single, (*window(program.meta),), generator=generator).tolist()
        ids += [first] if first >= single else [first, *rest[1:]]
    return tuple(ids)


def parameters(program: Program) -> tuple[Params, Params]:
    """Usual values of the program's sampling parameters: all of them, and those that greedy generation uses too."""
    usual = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "guidance": 1.5, "repetition_penalty": 1.2}
    usual |= {"guidance": 1.0} if program.meta.get("guidance_free") else {}
    usual |= {"guidance_from": 1, "guidance_to": 4}
    some = tuple((k, v) for k, v in usual.items() if k in program.inputs)
    return some, tuple((k, v) for k, v in some if k.startswith(("guidance", "repetition_penalty")))


def bias_pattern(program: Program) -> tuple[float, ...]:
    """PATTERN for each token of the vocabulary."""
    vocab = int(program.meta["vocab"])
    return (PATTERN * vocab)[:vocab]
