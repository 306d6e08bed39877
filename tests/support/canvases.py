"""A tiny canvas model, captured once for all rules, and how many rounds a generation takes."""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import Any

import torch

import aropt
from aropt.frontend.facts import Source
from aropt.ir.program import Program
from aropt.models.canvas import MASK, CanvasLM
from aropt.pipeline import api
from tests.support.run import generate


@cache
def tiny(block: int = 0) -> CanvasLM:
    """One model of a kind for all modules; do not change it in place."""
    torch.manual_seed(1)
    model = CanvasLM(block, width=32, layers=2, heads=2, hidden=48)
    for parameter in model.parameters():
        parameter.data *= 4  # else all logits are about alike
    model.capacity = 64  # type: ignore[assignment]
    return model.eval()


@cache
def capture(model: CanvasLM, *rules: str) -> Program:
    return aropt.capture(source(model), mask=MASK, block=model.block, rules=rules)


def source(model: CanvasLM) -> Source:
    """The model, captured once for all rules and modules."""
    found = copy(traced(model))
    found.meta = dict(found.meta)  # what a capture is given goes there
    return found


@cache
def traced(model: CanvasLM) -> Source:
    found = api.given(model, None)
    captured = found.captured()
    found.captured = lambda: captured  # type: ignore[method-assign]
    return found


def rounds(program: Program, prompts: list[list[int]], n: int, **params: Any) -> tuple[list[list[int]], int]:
    """Answers, and after how many rounds."""
    seen: list[None] = []
    return generate(program, prompts, n, on_round=lambda _: seen.append(None), **params), len(seen)
