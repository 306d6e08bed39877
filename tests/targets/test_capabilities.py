"""What targets can do: words that are known, that some target has, and that something asks for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from aropt.rewriting.target import CAPABILITIES, Target
from aropt.targets import TARGETS, find_target

ROOT = Path(__file__).parent.parent.parent
FILES = [f for top in ("aropt", "passes", "kernels", "exporters") for f in (ROOT / top).rglob("*.py")]


def test_files_are_targets() -> None:
    assert TARGETS == ("eager", "inductor", "onnxruntime")
    assert [find_target(name).name for name in TARGETS] == list(TARGETS)


def test_every_capability_is_had() -> None:
    assert {c for name in TARGETS for c in find_target(name).capabilities} == CAPABILITIES.keys()


def test_every_capability_is_asked_for() -> None:
    """A word that only targets say would be a promise that nobody holds them to."""
    outside = [f for f in FILES if "targets" not in f.parts and f.name != "target.py"]
    said = {n.value for f in outside for n in ast.walk(ast.parse(f.read_text())) if isinstance(n, ast.Constant)}
    assert CAPABILITIES.keys() - said == set()


def test_unknown_words_are_refused() -> None:
    with pytest.raises(ValueError, match="gqa"):
        Target("new", "new", frozenset({"gqa"}))
    with pytest.raises(ValueError, match="gqa"):
        find_target("eager").has("gqa")
