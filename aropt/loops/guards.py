"""Guards of an exported loop: what the program can't take, as a number, so that nothing is generated of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

I64 = torch.int64
FOREVER = 2**62
STATUS = {
    1: "the prompt and the new tokens don't fit the model's capacity",
    2: "a prompt or an answer is empty, or longer than its row",
    3: "the seed is not in 0 .. 2^62 - 1",
    4: "rows are shorter than others, or padded: this model takes prompts of one length in a batch",
    5: "the blocks are none that the model takes",
}


class Guard(NamedTuple):
    """`function` reads the named values and returns those that it `writes`: "status" first, 0 if nothing is wrong."""

    function: Callable[..., tuple[Tensor, ...]]
    reads: list[str]
    writes: list[str]


def outside(seed: Tensor) -> Tensor:
    return (seed < 0) | (seed >= FOREVER)


def apart(lengths: Tensor, rows: Tensor, ragged: Any) -> list[Tensor]:
    """Whether some row is padded, which a program without positions apart from slots can't tell from a prompt."""
    return [torch.zeros((), dtype=torch.bool) if ragged else (lengths != rows.shape[1]).any()]


def first(problems: list[Tensor]) -> Tensor:
    """The number of the first problem, from 1 on; 0 if there is none: see STATUS."""
    status = torch.zeros((), dtype=I64)
    for number, found in reversed(list(enumerate(problems, 1))):
        status = torch.where(found, number, status)
    return status
