"""A request: what a caller asks a program for, read and checked once; and what fits a program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.ir.units import ids_of, rows
from aropt.loops.defaults import usual_length, with_defaults
from aropt.loops.given import check, id_list, id_lists, integer
from aropt.loops.scheme import scheme_of

Ids = tuple[tuple[int, ...], ...]  # of each sequence


@dataclass(frozen=True)
class Request:
    """One generation: prompts (several make a batch), how many new ids, and all that these depend on."""

    prompts: Ids
    n: int
    seed: int = 0
    params: tuple[tuple[str, Any], ...] = ()  # of the rule; those left out are as the program declares them
    stop: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()  # empty: 0, 1, ...
    negative: Ids = ()  # empty: the program's null class
    fill: Ids = ()  # of a canvas: what the answers hold already; empty: masks

    def part(self, group: Sequence[int]) -> Request:
        """The same of these prompts alone: all that their answers depend on."""
        prompts, negative, fill = (
            tuple(tuple(ids[i]) for i in group) if ids else () for ids in (self.prompts, self.negative, self.fill)
        )
        streams = tuple(self.streams[i] if self.streams else i for i in group)
        return Request(prompts, self.n, self.seed, self.params, self.stop, streams, negative, fill)


def parse(
    program: Program,
    prompts: Any,
    n: Any = None,
    params: Mapping[str, Any] = {},
    *,
    seed: Any = 0,
    stop: Any = None,
    negative: Any = None,
    fill: Any = None,
    streams: Any = None,
    plain: bool = False,
) -> Request:
    """What a caller gives as a request; `aropt.loops.runtime.generate` says what each of them is.

    Raises UsageError for what the program can't take.
    """
    params, stop = with_defaults(program.meta, params, stop, plain)
    prompts, seed = id_lists(prompts, "prompt"), integer(seed, "seed")
    stop = id_list(stop, "stop", program.meta["vocab"])
    n = default_tokens(program, prompts) if n is None else integer(n, "n")
    negative = None if negative is None else id_lists(negative, "negative")
    fill = None if fill is None else id_lists(fill, "fill")
    streams = None if streams is None else id_list(streams, "streams")
    check(program, prompts, n, min((room(program, p) for p in prompts), default=0), params, negative, fill)
    if streams is not None and len(streams) != len(prompts):
        raise UsageError(
            what=f"{len(streams)} noise streams for {len(prompts)} prompts",
            where="streams",
            hint="give one for each prompt, or leave streams out",
        )
    if not 0 <= seed < 2**62:
        raise UsageError(
            what=f"seed {seed} is out of range", why="seeds run from 0 to 2^62 - 1", hint="choose another seed"
        )
    prompts, negative, fill = (tuple(map(tuple, ids or ())) for ids in (prompts, negative, fill))
    return Request(prompts, n, seed, tuple(params.items()), tuple(stop), tuple(streams or ()), negative, fill)


def room(program: Program, prompt: Sequence[int]) -> int:
    """The most new tokens after a prompt."""
    left = program.meta["capacity"] - len(rows(program.meta, prompt)) + scheme_of(program).unread
    return ids_of(program.meta, left)


def default_tokens(program: Program, prompts: Sequence[Sequence[int]]) -> int:
    """New tokens where a request gives no number: as the model's defaults say, up to where the longest prompt fits."""
    longest = max(map(len, prompts), default=0)
    return usual_length(program.meta, longest, min((room(program, p) for p in prompts), default=1))


def fitted(program: Program, prompt: Sequence[int]) -> list[int]:
    """An example prompt, cut to half the capacity where no new token would fit after all of it."""
    ids = [int(t) for t in prompt]
    return ids if room(program, ids) > 0 else ids[: max(1, program.meta["capacity"] // 2)]


def example(program: Program, tokens: int) -> tuple[list[int], int]:
    """The model's first prompt, and how many new tokens, at most `tokens`, fit after it."""
    prompt = fitted(program, program.meta["prompts"][0])
    return prompt, min(tokens, room(program, prompt))


def workload(program: Program, count: int, tokens: int) -> tuple[list[list[int]], int]:
    """Up to `count` of the model's own prompts, and how many new tokens, at most `tokens`, fit after each of them.

    Those that leave less than half of the room that others do are left out.
    """
    prompts = [fitted(program, p) for p in program.meta["prompts"]]
    most = min(tokens, max((room(program, p) for p in prompts), default=0))
    prompts = [p for p in prompts if 2 * room(program, p) >= most][:count]
    return prompts, min([most, *(room(program, p) for p in prompts)])
