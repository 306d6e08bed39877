"""Running a program on lists of prompts: checks, left padding, noise streams, and stripping the result."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from aropt.errors import AroptError, Unsupported, UsageError
from aropt.ir.executor import Executor, OnRound, Values
from aropt.ir.interpreter import Eager, Watch, run
from aropt.ir.program import Input, Program
from aropt.ir.units import flat, ids_of, rows
from aropt.loops.defaults import usual_length, with_defaults
from aropt.loops.given import check, id_list, id_lists, integer
from aropt.loops.scheme import scheme_of

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def blaming(home: str, on_round: OnRound | None) -> Iterator[OnRound | None]:
    """Raises Unsupported where a program of the artifact `home` fails as it runs; what `on_round` raises goes on."""
    own: list[BaseException] = []

    def watched(values: Values) -> bool | None:
        try:
            return on_round(values) if on_round is not None else None
        except BaseException as error:
            own.append(error)
            raise

    try:
        yield watched if home and on_round is not None else on_round
    except AroptError:
        raise
    except Exception as error:  # of torch or ONNX Runtime, which have many kinds
        if not home or error in own:
            raise
        raise Unsupported(
            what="the artifact's program fails as it runs",
            where=home,
            why=(str(error).splitlines() or [type(error).__name__])[0][:300],
            hint="make the artifact again: aropt optimize MODEL -o OUT; report it if that fails too",
        ) from error


def blames(function: F) -> F:
    """The function of a program, with `blaming`."""

    @functools.wraps(function)
    def wrapped(program: Program, *args: Any, on_round: OnRound | None = None, home: str = "", **options: Any) -> Any:
        with blaming(home, on_round) as watched:
            return function(program, *args, on_round=watched, **options)

    return wrapped  # type: ignore[return-value]


@blames
def generate(
    program: Program,
    prompts: Any,
    n: int | None = None,
    *,
    seed: int = 0,
    stop: Any = None,
    negative: Any = None,
    fill: Any = None,
    streams: Any = None,
    executor: Executor | None = None,
    on_round: OnRound | None = None,
    plain: bool = False,
    home: str = "",
    **params: Any,
) -> list[list[int]]:
    """Up to `n` new token ids for each prompt (the stop token included).

    Ids are lists, arrays or tensors; a flat one is one prompt, and `stop` may be one id.
    `params` are the program's sampling parameters (temperature, top_k, ...): greedy unless temperature > 0. What is
    left out, `n` and `stop` too, is as the model's own defaults say (see aropt.loops.defaults), unless `plain` is set.
    `steps` of a program that unmasks: its rounds in all, the same number for each block; of a model with blocks of
    its own, the rounds of each block, as their papers count (how many blocks there are differs by prompt).
    Prompts of different lengths run as one left-padded batch where the program has positions apart from slots,
    otherwise one by one; the tokens are the same. `streams`: which noise each sequence draws (default: its
    index). `fill`: what the answers of a program that unmasks hold already, `n` ids each, the mask id elsewhere.
    `executor`: what runs the graphs (default: the reference interpreter). `home`: the artifact that the program was
    read from, which is to blame where it fails as it runs.
    Raises UsageError for a bad prompt or parameter.
    """
    params, stop = with_defaults(program.meta, params, stop, plain)
    prompts, seed, stop = (
        id_lists(prompts, "prompt"),
        integer(seed, "seed"),
        id_list(stop, "stop", program.meta["vocab"]),
    )
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
    executor = executor or Eager(program)
    watch: Watch | None = None if on_round is None else lambda _, values: on_round(values)
    results: dict[int, list[int]] = {}
    for group in batches(program, prompts):
        drawn = group if streams is None else [streams[i] for i in group]
        inputs = make_inputs(
            program,
            [prompts[i] for i in group],
            n,
            seed,
            stop,
            drawn,
            None if negative is None else [negative[i] for i in group],
            params,
            None if fill is None else [fill[i] for i in group],
        )
        with host_threads(executor.host_threads()):
            generated = executor.generate(inputs) if on_round is None else None
            if generated is None:
                generated = run(program, inputs, slots(program, inputs), executor, watch)["generated"]
            for i, row in zip(group, flat(generated), strict=True):
                results[i] = row if generated.is_floating_point() else [t for t in row if t >= 0][:n]
    return [results[i] for i in range(len(prompts))]


def batches(program: Program, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the prompts that run as one batch: all, or one by one where lengths differ and the program minds.

    Of a model that was exported for so many sequences (meta "batch") no more at a time; guidance has two of each.
    """
    count = most = len(prompts)
    if len({len(rows(program.meta, p)) for p in prompts}) > 1 and not program.meta.get("ragged"):
        most = 1
    elif "batch" in program.meta:
        most = max(1, int(program.meta["batch"]) // (2 if "negative" in program.inputs else 1))
    return [list(range(i, min(i + most, count))) for i in range(0, count, most)]


@contextmanager
def host_threads(count: int | None) -> Iterator[None]:
    """torch with `count` threads: beside another runtime's spinning ones, its own would wait for a core."""
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def slots(program: Program, inputs: Values) -> int:
    """Cache slots for a generation: what it needs, rounded up so that few shapes occur."""
    needed = scheme_of(program).rows(inputs)
    return min(-(-needed // 64) * 64, max(needed, program.meta["capacity"]))


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


def workload(program: Program, count: int, tokens: int) -> tuple[list[list[int]], int]:
    """Up to `count` of the model's own prompts, and how many new tokens, at most `tokens`, fit after each of them.

    Those that leave less than half of the room that others do are left out.
    """
    prompts = [fitted(program, p) for p in program.meta["prompts"]]
    most = min(tokens, max((room(program, p) for p in prompts), default=0))
    prompts = [p for p in prompts if 2 * room(program, p) >= most][:count]
    return prompts, min([most, *(room(program, p) for p in prompts)])


def make_inputs(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    seed: int,
    stop: Sequence[int],
    streams: Sequence[int],
    negative: Sequence[Sequence[int]] | None,
    params: dict[str, Any],
    fill: Sequence[Sequence[int]] | None = None,
) -> Values:
    """The program's input values: prompts padded on the left, defaults filled in."""
    if not 0 <= seed < 2**62:
        raise UsageError(
            what=f"seed {seed} is out of range", why="seeds run from 0 to 2^62 - 1", hint="choose another seed"
        )
    usual = program.inputs["temperature"].default if "temperature" in program.inputs else 0
    temperature = float(params.get("temperature", usual or 0))
    values = scheme_of(program).inputs(program, prompts, n, params, fill)
    values |= {
        "stop": constant(tuple(stop) or (-1,)),
        "greedy": constant(temperature <= 0),
        "seed": constant(seed),
        "streams": constant(tuple(streams)),
    }
    if "negative" in program.inputs:
        null = program.meta.get("null")
        if negative is None and null is None:
            raise UsageError(
                what="guidance needs an unconditional prompt",
                why="the model has no null class",
                hint="give negative= prompts of the same lengths",
            )
        others = [rows(program.meta, p) for p in (prompts if negative is None else negative)]
        if negative is None:
            others = [[*rows(program.meta, [int(null or 0)]), *p[1:]] for p in others]
        values["negative"] = padded(others)
    for name, given in program.inputs.items():
        if name not in values:
            values[name] = parameter(given, params[name]) if name in params else default(given)
    return values


@functools.lru_cache(maxsize=256, typed=True)
def constant(value: int | bool | tuple[int, ...]) -> Tensor:
    """Numbers as a tensor that is made once, and read only: before a first token the host's time counts."""
    return torch.tensor(value)


@functools.lru_cache(maxsize=256)
def default(given: Input) -> Tensor:
    """A parameter that is not given; a tensor that is made once, and read only."""
    return parameter(given, given.default)


def parameter(given: Input, value: Any) -> Tensor:
    """A sampling parameter as a tensor of the declared type."""
    tensor = torch.as_tensor(value, dtype=given.spec.dtype)
    if not tensor.numel():  # no ids: as if the parameter was left out
        return default(given)
    dims = [d if isinstance(d, int) else 1 for d in given.spec.dims]
    return tensor.expand(dims).contiguous() if dims and tensor.dim() == 0 else tensor


def padded(prompts: Sequence[Sequence[Any]]) -> Tensor:
    """int64 [B, P] or, of rows of W ids, [B, P, W]; padded with 0 on the left."""
    made = np.zeros((len(prompts), max(len(p) for p in prompts), *np.shape(prompts[0][0])), np.int64)
    for row, prompt in zip(made, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return torch.from_numpy(made)
