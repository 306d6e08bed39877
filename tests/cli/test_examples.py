"""What README and docs print for readers to copy: commands parse, name what there is, and run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn

from aropt.cli import main as cli
from aropt.cli.asked import check
from aropt.cli.options import Doing, Reading, Writing
from aropt.frontend.sources import findable
from aropt.ir import ops
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.loops import scheme
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
    """The words of each line that calls aropt, indented or in a block of shell, without its comment."""
    shell = "".join(fenced(text, "sh"))
    lines = re.findall(r"^    (aropt .*)$", text, re.M) + re.findall(r"^(aropt .*)$", shell, re.M)
    return [shlex.split(line, comments=True)[1:] for line in lines]


def fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def blocks(page: Path) -> list[str]:
    return fenced(page.read_text(), "python")


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
        read = Reading(given["model"], rule=given["rule"], loop=given["loop"], guide=given["guide"])
        check(read, Doing(given["target"]), Writing(given["out"], print_after=given["print_after"]))
        monkeypatch.setattr(registry, "ADDED", {})
        for name in given["plugin"] or ():  # the page says what it holds
            (tmp_path / name).write_text(blocks(ROOT / "docs" / "writing_passes.md")[0])
            plugins.load(tmp_path / name)
        pipeline(given["passes"] or (), given["no_pass"] or ())
        budget(given["budget"])
        assert findable(given["model"]) or given["model"] in GIVEN | {"mymodel.py:build", "exported.pt2"}


RUN = {  # blocks of each page by language; tests/pipeline/test_plugins.py runs the Python of writing_passes
    ("README", "sh"): 1, ("README", "python"): 1, ("onnx_loop", "python"): 3, ("adding_a_loop", "python"): 6,
    ("adding_a_mixer", "python"): 4,
    ("writing_passes", "python"): 1, ("writing_passes", "toml"): 1, ("design", ""): 1,
}  # fmt: skip


def test_every_block_is_one_that_a_test_runs() -> None:
    """Fences as `RUN` counts them; what is indented calls aropt. A page with another block needs a test of it."""
    found: dict[tuple[str, str], int] = {}
    for page in PAGES:
        words = page.read_text()
        for number, lang in enumerate(re.findall(r"^```(.*)$", words, re.M)):
            if number % 2 == 0:
                found[page.stem, lang] = found.get((page.stem, lang), 0) + 1
        rest = re.sub(r"^```.*?^```$", "", words, flags=re.M | re.S)
        assert all(line.startswith("    aropt ") for line in re.findall(r"^    .*$", rest, re.M)), page
    assert found == RUN
    for page in PAGES:
        for block in blocks(page):
            compile(block, str(page), "exec")


def test_files_that_pages_name_are_there() -> None:
    roots = "aropt|passes|kernels|exporters|tests|perf|docs"
    for page in PAGES:
        words = page.read_text()
        for name in re.findall(rf"`((?:{roots})/[\w/.-]+)`", words):
            assert (ROOT / name).exists(), (page, name)
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", words):
            assert (page.parent / link).exists(), (page, link)


def test_the_glossary_is_sentences() -> None:
    """A word a line in order; each sentence begins with a capital letter or the word as code, and ends."""
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "glossary.md").read_text().splitlines()[6:]]
    words, sentences = [row[0].strip() for row in rows], [row[1].strip() for row in rows]
    assert words == sorted(words) and len(words) > 30
    assert [s for s in sentences if not re.fullmatch(r"[A-Z`].*\.", s)] == []


def test_the_page_on_passes_lists_all() -> None:
    known = {name: registry.pass_class(name).contract.level for name in registry.names()}
    listed: dict[str, str] = {}
    for names, level in re.findall(r"^\| (`.*?) \| (\w+) \|", (ROOT / "docs" / "passes.md").read_text(), re.M):
        listed |= dict.fromkeys(re.findall("`(.*?)`", names), level)
    assert listed == known


def test_entry_points_and_control_are_as_printed(tiny_program: Program) -> None:
    """writing_passes: the group of entry points; design: the lines that `aropt inspect` prints, in order."""
    (table,) = fenced((ROOT / "docs" / "writing_passes.md").read_text(), "toml")
    assert tomllib.loads(table)["project"]["entry-points"] == {registry.GROUP: {"title": "package.module:PASS"}}
    (printed,) = fenced((ROOT / "docs" / "design.md").read_text(), "")
    lines = iter(text(tiny_program).splitlines())
    missing = [line for line in printed.splitlines() if line.strip() != "..." and line not in lines]
    assert not missing


def test_the_page_on_loops_runs_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks, one after the other, are a file with a kind of loop, which validates."""
    monkeypatch.setattr(scheme, "REGISTERED", dict(scheme.REGISTERED))
    scheme.REGISTERED.pop("flow", None)  # the toy of this name
    names: dict[str, Any] = {"__name__": "flow"}
    for block in blocks(ROOT / "docs" / "adding_a_loop.md"):
        exec(block, names)
    assert len(names["made"].report["verify"]["cases"]) > 3 and scheme.scheme("flow") is names["SCHEME"]


