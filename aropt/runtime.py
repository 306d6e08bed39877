"""Running a program on lists of prompts: checks, left padding, noise streams, and stripping the result."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aropt.errors import AroptError, Unsupported, UsageError
from aropt.interpreter import Executor, OnRound, Values, run
from aropt.program import Input, Program
from aropt.units import flat, ids_of, rows, rows_for, window


def generate(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    *,
    seed: int = 0,
    stop: Sequence[int] = (),
    negative: Sequence[Sequence[int]] | None = None,
    fill: Sequence[Sequence[int]] | None = None,
    streams: Sequence[int] | None = None,
    executor: Executor | None = None,
    on_round: OnRound | None = None,
    **params: Any,
) -> list[list[int]]:
    """Up to `n` new token ids for each prompt (the stop token included).

    `params` are the program's sampling parameters (temperature, top_k, ...): greedy unless temperature > 0.
    `steps` of a program that unmasks: its rounds in all, the same number for each block; of a model with blocks of
    its own, the rounds of each block, as their papers count (how many blocks there are differs by prompt).
    Prompts of different lengths run as one left-padded batch where the program has positions apart from slots,
    otherwise one by one; the tokens are the same. `streams`: which noise each sequence draws (default: its
    index). `fill`: what the answers of a program that unmasks hold already, `n` ids each, the mask id elsewhere.
    Raises UsageError for a bad prompt or parameter.
    """
    check(program, prompts, n, params, negative, fill)
    if streams is not None and len(streams) != len(prompts):
        raise UsageError(
            what=f"{len(streams)} noise streams for {len(prompts)} prompts",
            where="streams",
            hint="give one for each prompt, or leave streams out",
        )
    executor = executor or program.executor
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
        whole = getattr(executor, "whole", None)
        with host_threads(getattr(executor, "host_threads", None)), unfit(program, on_round) as watched:
            if whole is not None and on_round is None:  # the target found one call to be faster
                generated = whole.generate(inputs)
            else:
                generated = run(program, inputs, slots(program, inputs), executor, watched)["generated"]
            for i, row in zip(group, flat(generated), strict=True):
                results[i] = [t for t in row if t >= 0][:n]
    return [results[i] for i in range(len(prompts))]


@contextmanager
def unfit(program: Program, on_round: OnRound | None) -> Iterator[OnRound | None]:
    """Raises Unsupported where a program that was read fails as it runs; what `on_round` raises goes on."""
    own: list[BaseException] = []

    def watched(values: Values) -> bool | None:
        try:
            return on_round(values) if on_round is not None else None
        except BaseException as error:
            own.append(error)
            raise

    try:
        yield watched if program.home and on_round is not None else on_round
    except AroptError:
        raise
    except Exception as error:  # of torch or ONNX Runtime, which have many kinds
        if not program.home or error in own:
            raise
        raise Unsupported(
            what="the artifact's program fails as it runs",
            where=program.home,
            why=(str(error).splitlines() or [type(error).__name__])[0][:300],
            hint="make the artifact again: aropt optimize MODEL -o OUT; report it if that fails too",
        ) from error


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
    needed = inputs["canvas"].shape[1] if "canvas" in inputs else inputs["prompt"].shape[1] + int(inputs["limit"])
    return min(-(-needed // 64) * 64, max(needed, int(program.meta["capacity"])))


def room(program: Program, prompt: Sequence[int]) -> int:
    """The most new tokens after a prompt: the last row of a loop over positions is never read."""
    left = int(program.meta["capacity"]) - len(rows(program.meta, prompt)) + (program.meta.get("loop") != "unmask")
    return ids_of(program.meta, left)


def fitted(program: Program, prompt: Sequence[int]) -> list[int]:
    """An example prompt, cut to half the capacity where no new token would fit after all of it."""
    ids = [int(t) for t in prompt]
    return ids if room(program, ids) > 0 else ids[: max(1, int(program.meta["capacity"]) // 2)]


def workload(program: Program, count: int, tokens: int) -> tuple[list[list[int]], int]:
    """Up to `count` of the model's own prompts, and how many new tokens, at most `tokens`, fit after each of them.

    Those that leave less than half of the room that others do are left out.
    """
    prompts = [fitted(program, p) for p in program.meta["prompts"]]
    most = min(tokens, max((room(program, p) for p in prompts), default=0))
    prompts = [p for p in prompts if 2 * room(program, p) >= most][:count]
    return prompts, min([most, *(room(program, p) for p in prompts)])


def check(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    params: Mapping[str, Any],
    negative: Sequence[Sequence[int]] | None = None,
    fill: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raises UsageError for prompts, lengths or parameters that the program can't take."""
    capacity = int(program.meta["capacity"])
    unmask = program.meta.get("loop") == "unmask"
    if unmask and n < 1:
        raise UsageError(what=f"can't unmask {n} tokens", hint="give a number of new tokens of 1 or more")
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UsageError(
            what="a prompt is empty", why="generation starts from at least one token", hint="give a prompt"
        )
    if n < 0:
        raise UsageError(what=f"can't generate {n} tokens", hint="give a number of new tokens of 0 or more")
    check_ids(program, prompts, "prompt")
    longest = max(prompts, key=lambda p: len(rows(program.meta, p)))
    if max(n, 0 if unmask else 1) > room(program, longest):
        raise UsageError(
            what=f"prompt of {len(longest)} tokens and {n} new ones don't fit",
            where="the model's capacity",
            why=f"it takes {capacity} {'rows' if window(program.meta) else 'tokens'} in all",
            hint=f"ask for at most {max(room(program, longest), 0)} new tokens",
        )
    if negative is not None:
        check_negative(program, prompts, negative)
    if fill is not None:
        check_fill(program, prompts, n, fill)
    check_parameters(program, params)


