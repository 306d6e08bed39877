"""Smaller cases that still fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from aropt.loops.requests.cases import Case


def shrink(fails: Callable[[Case], bool], case: Case, runs: int = 20) -> Case:
    """A smaller case that still fails, after at most `runs` tries. Steps that failed are tried again at the end."""
    useless: set[str] = set()
    while True:
        start = case
        while step := next(((k, smaller) for k, smaller in simpler(case) if k not in useless), None):
            if runs == 0:
                return case
            runs, (kind, smaller) = runs - 1, step
            if fails(smaller):
                case = smaller
            else:
                useless.add(kind)
        if case == start:
            return case
        useless.clear()


def simpler(case: Case) -> Iterator[tuple[str, Case]]:
    """Steps to simpler cases, the boldest first: one prompt, fewer tokens, shorter prompts, less of everything else."""
    for i in range(len(case.prompts) if len(case.prompts) > 1 else 0):
        some = {k: getattr(case, k)[i : i + 1] for k in ("prompts", "streams", "negative", "fill")}
        yield f"prompt {i} alone", replace(case, **some)
    for kind, n in (("one token", 1), ("half the tokens", case.n // 2), ("a token less", case.n - 1)):
        if 0 < n < case.n:
            yield kind, replace(case, n=n, fill=tuple(ids[:n] for ids in case.fill))
    for kind, keep in (("prompts of one", 0), ("half the prompts", 2)):
        lengths = [max(1, len(p) // keep if keep else 1) for p in case.prompts]
        if lengths != [len(p) for p in case.prompts]:
            yield kind, replace(case, prompts=tail(case.prompts, lengths), negative=tail(case.negative, lengths))
    if case.streams:
        yield "streams", replace(case, streams=())
    if case.stop:
        yield "stop", replace(case, stop=())
    for name, _ in case.params:
        yield name, replace(case, params=tuple((k, v) for k, v in case.params if k != name))


def tail(prompts: tuple[tuple[int, ...], ...], lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The last tokens of each prompt."""
    return tuple(p[len(p) - n :] for p, n in zip(prompts, lengths, strict=False))
