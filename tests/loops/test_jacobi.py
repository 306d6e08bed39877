"""tree-draft:draft=jacobi: what a round says of the places after its ids is what the next one drafts."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import aropt
from aropt.ir.program import Program
from aropt.pipeline.registry import make
from tests.support import draft_models
from tests.support.draft_models import CAPACITY

pytest.importorskip("transformers", reason="needs aropt[hf]")
PROMPTS = [[5, 6, 7, 5, 6, 7], [9], [3, 3, 3, 3, 8, 11, 30]]
NEW = 25
SLOW = pytest.mark.exhaustive


class Sticky(torch.nn.Module):
    """A model whose next id often does not depend on those before it, as in images: else no draft is ever right."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = draft_models.llama()
        self.vocab_size = draft_models.VOCAB

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found = self.inner(ids)
        logits: torch.Tensor = getattr(found, "logits", found)
        places = torch.arange(ids.shape[1]).unsqueeze(1)
        likely = ((places * 7 + torch.arange(logits.shape[2])) % 5 == 0) & (places % 3 != 0)
        return logits + 9.0 * likely * (torch.arange(logits.shape[2]) < 5)


@cache
def model() -> Sticky:
    return Sticky().eval()


@cache
def captured() -> Program:
    return aropt.capture(model(), capacity=CAPACITY)


@cache
def drafted(drafts: int, after: tuple[str, ...] = ()) -> Program:
    program, options = captured(), {"draft": "jacobi", "shape": f"chain:{drafts}"}
    for one in (make("canonicalize"), make("kv-cache"), make("tree-draft", options), *map(make, after)):
        program = one.run(program)
    return program


def rounds(program: Program, prompt: list[int]) -> tuple[list[int], int]:
    seen: list[int] = []
    ids = aropt.generate(program, [prompt], NEW, plain=True, on_round=lambda _: seen.append(1))[0]
    return ids, len(seen)


@torch.inference_mode()
def plain_loop(prompt: list[int], new: int, drafts: int) -> tuple[list[int], int]:
    """Jacobi decoding without a cache: ids, and rounds."""
    ids, ahead, count = [*prompt, int(model()(torch.tensor([prompt]))[0, -1].argmax())], [0] * drafts, 1
    while len(ids) < len(prompt) + new:
        says = model()(torch.tensor([ids + ahead]))[0, len(ids) - 1 :].argmax(1).tolist()
        right = next((i for i, (a, b) in enumerate(zip(ahead, says)) if a != b), drafts)
        ids += says[: right + 1]
        ahead, count = [says[min(right + 1 + i, drafts)] for i in range(drafts)], count + 1
    return ids[len(prompt) : len(prompt) + new], count


@pytest.mark.parametrize("drafts", [1, 4, pytest.param(9, marks=SLOW)])
def test_rounds_are_those_of_the_loop_without_a_cache(drafts: int) -> None:
    """Drafts never change an id: in how many rounds the ids come shows what was drafted."""
    fast, counts = drafted(drafts), []
    for prompt in PROMPTS:
        ids, count = rounds(fast, prompt)
        assert (ids, count) == plain_loop(prompt, NEW, drafts)
        counts.append(count)
    assert max(counts) < NEW, "no draft was right, so that nothing is compared"


@pytest.mark.parametrize("prompts", [[PROMPTS[0]], PROMPTS], ids=["alone", "ragged"])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "stop": [2, 4]}])
def test_ids_are_those_of_the_plain_loop(prompts: list[list[int]], params: dict[str, Any]) -> None:
    want = aropt.generate(captured(), prompts, NEW, plain=True, **params)
    assert aropt.generate(drafted(4), prompts, NEW, plain=True, **params) == want


def test_up_to_the_capacity() -> None:
    full = [[4] * (CAPACITY - 5)]
    assert aropt.generate(drafted(4), full, 6, plain=True) == aropt.generate(captured(), full, 6, plain=True)
