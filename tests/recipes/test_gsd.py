"""GSD: draws are placed by the chances of their own rows, and a claim fails where its figures do not bear it."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from aropt.ir.program import Entry
from aropt.pipeline.registry import make
from aropt.recipes import gsd
from aropt.validate.draws import RARE, Draws, shifted
from tests.support import draft_models
from tests.support.accept_programs import captured

PROMPT, NEW, COUNT = [1, 3], 20, 60
BOTH = (gsd.EXACT, gsd.GROUPED)


@torch.inference_mode()
def drawn(temperature: float, stream: int, new: int = NEW) -> list[int]:
    """A text by the model alone."""
    model, generator = draft_models.few(), torch.Generator().manual_seed(stream)
    ids = torch.tensor([PROMPT])
    for _ in range(new):
        p = (model(ids)[:, -1] / temperature).softmax(1)
        ids = torch.cat([ids, p.multinomial(1, generator=generator)], 1)
    found: list[int] = ids[0, len(PROMPT) :].tolist()
    return found


def shift(texts: list[list[int]]) -> Draws:
    """Of the places of these texts."""
    uniform, model = random.Random(1), draft_models.few()
    found = [x for ids in texts for x in gsd.places(model, PROMPT, ids, uniform)]
    assert len(found) == len(texts) * (NEW - 1)
    return Draws(shifted(torch.tensor(found, dtype=torch.float64)), len(found))


def test_places_are_uniform_where_the_model_draws() -> None:
    """One for each id but the first; where it draws at another temperature they are not."""
    assert shift([drawn(1.0, i) for i in range(COUNT)]).chance > 1e-3
    assert shift([drawn(0.6, i) for i in range(COUNT)]).chance < RARE


def drawing(sharper: float, count: int) -> Any:
    """A program that draws so much more sharply than it is asked to, in so many rounds."""

    def generate(
        prompts: list[list[int]], n: int, plain: bool, on_round: Any, temperature: float, streams: list[int]
    ) -> list[list[int]]:
        assert plain and prompts == [PROMPT]
        for number in range(count):
            on_round(number)
        return [drawn(temperature / sharper, streams[0], n)]

    return SimpleNamespace(generate=generate)


@cache
def answers() -> list[dict[str, Any]]:
    programs = {gsd.EXACT: drawing(1.0, 11), gsd.GROUPED: drawing(1.6, 9)}
    return list(gsd.answered(programs, draft_models.few(), [PROMPT] * COUNT, NEW))


def test_draws_are_counted_and_their_shifts_measured() -> None:
    """Each prompt has a noise of its own; the prompt's round is no verification."""
    assert all(row["checks"] == {gsd.EXACT: 10, gsd.GROUPED: 8} for row in answers())
    assert len({tuple(row["places"][gsd.EXACT]) for row in answers()}) == COUNT
    assert gsd.shifts(answers()).holds and gsd.faster(answers(), "ids", "prompts").holds
    assert gsd.faster(answers(), "ids", "prompts").measured.startswith(
        "2.38 (95 %: 2.38 to 2.38) ids, by rejection 1.90"
    )


def test_claims_fail_without_a_difference() -> None:
    """Where rejection is shifted too, or groups are not, and where they give no more ids."""
    for one in BOTH:
        alike = [{key: dict.fromkeys(BOTH, row[key][one]) for key in row} for row in answers()]
        assert not gsd.shifts(alike).holds and not gsd.faster(alike, "ids", "prompts").holds


def test_ties_are_told() -> None:
    row = {"differs": {"none": None, "match": None}}
    tie = {"differs": {"none": None, "match": {"at": 3, "gap": 1e-5}}}
    assert "ties" not in gsd.same([row, row]).measured and "but for 1 ties" in gsd.same([row, tie]).measured


@pytest.mark.parametrize("wrong", [{}, {gsd.GROUPED: "distribution"}, {gsd.EXACT: "rounding"}])
def test_labels_are_those_of_the_ledgers(wrong: dict[str, Any]) -> None:
    levels = {rule: make("tree-draft", {"accept": rule}).contract.level for rule in BOTH} | wrong
    ledgers = {rule: (Entry("prune", "bitwise"), Entry("tree-draft", level)) for rule, level in levels.items()}
    row = gsd.labels({rule: captured().replace(ledger=ledger) for rule, ledger in ledgers.items()})
    assert row.holds == (not wrong) and all(f"{rule}: {level}" in row.measured for rule, level in levels.items())