def check_ids(program: Program, rows: Sequence[Sequence[int]], what: str) -> None:
    """Raises UsageError for an id outside the vocabulary."""
    known = int(program.meta.get("input_vocab", program.meta["vocab"]))
    for i, row in enumerate(rows):
        bad = [t for t in row if not 0 <= int(t) < known]
        if bad:
            raise UsageError(
                what=f"token {bad[0]} is not in the vocabulary",
                where=f"{what} {i}",
                why=f"ids run from 0 to {known - 1}",
                hint="encode the prompt with the model's own tokenizer",
            )
        padding = [t for t in row if int(t) in program.meta.get("never", ())]
        if padding:
            raise UsageError(
                what=f"token {padding[0]} is the model's padding",
                where=f"{what} {i}",
                why="the model numbers its rows without it, so that it is no part of a text",
                hint="leave it out; sequences of different lengths are padded by aropt",
            )


def check_negative(program: Program, prompts: Sequence[Sequence[int]], negative: Sequence[Sequence[int]]) -> None:
    """Raises UsageError for unconditional prompts that the program can't take."""
    if "negative" not in program.inputs:
        raise UsageError(
            what="the program takes no negative prompts",
            where="negative",
            why="its rule has no guidance",
            hint="leave negative= out, or capture the model with the rule 'guidance'",
        )
    lengths, given = [len(p) for p in prompts], [len(p) for p in negative]
    if given != lengths:
        raise UsageError(
            what=f"negative prompts have {given} tokens, the prompts {lengths}",
            where="negative",
            why="both run as rows of one batch, position by position",
            hint="give one negative prompt of the same length for each prompt",
        )
    check_ids(program, negative, "negative")


def check_fill(program: Program, prompts: Sequence[Sequence[int]], n: int, fill: Sequence[Sequence[int]]) -> None:
    """Raises UsageError for answers that are not `n` ids for each prompt, or where there is no canvas."""
    if program.meta.get("loop") != "unmask":
        raise UsageError(
            what="the program has no canvas to fill",
            where="fill",
            why="it generates one token after the other",
            hint="leave fill= out, or capture a model with a mask id",
        )
    if len(fill) != len(prompts):
        raise UsageError(
            what=f"{len(fill)} answers to fill in for {len(prompts)} prompts",
            where="fill",
            hint="give one for each prompt, or leave fill= out",
        )
    for i, answer in enumerate(fill):
        if len(answer) != n:
            raise UsageError(
                what=f"fill {i} has {len(answer)} ids, not {n}",
                where="fill",
                why="an answer has as many ids as new tokens were asked for",
                hint="give n ids for each prompt, the mask id where one is to be found",
            )
    check_ids(program, fill, "fill")


def check_parameters(program: Program, params: Mapping[str, Any]) -> None:
    """Raises UsageError for a parameter that the rule doesn't have, or a value out of its range."""
    params = needless(program, params)
    for name, value in params.items():
        if name not in program.inputs or name in RESERVED:
            known = sorted(p for p, i in program.inputs.items() if i.default is not None and p not in RESERVED)
            raise UsageError(
                what=f"unknown sampling parameter '{name}'",
                why="the program's rule does not use it",
                hint=f"it takes {', '.join(known)}; rules are chosen by aropt optimize --rule",
            )
        given = program.inputs[name]
        problem = given.problem(value)
        if problem:
            raise UsageError(
                what=f"{name} can't be {value if given.spec.dims == () else 'that'}",
                where=f"parameter {name}: {given.doc}" if given.doc else f"parameter {name}",
                why=problem,
                hint="choose another value, or leave it out",
            )
    check_together(program, params)


