"""Running a program on lists of prompts: checks, left padding, noise streams, and stripping the result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.interpreter import Executor, OnRound, Values, run
from aropt.program import Input, Program


def generate(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    seed: int = 0,
    stop: Sequence[int] = (),
    negative: Sequence[Sequence[int]] | None = None,
    streams: Sequence[int] | None = None,
    executor: Executor | None = None,
    on_round: OnRound | None = None,
    **params: Any,
) -> list[list[int]]:
    """Up to `n` new token ids for each prompt (the stop token included).

    `params` are the program's sampling parameters (temperature, top_k, ...): greedy unless temperature > 0.
    Prompts of different lengths run as one left-padded batch where the program has positions apart from slots,
    otherwise one by one; the tokens are the same. `streams`: which noise each sequence draws (default: its
    index). Raises UsageError for a bad prompt or parameter.
    """
    check(program, prompts, n, params)
    executor = executor or program.executor
    ragged = len({len(p) for p in prompts}) > 1
    groups = (
        [[i] for i in range(len(prompts))] if ragged and not program.meta.get("ragged") else [list(range(len(prompts)))]
    )
    results: dict[int, list[int]] = {}
    for group in groups:
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
        )
        whole = getattr(executor, "whole", None)
        with host_threads(getattr(executor, "host_threads", None)):
            if whole is not None and on_round is None:  # the target found one call to be faster
                rows = whole.generate(inputs)
            else:
                rows = run(program, inputs, slots(program, inputs), executor, on_round)["generated"].tolist()
        for i, row in zip(group, rows, strict=True):
            results[i] = [t for t in row if t >= 0]
    return [results[i] for i in range(len(prompts))]


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
    needed = inputs["prompt"].shape[1] + int(inputs["limit"])
    return min(-(-needed // 64) * 64, max(needed, int(program.meta["capacity"])))


def check(program: Program, prompts: Sequence[Sequence[int]], n: int, params: dict[str, Any]) -> None:
    """Raises UsageError for prompts, lengths or parameters that the program can't take."""
    capacity, known = int(program.meta["capacity"]), int(program.meta.get("input_vocab", program.meta["vocab"]))
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UsageError(
            what="a prompt is empty", why="generation starts from at least one token", hint="give a prompt"
        )
    if n < 0:
        raise UsageError(what=f"can't generate {n} tokens", hint="give a number of new tokens of 0 or more")
    longest = max(len(p) for p in prompts)
    if longest + max(n - 1, 0) > capacity:
        raise UsageError(
            what=f"prompt of {longest} tokens and {n} new ones don't fit",
            where="the model's capacity",
            why=f"it takes {capacity} tokens in all",
            hint=f"ask for at most {max(capacity - longest + 1, 0)} new tokens",
        )
    for i, prompt in enumerate(prompts):
        bad = [t for t in prompt if not 0 <= int(t) < known]
        if bad:
            raise UsageError(
                what=f"token {bad[0]} is not in the vocabulary",
                where=f"prompt {i}",
                why=f"ids run from 0 to {known - 1}",
                hint="encode the prompt with the model's own tokenizer",
            )
    unknown = [p for p in params if p not in program.inputs or p in RESERVED]
    if unknown:
        known_params = sorted(p for p, i in program.inputs.items() if i.default is not None and p not in RESERVED)
        raise UsageError(
            what=f"unknown sampling parameter '{unknown[0]}'",
            why="the program's rule does not use it",
            hint=f"it takes {', '.join(known_params)}; rules are chosen by aropt optimize --rule",
        )


RESERVED = {"prompt", "lengths", "limit", "stop", "greedy", "seed", "streams", "negative"}


def make_inputs(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    seed: int,
    stop: Sequence[int],
    streams: Sequence[int],
    negative: Sequence[Sequence[int]] | None,
    params: dict[str, Any],
) -> Values:
    """The program's input values: prompts padded on the left, defaults filled in."""
    if not 0 <= seed < 2**62:
        raise UsageError(
            what=f"seed {seed} is out of range", why="seeds run from 0 to 2^62 - 1", hint="choose another seed"
        )
    temperature = float(params.get("temperature", program.inputs["temperature"].default or 0.0))
    values: Values = {
        "prompt": padded(prompts),
        "lengths": torch.tensor([len(p) for p in prompts]),
        "limit": torch.tensor(n),
        "stop": torch.tensor(list(stop) or [-1]),
        "greedy": torch.tensor(temperature <= 0),
        "seed": torch.tensor(seed),
        "streams": torch.tensor(list(streams)),
    }
    if "negative" in program.inputs:
        null = program.meta.get("null")
        if negative is None and null is None:
            raise UsageError(
                what="guidance needs an unconditional prompt",
                why="the model has no null class",
                hint="give negative= prompts of the same lengths",
            )
        values["negative"] = padded(negative if negative is not None else [[int(null or 0), *p[1:]] for p in prompts])
    for name, given in program.inputs.items():
        if name not in values:
            values[name] = parameter(given, params.get(name, given.default))
    return values


def parameter(given: Input, value: Any) -> Tensor:
    """A sampling parameter as a tensor of the declared type."""
    tensor = torch.as_tensor(value, dtype=given.spec.dtype)
    dims = [d for d in given.spec.dims if isinstance(d, int)]
    return tensor.expand(dims).contiguous() if dims and tensor.dim() == 0 else tensor


def padded(prompts: Sequence[Sequence[int]]) -> Tensor:
    """int64 [B, P], padded with 0 on the left."""
    width = max(len(p) for p in prompts)
    return torch.tensor([[0] * (width - len(p)) + [int(t) for t in p] for p in prompts], dtype=torch.int64)
