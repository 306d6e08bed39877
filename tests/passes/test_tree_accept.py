"""tree-draft's rules of acceptance: texts of rejection have the model's distribution, those of lossy rules say so."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.loops import accept, drafters
from aropt.loops.accept import ACCEPT, COINS, Accepted, Tree
from aropt.pipeline.registry import make, pass_class
from tests.support import draft_models
from tests.support.draft_models import Few

FILE = Path(draft_models.__file__)
LENGTH, PROMPT = 3, [1, 3]
DRAWN: dict[str, Any] = {"temperature": 1.0}
Text = tuple[int, ...]


@cache
def captured() -> Program:
    return aropt.capture(draft_models.few(), capacity=24)


@cache
def drafted(rule: str, shape: str, draft: str = "few_draft") -> Program:
    """The program of five ids with a tree of drafts, for batches of any size; nothing is lowered."""
    program, named = captured(), f"{FILE}:{draft}" if hasattr(draft_models, draft) else draft
    options = {"draft": named, "shape": shape, "accept": rule, "most": "100000"}
    for one in (make("canonicalize"), make("kv-cache"), make("tree-draft", options)):
        program = one.run(program)
    verify(program)
    return program


def chances(temperature: float = 1.0, top_k: int = 0) -> dict[Text, float]:
    """The chance of each text after the prompt, by the model alone."""
    texts = list(itertools.product(range(Few.vocab), repeat=LENGTH))
    with torch.no_grad():
        logits = draft_models.few()(torch.tensor([[*PROMPT, *text] for text in texts])).double() / temperature
    if top_k:
        logits = torch.where(logits >= logits.topk(top_k).values[..., -1:], logits, -torch.inf)
    p = logits[:, len(PROMPT) - 1 : -1].softmax(2).gather(2, torch.tensor(texts).unsqueeze(2)).prod(1)
    return dict(zip(texts, p.flatten().tolist(), strict=True))


def counted(program: Program, count: int, seed: int = 3, **params: Any) -> dict[Text, int]:
    """How often each text comes in so many streams of noise, in one batch."""
    texts = aropt.generate(program, [PROMPT] * count, LENGTH, plain=True, seed=seed, **{**DRAWN, **params})
    found, counts = torch.tensor(texts).unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))


def p_value(counts: dict[Text, int], wanted: dict[Text, float]) -> float:
    """The chance of such counts, or of ones further off (chi-square); rare texts count as one, impossible ones as 0."""
    total = sum(counts.values())
    if any(not wanted[text] for text in counts):
        return 0.0
    cells = [(counts.get(text, 0), p * total) for text, p in wanted.items() if p * total >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(n for _, n in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    return float(torch.special.gammaincc(*(torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2)))


def sizes(*counts: int) -> Any:
    """Fewer texts in the quick suite."""
    return pytest.mark.parametrize("count", [counts[0], pytest.param(counts[1], marks=pytest.mark.exhaustive)])


WAYS = [("chain:2", "few_draft"), ("2x2", "few_draft"), ("0-0-1", "self"), ("chain:2", "text")]


@sizes(10_000, 100_000)
@pytest.mark.parametrize(("shape", "draft"), WAYS)
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 3}], ids=["warm", "top-k"])
def test_texts_have_the_model_s_distribution(shape: str, draft: str, params: dict[str, Any], count: int) -> None:
    program = drafted("rejection", shape, draft)
    assert p_value(counted(program, count, **params), chances(**params)) > 1e-3


def another(tree: Tree, deepest: int, drafted: Tensor, **given: Any) -> Accepted:
    return accept.rejection(tree, deepest, drafted=drafted.roll(1, 2), **given)


def believed(tree: Tree, deepest: int, logits: Tensor, drafted: Tensor, **given: Any) -> Accepted:
    return accept.rejection(tree, deepest, drafted, drafted, **given)


def unreduced(*given: Any) -> Any:
    return OFFERED(*given)[0], given[1]


OFFERED = accept.offered
SLIPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "drafts of other chances": lambda m: m.setitem(ACCEPT, "rejection", replace(ACCEPT["rejection"], apply=another)),
    "drafts are believed": lambda m: m.setitem(ACCEPT, "rejection", replace(ACCEPT["rejection"], apply=believed)),
    "nothing is taken away": lambda m: m.setattr(accept, "offered", unreduced),
    "drafts by the noise of coins": lambda m: m.setattr(drafters, "DRAFTS", COINS),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_seen_in_the_texts(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would not tell much."""
    SLIPS[slip](monkeypatch)
    program = drafted.__wrapped__("rejection", "chain:2")  # not to be kept
    assert p_value(counted(program, 10_000), chances()) < 1e-6


@pytest.mark.parametrize("rule", ["typical", "grouped"])
def test_lossy_rules_have_another_distribution(rule: str) -> None:
    assert p_value(counted(drafted(rule, "chain:2"), 5000), chances()) < 1e-6


@pytest.mark.parametrize("rule", ACCEPT)
def test_choices_are_those_of_the_plain_loop(rule: str) -> None:
    """With temperature 0 chances are 0 and 1, and each rule accepts what the model itself picks."""
    prompts = [[1, 3], [2], [4, 0, 2, 1]]
    want = aropt.generate(captured(), prompts, 9, plain=True)
    assert aropt.generate(drafted(rule, "chain:2"), prompts, 9, plain=True) == want


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    program, prompts = drafted("rejection", "2x2"), [[1, 3], [2], [4, 0, 2, 1], [3]]
    together = aropt.generate(program, prompts, 12, plain=True, seed=4, stop=[0], **DRAWN)
    alone = [aropt.generate(program, [p], 12, plain=True, seed=4, stop=[0], streams=[i], **DRAWN)[0]
             for i, p in enumerate(prompts)]  # fmt: skip
    assert together == alone and len(set(map(len, together))) > 1


def test_levels_are_those_of_the_rule() -> None:
    found = {rule: make("tree-draft", {"accept": rule}).contract for rule in ACCEPT}
    assert {n: c.level for n, c in found.items()} == {n: r.label for n, r in ACCEPT.items()}
    assert [n for n, c in found.items() if c.budget] == ["typical", "grouped"]
    assert pass_class("tree-draft").contract.level == "rounding"
    with pytest.raises(UsageError, match="no rule of acceptance") as caught:
        make("tree-draft", {"accept": "all"})
    assert "match, rejection, typical, grouped" in caught.value.hint
