"""Recipes: their registry, the committed results, the page that is made of them, and the commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import aropt.recipes.__main__ as writing
from aropt.bench.drafted import counted, difference
from aropt.errors import UsageError, VerificationFailed
from aropt.recipes import FOLDER, Recipe, Row, checkpoint, names, recipe, results
from aropt.recipes._page import PAGE, page
from tests.support.commands import aropt, refused

MOST = 2**20  # bytes of a checkpoint


def test_each_recipe_was_measured_and_holds() -> None:
    """Nothing is listed that was not measured, nor the other way round; rows are those that the check yields."""
    found = results()
    assert sorted(found) == names()
    for result in found.values():
        assert {"python", "torch", "onnxruntime", "transformers"} == result["versions"].keys()
        assert result["rows"]
        for row in result["rows"]:
            assert Row(**row).holds and row["n"] > 0


def test_the_page_is_that_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(results()), "write it again: python -m aropt.recipes --page"


def test_the_page_shows_each_row() -> None:
    """A figure that changes, or a claim that fails, is on the page."""
    found = results()
    one = next(iter(found))
    changed = json.loads(json.dumps(found))
    changed[one]["rows"][0] |= {"measured": "a | b", "holds": False}
    text = page(changed)
    assert "a \\| b" in text and "**no**" in text and "**no**" not in page(found)
    assert page({}).count("Not measured yet.") == len(names())


def test_checkpoints_belong_to_recipes_and_are_small() -> None:
    trained = {checkpoint(name) for name in names() if recipe(name).train is not None}
    assert trained == set((FOLDER / "checkpoints").glob("*"))
    assert all(path.stat().st_size <= MOST for path in trained)


def test_a_name_is_that_of_a_file() -> None:
    files = [file.stem for file in FOLDER.glob("*.py") if not file.stem.startswith("_")]
    assert names() == sorted(file.replace("_", "-") for file in files)
    with pytest.raises(UsageError, match="unknown recipe 'nothing'") as caught:
        recipe("nothing")
    assert all(name in str(caught.value.hint) for name in names())


def test_the_commands_refuse_what_is_no_recipe() -> None:
    refused(aropt("recipes", "run", "nothing"), 2, "unknown recipe 'nothing'", names()[0])
    refused(aropt("recipes", "run"), 2, "NAME")
    refused(aropt("recipes", "walk"), 2, "walk")


def test_recipes_are_listed() -> None:
    done = aropt("recipes", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["name"] for one in found] == names()
    assert [one["rows"] for one in found] == [results()[name]["rows"] for name in names()]
    text = aropt("recipes").stdout
    assert all(f"{name}: {recipe(name).title}" in text for name in names())


@pytest.mark.parametrize("holds", [True, False])
def test_a_recipe_is_run(holds: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are printed, and a claim that fails is an exit status."""

    def check(say: Any, quick: bool) -> Iterator[Row]:
        say("measuring")
        yield Row("two is even", f"it is, quick: {quick}", 1, "number", True)
        yield Row("three is even", "it is looked at", 1, "number", holds)

    made = Recipe("numbers", "nobody", "nothing", "none", check)
    monkeypatch.setitem(sys.modules, f"aropt.recipes.{names()[0].replace('-', '_')}", SimpleNamespace(RECIPE=made))
    done = aropt("recipes", "run", names()[0], "--quick", "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["holds"] for row in rows] == [True, holds] and rows[0]["measured"] == "it is, quick: True"
    if holds:
        assert done.returncode == 0 and "measuring" in done.stderr
    else:
        refused(done, 3, "three is even")
    assert "two is even" in aropt("recipes", "run", names()[0]).stdout


class Next(nn.Module):
    """The id after each one is the next number, but that of 5 is 6 or 7 by a hair."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = torch.nn.functional.one_hot(ids + 1, 20).float()
        return logits + 0.9999 * (ids.unsqueeze(-1) == 5) * torch.nn.functional.one_hot(ids + 2, 20)


def written(ids: list[int], rounds: int) -> Any:
    """A program that gives these ids in so many rounds."""

    def generate(prompts: list[list[int]], n: int, plain: bool, on_round: Any) -> list[list[int]]:
        for number in range(rounds):
            on_round(number)
        return [ids[:n]]

    return SimpleNamespace(generate=generate)


def test_drafts_are_counted() -> None:
    """Verifications are rounds after the prompt's; ids that differ are a tie or an error."""
    programs = {"plain": written([4, 5, 6], 3), "same": written([4, 5, 6], 2), "tie": written([4, 5, 7], 2)}
    (row,) = counted(programs, Next(), [[3]], 3)
    assert row["checks"] == {"plain": 2, "same": 1, "tie": 1}
    assert row["differs"]["same"] is None and row["differs"]["tie"]["at"] == 2
    assert 0 < row["differs"]["tie"]["gap"] < 1e-3
    with pytest.raises(VerificationFailed, match="number 1 on"):
        difference(Next(), [3], [4, 5, 6], [4, 6, 7])
    with pytest.raises(VerificationFailed, match="number -1 on"):
        difference(Next(), [3], [4, 5, 6], [4, 5])


def test_what_is_trained_and_measured_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint in bfloat16, readable to all; the rows beside those of the others, with the versions."""

    def check(say: Any, quick: bool) -> Iterator[Row]:
        assert not quick
        yield Row("it is measured", "once", 1, "time", True)

    made = Recipe("numbers", "nobody", "nothing", "none", check, lambda: nn.Linear(2, 3))
    before = {"other": {"versions": {}, "rows": []}}
    (tmp_path / "results.json").write_text(json.dumps(before))
    monkeypatch.setattr(writing, "recipe", lambda name: made)
    monkeypatch.setattr(writing, "checkpoint", lambda name: tmp_path / "checkpoints" / name)
    monkeypatch.setattr(writing, "results", lambda: before)
    monkeypatch.setattr(writing, "RESULTS", tmp_path / "results.json")
    writing.train("numbers")
    saved = load_file(tmp_path / "checkpoints" / "numbers")
    assert {n: (v.dtype, tuple(v.shape)) for n, v in saved.items()} == {
        "weight": (torch.bfloat16, (3, 2)), "bias": (torch.bfloat16, (3,)),
    }  # fmt: skip
    assert (tmp_path / "checkpoints" / "numbers").stat().st_mode & 0o044 == 0o044
    writing.measure("numbers")
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["other"] == before["other"] and found["numbers"]["rows"][0]["measured"] == "once"
    assert found["numbers"]["versions"]["torch"] == torch.__version__
