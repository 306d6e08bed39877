"""Every rule on every target: its graphs translate, and give what they give in the reference interpreter."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.frontend.sources import Source
from aropt.ir.program import Program
from aropt.loops.rules import PROCESSORS
from aropt.loops.unmask import commit
from aropt.pipeline import api
from aropt.targets import lower
from tests.support.run import generate

VOCAB, MASK, CAPACITY = 12, 11, 16
BIAS = [0.3 * (i % 3) for i in range(VOCAB)]
VALUES = {
    "temperature": 0.9, "top_k": 6, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.3, "bias": BIAS,
    "guidance": 1.7, "guidance_from": 1, "guidance_to": 4, "steps": 3, "threshold": 0.3,
    "suppress_tokens": [2, 7], "begin_suppress_tokens": [1, 3], "min_new_tokens": 4, "stop": [5, 6],
}  # fmt: skip
TOGETHER = [
    ("cosine", "margin", "rcr", "credit"), ("shifted", "entropy", "eoser", "smooth"), ("threshold", "remask"),
]  # fmt: skip
exhaustive = pytest.mark.exhaustive
targets = pytest.mark.parametrize(
    "target", ["onnxruntime", pytest.param("inductor", marks=[exhaustive, pytest.mark.slow])]
)


class Words(nn.Module):
    """Each id and its place give logits, and so does what stands before it."""

    capacity = CAPACITY

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.places = nn.Parameter(torch.randn(CAPACITY, 8))
        self.embed.weight.data *= 3

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places[: ids.shape[1]]
        logits: Tensor = self.head(x + x.cumsum(1) / 3)
        return logits


@cache
def source() -> Source:
    """The model, captured once for all rules."""
    found = api.given(Words(), None)
    captured = found.captured()
    found.captured = lambda: captured  # type: ignore[method-assign]
    return found


def lowered_is_the_reference(program: Program, target: str, given: dict[str, Any]) -> None:
    values = {n: v for n, v in given.items() if n in program.inputs}
    prompts = [[1, 2, 3], [4, 2, 5]] if program.meta.get("loop") == "unmask" else [[1, 2, 3], [4]]
    executor = lower(program, target)
    for more in ({"temperature": 0.0}, {"seed": 3}):
        wanted = generate(program, prompts, 8, **{**values, **more})
        got = generate(program, prompts, 8, executor=executor, **{**values, **more})
        assert got == wanted


def canvas(rules: tuple[str, ...]) -> Program:
    guide = source() if set(rules) & set(commit.JUDGES) else None
    return aropt.capture(source(), rules=rules, mask=MASK, loop="unmask", guide=guide)


@targets
def test_rules_of_one_id_after_another(target: str) -> None:
    """All of them: guidance in an interval covers guidance."""
    lowered_is_the_reference(aropt.capture(source(), rules=[*PROCESSORS], null=0), target, VALUES)


@targets
@exhaustive
@pytest.mark.parametrize("rule", PROCESSORS)
def test_each_rule_of_one_id_after_another(rule: str, target: str) -> None:
    lowered_is_the_reference(aropt.capture(source(), rules=[rule], null=0), target, VALUES)


@targets
@pytest.mark.parametrize(
    "rules", [("doubling",), *(pytest.param(rules, marks=exhaustive) for rules in TOGETHER)], ids="-".join
)
def test_rules_of_a_canvas(rules: tuple[str, ...], target: str) -> None:
    lowered_is_the_reference(canvas(rules), target, VALUES)


@targets
@exhaustive
@pytest.mark.parametrize("rule", commit.KNOWN)
def test_each_rule_of_a_canvas(rule: str, target: str) -> None:
    lowered_is_the_reference(canvas((rule,)), target, VALUES)
