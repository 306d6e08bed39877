"""Some mutants of artifacts, read as `python -m tests.fuzz` reads them; and that it would see what is not allowed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aropt.ir.program import Program
from tests.fuzz import ALLOWED, artifacts, read
from tests.fuzz.structure import mutant, written


@pytest.fixture(scope="module")
def out(tiny_stages: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(list(tiny_stages.values())[-1], "eager", tmp_path_factory.mktemp("fuzz") / "out")


def test_mutants_are_refused_or_generate(out: Path, tmp_path: Path) -> None:
    for seed in range(12):
        changed, said = mutant(out, tmp_path / "mutant", seed)
        found = read(changed, None)
        assert found.kind in ALLOWED, (seed, said, found)


def test_what_is_not_allowed_is_seen(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind is brought about once, in place of reading the artifact."""

    def hangs(_: Path) -> Any:
        while True:
            pass

    def fails(_: Path) -> Any:
        raise KeyError("x")

    kinds = {
        "HANG": hangs,
        "INTERNAL": fails,
        "CRASH": lambda _: os._exit(3),
        "CODE": lambda _: os.system("true"),
        "WROTE": lambda path: (path / "new").write_text("x"),
        "MEMORY": lambda _: bytearray(2**40),
    }
    for kind, reading in kinds.items():
        monkeypatch.setattr("tests.fuzz.reader.generated", reading)
        found = read(out, None, seconds=2.0)
        (out / "new").unlink(missing_ok=True)
        assert found.kind == kind, found


@pytest.mark.exhaustive
def test_mutants_of_all_artifacts(tmp_path: Path) -> None:
    outs = artifacts(tmp_path)
    expected = {name: read(one, None) for name, one in outs.items()}
    assert {found.kind for found in expected.values()} == {"changed"}, expected
    for seed in range(160):
        name = list(outs)[seed % 4]
        changed, said = mutant(outs[name], tmp_path / "mutant", 5000 + seed)
        found = read(changed, None)
        assert found.kind in ALLOWED, (name, seed, said, found)
