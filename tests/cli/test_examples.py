"""What README and docs print for readers to copy: commands parse, name what there is, and run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from aropt.cli import main as cli
from aropt.cli.optimize import check_names
from aropt.frontend.sources import findable
from aropt.models import CHECKPOINTS
from aropt.pipeline import plugins, registry
from aropt.pipeline.registry import pipeline
from aropt.validate.drift import budget

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GIVEN = {"path/to/hf_directory", "MODEL_DIR", "BERT_DIR", "MODEL"}  # a reader's own
MODULE = """
from torch import nn


class Words(nn.Module):
    capacity = 512

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(200, 16), nn.Linear(16, 200)

    def forward(self, ids):
        return self.head(self.embed(ids))


build = Words
"""


def commands(text: str) -> list[list[str]]:
    """The words of each indented line that calls aropt, without its comment."""
    lines = re.findall(r"^    (aropt .*)$", text, re.M)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


ALL = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page in PAGES for words in commands(page.read_text())
]


@pytest.mark.parametrize("words", ALL)
def test_commands_parse_and_name_what_there_is(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app: Any = typer.main.get_command(cli.app)
    with app.make_context("aropt", list(words)) as context:
        name, found, rest = app.resolve_command(context, list(words))
        given = found.make_context(name, rest).params
    if name == "optimize":
        check_names(given["target"], given["loop"], given["rule"] or (), given["guide"], given["print_after"] or ())
        monkeypatch.setattr(registry, "ADDED", {})
        for name in given["plugin"] or ():  # the page says what it holds
            (tmp_path / name).write_text(blocks(ROOT / "docs" / "writing_passes.md")[0])
            plugins.load(tmp_path / name)
        pipeline(given["passes"] or (), given["no_pass"] or ())
        budget(given["budget"])
        assert findable(given["model"]) or given["model"] in GIVEN | {"mymodel.py:build", "exported.pt2"}


def test_blocks_are_python() -> None:
    found = [(page, block) for page in PAGES for block in blocks(page)]
    assert len(found) >= 4
    for page, block in found:
        compile(block, str(page), "exec")


def called(folder: Path, *words: str) -> int:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "aropt.cli.main", *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    return done.returncode


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's own models, by the names that the examples have for them."""
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("reader")
    for name in GIVEN - {"BERT_DIR"}:
        shutil.copytree(CHECKPOINTS / "text-ar", folder / name)
    torch.manual_seed(0)
    bert = BertConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=120,
        max_position_embeddings=128,
    )  # fmt: skip
    BertForMaskedLM(bert).save_pretrained(folder / "BERT_DIR")
    (folder / "mymodel.py").write_text(MODULE)
    (folder / "prompts.jsonl").write_text('"def f("\n[4, 5]\n')
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s", max=64)},)
    plain = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 200))
    exported = torch.export.export(plain, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=shapes)
    torch.export.save(exported, folder / "exported.pt2")
    return folder


SECTIONS = [part for part in (ROOT / "README.md").read_text().split("\n## ") if re.search("^    aropt ", part, re.M)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("section", SECTIONS, ids=lambda part: part.splitlines()[0])
def test_commands_run_as_printed(section: str, place: Path) -> None:
    """One after the other; beside the timing, which needs a quiet machine. Each result gives way to the next."""
    for words in commands(section):
        if words[0] == "optimize":
            shutil.rmtree(place / words[words.index("-o") + 1], ignore_errors=True)
            words = [*words, "--runs", "0"]
        if words[0] != "bench":
            shutil.rmtree(place / "out-onnx", ignore_errors=True)
            assert called(place, *words) == (3 if "token-shuffle:window=2" in words else 0), words


@pytest.mark.exhaustive
def test_blocks_and_what_they_read_run_as_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names: dict[str, Any] = {}
    exec(MODULE, names)
    api, once, chunks, canvas = blocks(ROOT / "README.md")
    shutil.rmtree(place / "out", ignore_errors=True)
    exec(api, {"model": names["Words"]()})
    for model, read in (("text-ar", [once, chunks]), ("text-mdlm", [once.split("tokens, counts")[0], canvas])):
        for made in ("out", "out-onnx"):
            shutil.rmtree(place / made, ignore_errors=True)
        assert called(place, "optimize", model, "-o", "out", "--runs", "0") == 0
        assert called(place, *shlex.split("export out --to onnx --whole-loop")) == 0
        names = {}
        for block in read:
            exec(block, names)
    assert names["canvases"].shape[0] == 2
