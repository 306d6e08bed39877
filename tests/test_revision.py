"""Rules that look back: low-confidence re-masking and credit against plain Python, and what they must not change."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from aropt.commit import chosen
from aropt.errors import UsageError
from aropt.models.canvas import MASK, VOCAB, CanvasLM
from aropt.program import Program
from tests.test_unmask import capture, rounds, tiny

PROMPTS = [[4, 5, 6], [7], [8, 9, 1, 2]]


@pytest.fixture(scope="module")
def model() -> CanvasLM:
    return tiny()


@pytest.fixture(scope="module")
def segments(model: CanvasLM) -> Program:
    return capture(model, "segments", "remask")


def canvases(program: Program, prompt: list[int], n: int, **params: Any) -> list[list[int]]:
    """The canvas after each round."""
    kept: list[list[int]] = []

    def keep(values: Any) -> None:
        kept.append(values["tokens"][0].tolist())

    program.generate([prompt], n, on_round=keep, **params)
    return kept


def runs(rows: list[int]) -> list[list[int]]:
    """Neighbours together."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][-1] == row - 1:
            found[-1].append(row)
        else:
            found.append([row])
    return found


@torch.no_grad()
def remasking(
    model: CanvasLM, prompt: list[int], n: int, block: int, low: float, how: dict[str, Any]
) -> list[list[int]]:
    """dInfer's get_transfer_index_hierarchy_remask in plain Python, block by block: the canvas after each round.

    `how`: threshold and low of its runs ("segments"); of a threshold or of a quota `steps` alone, no runs.
    """
    x, kept = torch.tensor([prompt + [MASK] * n]), []
    for begin in range(len(prompt), len(prompt) + n, block):
        inside, step = range(begin, begin + block), 0
        while left := [i for i in inside if x[0, i] == MASK]:
            logits = model(x)[0].double()
            logits[:, MASK] = -torch.inf
            best, ids = logits.softmax(-1).max(-1)
            again = [i for i in inside if x[0, i] != MASK and best[i] < low]
            able = sorted([*left, *again])
            if "steps" in how:
                stay = sum(block // how["steps"] + (j < block % how["steps"]) for j in range(step + 1, how["steps"]))
                take, least = set(), len(able) - stay
            else:
                take, least = {i for i in able if best[i] > how["threshold"]}, len(again) + 1
            if "low" in how:
                top = [max(run, key=lambda i: (float(best[i]), -i)) for run in runs(able)]
                take |= {i for i in top if best[i] > how["low"]}
            rest = sorted([i for i in able if i not in take], key=lambda i: (-float(best[i]), i))
            take |= set(rest[: max(0, least - len(take))])
            for i in able:
                x[0, i] = ids[i] if i in take else MASK
            kept.append(x[0].tolist())
            step += 1
    return kept


def again(kept: list[list[int]]) -> int:
    """How often a written id was masked or changed."""
    return sum(a != b and a != MASK for x, y in pairwise(kept) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("low", [0.1, 0.3, 0.9])
def test_remasking_is_that_of_dinfer(model: CanvasLM, segments: Program, low: float) -> None:
    revised = 0
    for prompt in PROMPTS:
        want = remasking(model, prompt, 16, 8, low, {"threshold": 0.5, "low": 0.15})
        params = {"threshold": 0.5, "low": 0.15, "remask_threshold": low, "block": 8}
        assert canvases(segments, prompt, 16, **params) == want
        revised += again(want)
        masks = [row.count(MASK) for row in want]
        assert all(a > b for a, b in pairwise(masks))  # so it ends
    assert revised


@pytest.mark.parametrize(("rule", "how"), [("threshold", {"threshold": 0.2}), ("uniform", {"steps": 3})])
def test_remasking_with_other_tests(model: CanvasLM, rule: str, how: dict[str, Any]) -> None:
    """What is written follows from the threshold, or from a quota: then no more rounds than its steps."""
    program = capture(model, rule, "remask")
    params = {**how, "steps": 6} if "steps" in how else how
    for prompt in PROMPTS:
        want = remasking(model, prompt, 16, 8, 0.3, how)
        assert canvases(program, prompt, 16, remask_threshold=0.3, block=8, **params) == want
        assert again(want) and ("steps" not in how or len(want) == 6)


def test_nothing_is_below_a_threshold_of_0(model: CanvasLM, segments: Program) -> None:
    plain = capture(model, "segments")
    params = {"threshold": 0.3, "low": 0.15, "block": 8}
    assert rounds(segments, PROMPTS, 16, remask_threshold=0.0, **params) == rounds(plain, PROMPTS, 16, **params)


def test_given_ids_are_not_masked_again(segments: Program) -> None:
    """However unsure the model is of them; nor those of a prompt in a block of the model's own."""
    fill = [5, MASK, MASK, 6, MASK, 7, 8, MASK]
    for kept in canvases(segments, [1, 2], 8, fill=[fill], block=8, remask_threshold=1.0, threshold=0.3):
        assert all(k == f for k, f in zip(kept[2:], fill, strict=True) if f != MASK)
    own = capture(tiny(8), "segments", "remask")
    assert all(kept[:3] == [1, 2, 3] for kept in canvases(own, [1, 2, 3], 13, remask_threshold=1.0))


@torch.no_grad()
def crediting(
    model: CanvasLM, prompt: list[int], n: int, block: int, tau: float, weight: float, power: float, decay: float
) -> list[list[int]]:
    """dInfer's CreditThresholdParallelDecoder in plain Python: the canvas after each round."""
    x, kept = torch.tensor([prompt + [MASK] * n]), []
    for begin in range(len(prompt), len(prompt) + n, block):
        credit = torch.zeros(block, VOCAB, dtype=torch.float64)
        while (x[0, begin : begin + block] == MASK).any():
            logits = model(x)[0, begin : begin + block].double()
            logits[:, MASK] = -torch.inf
            credit *= decay
            best, ids = logits.softmax(-1).max(-1)
            for i in range(block):
                if x[0, begin + i] == MASK:
                    credit[i, ids[i]] += best[i] ** power
            best, ids = (logits + weight * torch.log(credit + 1)).softmax(-1).max(-1)
            masked = [i for i in range(block) if x[0, begin + i] == MASK]
            top = max(masked, key=lambda i: (float(best[i]), -i))
            for i in masked:
                if i == top or best[i] >= tau:
                    x[0, begin + i] = ids[i]
            kept.append(x[0].tolist())
    return kept


@pytest.mark.parametrize(("weight", "power", "decay"), [(0.7, 0.2, 0.8), (3.0, 0.5, 0.95)])
def test_credit_is_that_of_dinfer(model: CanvasLM, weight: float, power: float, decay: float) -> None:
    """And it does change what is written."""
    program, plain = capture(model, "threshold", "credit"), capture(model, "threshold")
    params = {"credit_weight": weight, "credit_power": power, "credit_decay": decay}
    differs = False
    for prompt in PROMPTS:
        got = canvases(program, prompt, 16, threshold=0.25, block=8, **params)
        assert got == crediting(model, prompt, 16, 8, 0.25, weight, power, decay)
        differs |= got != canvases(plain, prompt, 16, threshold=0.25, block=8)
    assert differs


def test_credit_of_weight_0_is_the_plain_rule(model: CanvasLM) -> None:
    with_credit, plain = capture(model, "margin", "cosine", "credit"), capture(model, "margin", "cosine")
    for more in ({}, {"temperature": 0.9, "seed": 2}):
        params: dict[str, Any] = {"block": 8, "steps": 8, **more}
        assert rounds(with_credit, PROMPTS, 16, credit_weight=0.0, **params) == rounds(plain, PROMPTS, 16, **params)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (("remask", "rcr"), "both decide which rows keep their ids"),
        (("remask", "guide-argmax"), "what the guide accepted is kept"),
        (("eoser", "guide-argmax"), "the guide decides"),
    ],
)
def test_bad_rules(rules: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why) as error:
        chosen(rules)
    assert error.value.code == 2


@pytest.mark.parametrize(("name", "value"), [("credit_decay", 1.5), ("credit_weight", -1), ("remask_threshold", -0.1)])
def test_bad_parameters(model: CanvasLM, name: str, value: float) -> None:
    program = capture(model, "threshold", name.partition("_")[0])
    with pytest.raises(UsageError, match=f"{name} can't be"):
        program.generate([[1]], 4, **{name: value})
