"""What callers give as ids: lists, arrays and tensors become lists of ints, and their checks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.ir.units import rows, window
from aropt.loops.scheme import scheme_of

INTERVAL = ("guidance_from", "guidance_to")
RESERVED = {
    "prompt", "lengths", "limit", "stop", "greedy", "seed", "streams", "negative", "canvas", "answers", "origin",
}  # fmt: skip


def id_lists(given: Any, where: str) -> list[list[int]]:
    """Ids of several sequences; those of one alone are a batch of one. Raises UsageError for anything else."""
    rows = elements(given, where)
    if rows and not any(isinstance(row, (str, Iterable)) or hasattr(row, "tolist") for row in map(plain, rows)):
        rows = [rows]
    return [[integer(t, f"{where} {i}") for t in elements(row, f"{where} {i}")] for i, row in enumerate(rows)]


def id_list(given: Any, where: str, vocab: int | None = None) -> list[int]:
    """Ids; None is no id, and an int is one. Raises UsageError for others, and for those outside of the vocabulary."""
    given = plain(given)
    rows = [] if given is None else [given] if isinstance(given, int) else elements(given, where)
    found = [integer(t, where) for t in rows]
    bad = [t for t in found if vocab is not None and not 0 <= t < vocab]
    if bad:
        raise UsageError(
            what=f"token {bad[0]} is not in the vocabulary",
            where=where,
            why=f"ids run from 0 to {vocab - 1 if vocab else 0}, so that it would never occur",
            hint="give an id of the model's own tokenizer",
        )
    return found


def plain(given: Any) -> Any:
    """An array or tensor as lists and numbers of Python."""
    return given.tolist() if hasattr(given, "tolist") else given


def elements(given: Any, where: str) -> list[Any]:
    """The elements of anything but a text or a dict. Raises UsageError."""
    given = plain(given)
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise UsageError(
            what=f"{where} can't be a {type(given).__name__}",
            where=where,
            why="a program takes token ids, and has no tokenizer",
            hint='give lists of ids: [[1, 2, 3]], or tokenizer(texts)["input_ids"]; aropt run takes texts',
        )
    return list(given)


def integer(given: Any, where: str) -> int:
    """An int, of numpy or torch too. Raises UsageError for anything else."""
    try:
        return operator.index(given)
    except TypeError:
        raise UsageError(
            what=f"{given!r:.60} is no whole number", where=where, why="ids and counts are ints", hint="give an int"
        ) from None


def check(
    program: Program,
    prompts: Sequence[Sequence[int]],
    n: int,
    room: int,
    params: Mapping[str, Any],
    negative: Sequence[Sequence[int]] | None = None,
    fill: Sequence[Sequence[int]] | None = None,
) -> None:
    """Raises UsageError for prompts, lengths or parameters that the program can't take. `room`: the most new tokens."""
    capacity = program.meta["capacity"]
    least = scheme_of(program).least
    if least > n >= 0:
        raise UsageError(what=f"can't generate {n} tokens", hint=f"give a number of new tokens of {least} or more")
    if not prompts or any(len(p) == 0 for p in prompts):
        raise UsageError(
            what="a prompt is empty", why="generation starts from at least one token", hint="give a prompt"
        )
    if n < 0:
        raise UsageError(what=f"can't generate {n} tokens", hint=f"give a number of new tokens of {least} or more")
    check_ids(program, prompts, "prompt")
    longest = max(prompts, key=lambda p: len(rows(program.meta, p)))
    if max(n, 1 - least) > room:
        raise UsageError(
            what=f"prompt of {len(longest)} tokens and {n} new ones don't fit",
            where="the model's capacity",
            why=f"it takes {capacity} {'rows' if window(program.meta) else 'tokens'} in all",
            hint=f"ask for at most {max(room, 0)} new tokens",
        )
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


def check_negative(
    program: Program, prompts: Sequence[Sequence[int]], negative: Sequence[Sequence[int]] | None
) -> None:
    """Raises UsageError for unconditional prompts that the program can't take, or does not go without."""
    if negative is None:
        if needs_negative(program):
            raise UsageError(
                what="guidance needs an unconditional prompt",
                why="the model has no null class",
                hint="give negative= prompts of the same lengths",
            )
        return
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


def needs_negative(program: Program) -> bool:
    """Whether a request has to say what the unconditional branch reads, as the model has no null class."""
    return "negative" in program.inputs and program.meta.get("null") is None


def usual(program: Program) -> dict[str, float]:
    """Parameters of a usual request. An image is drawn: the likeliest ids of one are hardly any."""
    return {"temperature": 1.0} if program.meta.get("modality") == "image" and "temperature" in program.inputs else {}


def check_fill(program: Program, prompts: Sequence[Sequence[int]], n: int, fill: Sequence[Sequence[int]]) -> None:
    """Raises UsageError for answers that are not `n` ids for each prompt, or where there is no canvas."""
    if not scheme_of(program).fills:
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
