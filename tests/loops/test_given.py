"""Ids as callers give them: what means the same gives the same tokens, anything else is a UsageError."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from tests.support.run import generate

Make = Callable[[list[Any]], Any]
FORMS: list[Make] = [
    list, tuple, iter, np.array, torch.tensor,
    lambda x: np.array(x, np.uint8), lambda x: torch.tensor(x).to(torch.int32),
    lambda x: [torch.tensor(row) for row in x], lambda x: [np.array(row) for row in x], lambda x: map(tuple, x),
    lambda x: [[torch.tensor(t) for t in row] for row in x], lambda x: [[np.int64(t) for t in row] for row in x],
]  # fmt: skip


def test_forms_of_prompts(tiny_program: Program) -> None:
    wanted = generate(tiny_program, [[1, 2], [3, 4]], 3)
    assert all(generate(tiny_program, form([[1, 2], [3, 4]]), 3) == wanted for form in FORMS)
    alone = generate(tiny_program, [[1, 2]], 3)
    flat: list[Make] = [list, tuple, np.array, torch.tensor]
    assert all(generate(tiny_program, form([1, 2]), 3) == alone for form in flat)
    assert generate(tiny_program, [[1, 2]], np.int64(3), seed=torch.tensor(0), streams=np.array([0])) == alone


def test_forms_of_stops(tiny_program: Program) -> None:
    end = generate(tiny_program, [[1, 2]], 3)[0][1]
    wanted = generate(tiny_program, [[1, 2]], 3, stop=[end])
    for stop in (end, (end,), {end}, np.int64(end), torch.tensor(end), torch.tensor([end]), np.array([end, end])):
        assert generate(tiny_program, [[1, 2]], 3, stop=stop) == wanted
    assert len(generate(tiny_program, [[1, 2]], 3, stop=None)[0]) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": {"loss": 0.1}}, "unknown metric 'loss'"), ({"budget": {"kl": -1}}, "'-1' is no bound for kl"),
        ({"budget": {"top1": None}}, "'None' is no bound"), ({"target": "gpu"}, "unknown target 'gpu'"),
        ({"threads": 0}, "can't run with 0 threads"), ({"threads": "two"}, "'two' is no whole number"),
    ],
)  # fmt: skip
def test_what_optimize_cannot_take_is_told(tiny_program: Program, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        aropt.optimize(tiny_program, **options)


@pytest.mark.parametrize(
    ("prompts", "n", "options", "words"),
    [
        ("abc", 3, {}, "prompt can't be a str[\\s\\S]*tokenizer"),
        (["abc"], 3, {}, "prompt 0 can't be a str"),
        ({"input_ids": [[1]]}, 3, {}, "prompt can't be a dict"),
        (None, 3, {}, "prompt can't be a NoneType"),
        (5, 3, {}, "prompt can't be a int"),
        ([[1.5]], 3, {}, "1.5 is no whole number"),
        (torch.tensor([[0.5]]), 3, {}, "0.5 is no whole number"),
        ([[1], 2], 3, {}, "prompt 1 can't be a int"),
        ([[[1]]], 3, {}, r"\[1\] is no whole number"),
        ([[1, None]], 3, {}, "None is no whole number"),
        ([], 3, {}, "prompt is empty"),
        (torch.zeros(2, 0, dtype=torch.int64), 3, {}, "prompt is empty"),
        ([[1]], 2.5, {}, "2.5 is no whole number[\\s\\S]*where: n"),
        ([[1]], "3", {}, "'3' is no whole number"),
        ([[1]], 3, {"seed": 0.5}, "0.5 is no whole number[\\s\\S]*where: seed"),
        ([[1]], 3, {"stop": "x"}, "stop can't be a str"),
        ([[1]], 3, {"stop": 11}, "token 11 is not in the vocabulary[\\s\\S]*where: stop"),
        ([[1]], 3, {"stop": [-1]}, "token -1 is not in the vocabulary"),
        ([[1]], 3, {"streams": "a"}, "streams can't be a str"),
        ([[1]], 3, {"temperature": "hot"}, "temperature can't be hot"),
        ([[1]], 3, {"temperature": None}, "temperature can't be None"),
    ],
)
def test_slips_are_told(tiny_program: Program, prompts: Any, n: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        generate(tiny_program, prompts, n, **options)