def test_the_page_on_mixers_runs_as_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks are a file with an op and a model whose state is cached."""
    monkeypatch.setattr(ops, "ADDED", dict(ops.ADDED))
    names: dict[str, Any] = {"__name__": "decayed_sum"}
    for block in blocks(ROOT / "docs" / "adding_a_mixer.md"):
        exec(block, names)
    made = names["made"]
    assert made.report["verify"]["status"] == "pass"
    assert [s.spec.dims for s in made.program.state.values() if s.kind == "recurrent"] == [("B", 16)]
    scanned = names["scanned"]
    assert scanned.report["verify"]["status"] == "pass" and "aropt.scan(" in text(scanned.program)
    assert [s.spec.dims for s in scanned.program.state.values() if s.kind == "recurrent"] == [("B", 16)]


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
    (folder / "title.py").write_text(blocks(ROOT / "docs" / "writing_passes.md")[0])
    (folder / "prompts.jsonl").write_text('"def f("\n[4, 5]\n')
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s", max=64)},)
    plain = nn.Sequential(nn.Embedding(200, 16), nn.Linear(16, 200))
    exported = torch.export.export(plain, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=shapes)
    torch.export.save(exported, folder / "exported.pt2")
    return folder


SECTIONS = [part for page in PAGES for part in page.read_text().split("\n## ") if re.search("^    aropt ", part, re.M)]


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
def test_the_quickstart_runs_as_printed(tmp_path: Path) -> None:
    """Twice: who pastes it again overwrites what it made."""
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name, words in (("aropt", "-m aropt.cli.main"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (tools / name).chmod(0o755)
    (tools / "activate").write_text(f"PATH={tools}:$PATH\n")
    (shell,) = fenced((ROOT / "README.md").read_text(), "sh")
    for _ in range(2):
        subprocess.run(
            ["bash", "-e", "-c", shell], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
        )
    assert (tmp_path / "build" / "digits.png").is_file() and (tmp_path / "build" / "digits-onnx").is_dir()


@pytest.mark.exhaustive
def test_blocks_and_what_they_read_run_as_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    (api,), (once, chunks, canvas) = blocks(ROOT / "README.md"), blocks(ROOT / "docs" / "onnx_loop.md")
    names: dict[str, Any] = {}
    exec(api, names)
    assert names["same"].generate([[20]], 4) == names["fast"].generate([[20]], 4)
    for model, read in (("text-ar", [once, chunks]), ("text-mdlm", [once.split("tokens, counts")[0], canvas])):
        for made in ("out", "out-onnx"):
            shutil.rmtree(place / made, ignore_errors=True)
        assert called(place, "optimize", model, "-o", "out", "--runs", "0") == 0
        assert called(place, *shlex.split("export out --to onnx --whole-loop")) == 0
        names = {}
        for block in read:
            exec(block, names)
    assert names["canvases"].shape[0] == 2
