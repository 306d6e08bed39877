"""Running a program on a request: batches, left padding, noise streams, and stripping the result."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aropt.errors import AroptError, Unsupported
from aropt.ir.executor import Executor, OnRound, Values
from aropt.ir.interpreter import Eager, Watch, run
from aropt.ir.program import Input, Program
from aropt.ir.units import flat, rows
from aropt.loops.request import Request, parse
from aropt.loops.scheme import scheme_of


@contextmanager
def blaming(home: str, on_round: OnRound | None = None) -> Iterator[OnRound | None]:
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
    with blaming(home, on_round) as watched:
        request = parse(program, prompts, n, params, seed=seed, stop=stop, negative=negative, fill=fill,
                        streams=streams, plain=plain)  # fmt: skip
        return answer(program, request, executor, watched)


def answer(
    program: Program, request: Request, executor: Executor | None = None, on_round: OnRound | None = None
) -> list[list[int]]:
    """The new ids of each prompt of a request: `generate` of what was read and checked before."""
    executor = executor or Eager(program)
    watch: Watch | None = None if on_round is None else lambda _, values: on_round(values)
    results: dict[int, list[int]] = {}
    for group in batches(program, request.prompts):
        inputs = make_inputs(program, request.part(group))
        with host_threads(executor.host_threads()):
            generated = executor.generate(inputs) if on_round is None else None
            if generated is None:
                generated = run(program, inputs, slots(program, inputs), executor, watch)["generated"]
            for i, row in zip(group, flat(generated), strict=True):
                results[i] = row if generated.is_floating_point() else [t for t in row if t >= 0][: request.n]
    return [results[i] for i in range(len(request.prompts))]


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


def make_inputs(program: Program, request: Request) -> Values:
    """The program's input values for one batch: prompts padded on the left, defaults filled in."""
    params, prompts = dict(request.params), request.prompts
    usual = program.inputs["temperature"].default if "temperature" in program.inputs else 0
    temperature = float(params.get("temperature", usual or 0))
    values = scheme_of(program).inputs(program, prompts, request.n, params, request.fill or None)
    values |= {
        "stop": constant(request.stop or (-1,)),
        "greedy": constant(temperature <= 0),
        "seed": constant(request.seed),
        "streams": constant(request.streams or tuple(range(len(prompts)))),
    }
    if "negative" in program.inputs:
        others = [rows(program.meta, p) for p in request.negative or prompts]
        if not request.negative:
            others = [[*rows(program.meta, [int(program.meta["null"])]), *p[1:]] for p in others]
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
