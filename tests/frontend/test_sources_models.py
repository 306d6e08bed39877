"""Loading models: which class of a directory, what a module says of itself, capacities, and files with neighbours."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.cli.optimize import find
from aropt.cli.options import Reading
from aropt.errors import Unsupported, UsageError
from aropt.frontend.facts import facts
from aropt.frontend.huggingface import longest
from aropt.frontend.sources import resolve
from aropt.models.canvas import MASK
from tests.conftest import Tiny
from tests.support.canvases import tiny

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 66}


def directory(kind: str, head: str, path: Path, **more: Any) -> str:
    """A Hugging Face directory with random weights."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(**SIZES, **more)
    getattr(transformers, kind + head)(config).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return directory("Bert", "ForMaskedLM", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return directory("Llama", "ForCausalLM", tmp_path_factory.mktemp("llama"))


def test_a_mask_alone_means_a_canvas(bert: str, tmp_path: Path) -> None:
    """In Python and on the command line: the directory is loaded as a masked language model."""
    assert aropt.capture(bert, mask=4).meta["loop"] == "unmask"
    source = find(Reading(bert, mask=4))
    assert type(source.module).__name__ == "BertForMaskedLM" and source.meta["mask"] == 4


def test_a_canvas_of_the_class_that_the_directory_names(llama: str) -> None:
    """AutoModelForMaskedLM knows no Llama; config.json says what the weights are."""
    source = resolve(llama, masked=True)
    assert type(source.module).__name__ == "LlamaForCausalLM"
    assert aropt.capture(llama, mask=4).meta["mask"] == 4


@pytest.mark.parametrize("names", [[], ["pipeline"], ["AutoModel"], ["NoSuchModel"]])
def test_a_directory_without_such_a_class_is_refused(llama: str, names: list[str], tmp_path: Path) -> None:
    for file in Path(llama).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
    with pytest.raises(Unsupported, match="as a masked language model"):
        resolve(str(tmp_path), masked=True)


@pytest.mark.parametrize("capacity", [1, 0, -3])
def test_no_capacity_is_refused(capacity: int, llama: str) -> None:
    models: list[Any] = [Tiny(1), "digits-ar", "text-ar", llama]
    for model in models:
        with pytest.raises(UsageError, match=f"capacity {capacity} leaves no room"):
            aropt.capture(model, capacity=capacity)


class Table(nn.Module):
    """A model with a table of positions of which the first ones are not used."""

    def __init__(self, positions: int, first: int, pad: int | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=pad)
        self.embed, self.positions, self.first = nn.Embedding(10, 4), nn.Embedding(positions, 4), first

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.positions(torch.arange(ids.shape[1]) + self.first)


@pytest.mark.parametrize(
    ("first", "pad", "found"), [(0, None, 16), (0, 0, 16), (0, 9, 16), (2, 1, 14), (1, 0, 15), (1, None, 15)]
)
def test_the_capacity_is_what_runs(first: int, pad: int | None, found: int) -> None:
    """The id after padding may be outside the vocabulary, which says nothing about positions."""
    assert longest(Table(16, first, pad), 16) == found


@pytest.mark.parametrize(("first", "pad"), [(3, 0), (16, 1), (1, 9), (17, 20)])
def test_a_capacity_that_does_not_run_is_refused(first: int, pad: int) -> None:
    with pytest.raises(Unsupported, match="does not take the 10 ids"):
        longest(Table(10, first, pad), 10)


def test_out_of_memory_is_not_a_shorter_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    model = Table(16, 0, 1)
    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(MemoryError):
        longest(model, 16)


def test_a_capacity_that_was_asked_for_is_not_shortened(tmp_path: Path) -> None:
    path = directory("Roberta", "ForMaskedLM", tmp_path, pad_token_id=1)
    assert resolve(path, masked=True).meta["capacity"] == 64
    with pytest.raises(UsageError, match="capacity 65 is more than the model takes"):
        resolve(path, 65, masked=True)
    with pytest.raises(UsageError, match="capacity 65 is more than the model takes"):
        resolve("digits-ar", 65)


NEIGHBOURS = """
from __future__ import annotations
from dataclasses import dataclass
from part_of_it import width
from torch import nn

@dataclass
class Config:
    size: int = width

def build():
    import other_part
    return nn.Sequential(nn.Embedding(11, Config().size), nn.Linear(Config().size, other_part.vocab))
"""


def test_a_file_has_dataclasses_and_neighbours(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NEIGHBOURS)
    (tmp_path / "part_of_it.py").write_text("width = 8")
    (tmp_path / "other_part.py").write_text("vocab = 11")
    before = list(sys.path)
    assert resolve(f"{tmp_path}/mine.py:build").meta["vocab"] == 11
    assert sys.path == before


def test_a_file_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import no_such_neighbour")
    before = list(sys.path)
    with pytest.raises(UsageError, match="no_such_neighbour"):
        resolve(f"{tmp_path}/bad.py:build")
    assert sys.path == before and "aropt_user_bad" not in sys.modules


def test_a_module_says_what_its_canvas_is() -> None:
    model: Any = copy.deepcopy(tiny(4))
    model.mask, model.shift = MASK, True
    program = aropt.capture(model)
    assert [program.meta[k] for k in ("loop", "mask", "block", "shift")] == ["unmask", MASK, 4, True]
    assert aropt.capture(model, shift=False).meta["shift"] is False
    plain: Any = Tiny(1)
    plain.mask, plain.block, plain.shift = torch.ones(2, 2), nn.Linear(1, 1), 3  # other things of these names
    assert not {"mask", "block", "shift"} & set(facts(plain, None))


def test_flags_of_a_canvas(tmp_path: Path) -> None:
    """They reach the model that is captured."""
    from typer.testing import CliRunner

    from aropt.cli.main import app

    (tmp_path / "mine.py").write_text("from tests.support.canvases import tiny\ndef build(): return tiny()")
    source = find(Reading(f"{tmp_path}/mine.py:build", mask=3, block=4, shift=True))
    assert {"mask": 3, "block": 4, "shift": True}.items() <= source.meta.items()
    shown = CliRunner().invoke(app, ["optimize", "--help"], env={"COLUMNS": "200"}).output
    assert all(flag in shown for flag in ("--mask", "--block", "--shift"))