def needless(program: Program, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters without a guidance of 1 where cfg-eliminate took guidance out. Raises UsageError for another."""
    if not program.meta.get("eliminated") or "guidance" not in params:
        return dict(params)
    if params["guidance"] != 1:
        raise UsageError(
            what=f"guidance can't be {params['guidance']}",
            where="parameter guidance",
            why="cfg-eliminate took the unconditional branch out of this program: its guidance is 1",
            hint="leave it out, or optimize the model again without --pass cfg-eliminate",
        )
    return {n: v for n, v in params.items() if n != "guidance"}


def check_together(program: Program, params: Mapping[str, Any]) -> None:
    """Raises UsageError for values that are in range and yet leave nothing: an interval, a bias."""
    first, end = (params.get(n, program.inputs[n].default) if n in program.inputs else 0 for n in INTERVAL)
    if first > end:
        raise UsageError(
            what=f"guidance can't begin at row {first} and end before row {end}",
            where="parameters guidance_from, guidance_to",
            why="an interval ends after it begins",
            hint="choose guidance_from <= guidance_to; equal ones guide nothing",
        )
    if "bias" in params and bool((torch.as_tensor(params["bias"], dtype=torch.float64) == -torch.inf).all()):
        raise UsageError(
            what="bias leaves no token",
            where="parameter bias",
            why="all of its values are -inf",
            hint="leave at least one token finite",
        )


INTERVAL = ("guidance_from", "guidance_to")
RESERVED = {
    "prompt", "lengths", "limit", "stop", "greedy", "seed", "streams", "negative", "canvas", "answers", "origin",
}  # fmt: skip


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
    temperature = float(params.get("temperature", program.inputs["temperature"].default or 0.0))
    unmask = program.meta.get("loop") == "unmask"
    values = canvas_inputs(program, prompts, n, params, fill) if unmask else {
        "prompt": padded([rows(program.meta, p) for p in prompts]),
        "lengths": constant(tuple(len(rows(program.meta, p)) for p in prompts)),
        "limit": constant(rows_for(program.meta, n)),
    }  # fmt: skip
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


def canvas_inputs(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    params: dict[str, Any],
    fill: Sequence[Sequence[int]] | None,
) -> Values:
    """Prompts and masked answers as one canvas, and the grid of blocks. Raises UsageError where they don't fit.

    A model with blocks of its own has them counted from the first id, others from the first id of the answer.
    """
    mask, own = int(program.meta["mask"]), int(program.meta.get("block") or 0)
    fill = [[mask] * n] * len(prompts) if fill is None else fill
    for i, prompt in enumerate(prompts):
        if mask in prompt:
            raise UsageError(
                what=f"the prompt holds the mask id {mask}",
                where=f"prompt {i}",
                why="ids of a prompt are given; masks belong to the answer",
                hint="give them as fill=, with the mask id where an id is to be found",
            )
    block = int(params.get("block", own or program.inputs["block"].default or 1))
    if block < 1 or (own and block != own) or ("block" in params and not own and n % block):
        raise UsageError(
            what=f"blocks of {block} don't divide the {n} new tokens" if not own else f"blocks are of {own} ids here",
            why="a schedule counts rounds by whole blocks" if not own else "the model was trained on them",
            hint="choose a block that divides the number of new tokens" if not own else "leave block out",
        )
    values: Values = {
        "canvas": padded([[*p, *f] for p, f in zip(prompts, fill, strict=True)]),
        "lengths": torch.tensor([len(p) + n for p in prompts]),
        "answers": torch.tensor([len(p) for p in prompts]),
        "origin": torch.tensor([0 if own else len(p) for p in prompts]),
        "block": torch.tensor(block),
    }
    if "steps" in program.inputs:
        steps = int(params.get("steps", 0))
        values["steps"] = torch.tensor(steps if own else share(steps, -(-n // block)))
    return values


def share(steps: int, blocks: int) -> int:
    """Rounds of each block, of `steps` in all. Raises UsageError where they can't be shared out evenly."""
    if steps % blocks:
        raise UsageError(
            what=f"{steps} steps are not a whole number for each of {blocks} blocks",
            where="parameter steps: rounds in all (of a model with blocks of its own: rounds of each block)",
            why="every block gets the same number of rounds, at least one",
            hint=f"choose a multiple of {blocks}, or another block",
        )
    return steps // blocks


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
    dims = [d for d in given.spec.dims if isinstance(d, int)]
    return tensor.expand(dims).contiguous() if dims and tensor.dim() == 0 else tensor


def padded(prompts: Sequence[Sequence[Any]]) -> Tensor:
    """int64 [B, P] or, of rows of W ids, [B, P, W]; padded with 0 on the left."""
    made = np.zeros((len(prompts), max(len(p) for p in prompts), *np.shape(prompts[0][0])), np.int64)
    for row, prompt in zip(made, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return torch.from_numpy(made)
