"""The command line's options: what can't be is said before any work, and infilling with its blanks."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.cli import main as cli
from aropt.cli import optimize as command
from aropt.cli.infill import answers, stops
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.pipeline.artifact import save

MASK = 11


class Places(nn.Module):
    """A canvas of 12 ids, whose logits say each row's place."""

    capacity, mask = 16, MASK

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 12)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1]).float()
        return self.embed(ids) * 0.01 - (at[:, None] - torch.arange(12.0)[None]).abs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_program: Program) -> Path:
    """A canvas and a text-less model as artifacts."""
    made = tmp_path_factory.mktemp("options")
    for name, program in (("canvas", aropt.capture(Places())), ("tiny", tiny_program)):
        fast = aropt.optimize(program, target="eager", passes=[], check=False)
        meta = {**fast.program.meta, "modality": "tokens", "prompts": [[1]]}
        save(fast.program.replace(meta=meta), made / name, report=fast.report)
    return made


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: its exit status, and what it printed."""

    def call(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["aropt", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        printed = capsys.readouterr()
        return int(done.value.code or 0), printed.out + printed.err

    return call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--threads 0", "--threads"), ("--threads -3", "--threads"), ("--threads 100000", "--threads"),
        ("--tokens 0", "--tokens"), ("--runs -1", "--runs"), ("--seed -1", "--seed"), (f"--seed {2**62}", "--seed"),
        ("--mask -1", "--mask"), ("--block -1", "--block"), ("--capacity 1", "capacity 1 leaves no room"),
        ("--target gpu", "unknown target 'gpu'"), ("--loop round", "unknown loop 'round'"),
        ("--against me", "unknown variant 'me'"), ("--rule best", "unknown rule 'best'"),
        ("--pass no", "unknown pass 'no'"), ("--no-pass no", "unknown pass 'no'"), ("--print-after no", "pass 'no'"),
        ("--pass ngram-draft:drafts=0", "drafts"), ("--pass ngram-draft:drafts=x", "'x' is no value"),
        ("--pass token-shuffle:window=0", "token-shuffle:window=0"), ("--pass kv-cache:rows=some", "kv-cache:rows"),
        ("--budget loss=1", "unknown metric"), ("--budget kl=x", "no bound"), ("--guide nobody", "no model 'nobody'"),
        ("--examples none.jsonl", "no file 'none.jsonl'"), ("--prompts none", "no file 'none'"),
        ("--dump-dir /dev/null", "no folder"),
    ],
)  # fmt: skip
def test_options_are_checked_before_any_work(
    options: str, words: str, called: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if "capacity" not in options:
        monkeypatch.setattr(command, "resolve", lambda *_: pytest.fail("a model is loaded"))
    code, text = called("optimize", "digits-ar", "-o", tmp_path / "out", *options.split())
    assert code == 2 and words in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tiny", "-n -1", "-n"), ("tiny", "--seed -1", "--seed"), ("tiny", "--stop 11", "token 11 is not in the voc"),
        ("tiny", "--stop x", "can't read the prompt 'x'"), ("tiny", "--param seed=3", "unknown sampling parameter"),
        ("tiny", "--param n=3", "unknown sampling parameter 'n'"), ("tiny", "--param executor=1", "unknown sampling"),
        ("tiny", "--param prompts=1", "unknown sampling"), ("tiny", "--fill [MASK]", "no canvas to fill"),
        ("tiny", "--target gpu", "unknown target"), ("tiny", "--temperature nan", "temperature can't be nan"),
        ("canvas", "--fill 3", "nothing is to be found in '3'"), ("canvas", "--fill [MASK*99]", "don't fit"),
        ("canvas", "--fill [MASK] --fill [MASK]", "2 answers to fill in for 1 prompts"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_take_is_told(name: str, options: str, words: str, called: Any, folder: Path) -> None:
    code, text = called("run", folder / name, "-p", "1", *options.split())
    assert code == 2 and words in text and "internal error" not in text


def test_options_that_would_do_nothing_are_refused(called: Any, folder: Path, tmp_path: Path) -> None:
    code, text = called("inspect", folder / "tiny", "--capacity", "5")
    assert code == 2 and "an artifact's capacity is what it was made with" in text
    image = aropt.load(str(folder / "tiny"), "eager")
    meta = {**image.program.meta, "modality": "image", "side": 4}
    save(image.program.replace(meta=meta), tmp_path / "image", report=image.report)
    code, text = called("run", tmp_path / "image", "-n", "1", "--fill", "[MASK]")
    assert code == 2 and "no canvas to fill" in text and not list(tmp_path.glob("*.png"))


def test_infilling_from_the_command_line(called: Any, folder: Path) -> None:
    code, text = called("run", folder / "canvas", "-p", "9 9", "--fill", "[MASK] 7 [MASK*2]", "--json")
    assert code == 0 and json.loads(text)["tokens"] == [[2, 7, 4, 5]]
    code, text = called("run", folder / "canvas", "-p", "9 9", "--fill", "7 [MASK]", "-n", "4")
    assert (code, text.strip()) == (0, "7 3 4 5")


def test_texts_of_answers_and_stops(tiny_program: Program) -> None:
    canvas = tiny_program.replace(meta={**tiny_program.meta, "loop": "unmask", "mask": MASK})

    def encode(text: str) -> list[int]:
        return [ord(c) for c in text]

    assert answers(["a b[MASK]c", "[MASK*3]"], None, canvas, encode) == [[97, 32, 98, MASK, 99], [MASK] * 3]
    assert stops(["7", "x"], encode) == [7, 120] and stops([""], encode) == []
    with pytest.raises(UsageError, match="a sequence ends at one token"):
        stops(["xy"], encode)
