"""Passes and ops of others: the page's own example, files that fail, entry points of packages."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import aropt
from aropt.cli import main as cli
from aropt.errors import UsageError
from aropt.ir import ops
from aropt.ir.program import Program
from aropt.loops import scheme
from aropt.pipeline import plugins, registry

PAGE = (Path(__file__).parents[2] / "docs" / "writing_passes.md").read_text()
(EXAMPLE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
OP = """
import torch
from aropt.ir.opdef import OpDef

OP = OpDef(name="plugin_twice", schema="(Tensor x) -> Tensor", reference=lambda x: x * 2, fake=torch.empty_like,
           cost=lambda x: (x.numel(), 8 * x.numel()), samples=None, onnx=None)
"""


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test adds is gone after it."""
    monkeypatch.setattr(registry, "ADDED", {})
    monkeypatch.setattr(ops, "ADDED", {})
    for name in [n for n in sys.modules if n.startswith("aropt_plugin_")]:
        monkeypatch.delitem(sys.modules, name)


def written(folder: Path, text: str, name: str = "title.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_the_page_runs_as_printed(tiny_program: Program, tmp_path: Path) -> None:
    file = written(tmp_path, EXAMPLE)
    made = aropt.optimize(tiny_program, "eager", check=False, plugins=[file])
    assert "title" not in made.program.meta, "nobody asked for it"
    chosen = registry.pipeline(["title:words=2"])
    order = [p.name for p in chosen]
    assert order.index("title") > order.index("canonicalize")
    made = aropt.optimize(tiny_program, "eager", chosen, check=False, plugins=[file])
    assert made.program.meta["title"] == "tiny tiny" and "title" in registry.names("asked")
    plugins.load(str(file))  # again: nothing


def test_the_command_line_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("aropt.cli.optimize.plan", lambda *_: seen.append(registry.names("asked")) or [])
    words = ["optimize", "text-ar", "-o", str(tmp_path / "out"), "--plugin", str(written(tmp_path, EXAMPLE))]
    cli.app([*words, "--pass", "title:words=2", "--dry-run"], standalone_mode=False)
    assert "title" in seen[0]


FAILING = {
    "x = 1\nPASS = nothing\n": ":2", "def (:\n": ":1", "x = 1\n": "it holds none of OP, SCHEME, PASS",
    "class PASS:\n    pass\n": "PASS is no dataclass",
    EXAMPLE.replace('"title"\n', '"prune"\n'): "a pass 'prune' already",
    OP.replace("plugin_twice", "noise"): "an op 'noise' already",
}  # fmt: skip


@pytest.mark.parametrize("text", FAILING, ids=FAILING.values())
def test_a_file_that_fails_is_told_with_its_line(text: str, tmp_path: Path) -> None:
    file = written(tmp_path, text, "mine.py")
    for _ in range(2):  # it is not half there afterwards
        with pytest.raises(UsageError, match=r"the plugin 'mine.py' can't be loaded") as told:
            plugins.load(file)
        assert FAILING[text] in str(told.value) and str(file) in told.value.where
    assert not registry.ADDED and not ops.ADDED


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        plugins.load(tmp_path / "none.py")


def test_an_op_comes_along(tmp_path: Path) -> None:
    plugins.load(written(tmp_path, OP, "op.py"))
    import torch

    assert "plugin_twice" in ops.load_all()
    assert torch.ops.aropt.plugin_twice(torch.ones(2)).tolist() == [2, 2]


def test_a_loop_comes_along(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(scheme, "REGISTERED", {})
    plugins.load(Path(__file__).parents[1] / "loops" / "toys" / "scales.py")
    assert "scales" in scheme.kinds() and scheme.scheme("scales").kind == "scales"
    file = written(tmp_path, "from aropt.loops.positions import SCHEME\n", "mine.py")
    with pytest.raises(UsageError, match="there is a loop 'positions' already"):
        plugins.load(file)


def test_an_installed_package_needs_no_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, EXAMPLE, "title_package.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("title", "title_package:PASS", "aropt.passes")
    taken = EntryPoint("prune", "nowhere:PASS", "aropt.passes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point, taken])
    monkeypatch.setattr(registry, "known", registry.known.__wrapped__)
    assert registry.pass_class("title").name == "title" and "title" in registry.names("asked")
    assert registry.pass_class("prune").__module__ == "aropt.passes.prune", "ours come first"
    monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("lost", "nowhere:PASS", "aropt.passes")])
    with pytest.raises(UsageError, match="the pass 'lost' can't be loaded"):
        registry.names()
