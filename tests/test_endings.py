"""What a command leaves: artifacts that can be read and edited, pictures, and what ends it from outside."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import aropt as package
from aropt import artifact
from aropt.generation import picture_of
from aropt.program import Program
from tests.test_cli import aropt, refused
from tests.test_report import demo


@pytest.fixture(scope="module")
def picture(tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that makes pictures of two by two pixels."""
    out = tmp_path_factory.mktemp("endings") / "out"
    more = {"modality": "image", "side": 2, "prompts": [[1], [2]], "target": "eager"}
    artifact.save(tiny_program.replace(meta={**tiny_program.meta, **more}, report={}), out)
    return out


@pytest.fixture(scope="module")
def ids(tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that makes ids."""
    out = tmp_path_factory.mktemp("endings") / "out"
    more = {"modality": "tokens", "prompts": [[1, 2]], "target": "eager"}
    artifact.save(tiny_program.replace(meta={**tiny_program.meta, **more}, report={}), out)
    return out


def test_a_picture_replaces_only_a_picture_of_aropts(picture: Path, tmp_path: Path) -> None:
    file = picture.parent / "out.png"
    Image.new("L", (3, 3)).save(file)
    theirs = file.read_bytes()
    refused(aropt("run", picture), 2, "out.png' exists", "didn't draw it", "--force")
    assert file.read_bytes() == theirs
    file.write_text("no picture")
    refused(aropt("run", picture, "-o", file), 2, "out.png' exists")
    assert aropt("run", picture, "--force").returncode == 0
    first = file.read_bytes()
    done = aropt("run", picture, "--seed", "1", "--temperature", "3")
    assert done.returncode == 0 and done.stdout.strip() == str(file) and file.read_bytes() != first
    (tmp_path / "mine").write_bytes(first)
    for target in ("mine", "nowhere"):
        (tmp_path / "link.png").symlink_to(target)
        refused(aropt("run", picture, "-o", tmp_path / "link.png", "--force"), 2, "is no file")
        (tmp_path / "link.png").unlink()
    assert (tmp_path / "mine").read_bytes() == first and os.listdir(tmp_path) == ["mine"]
    assert sorted(os.listdir(picture.parent)) == ["out", "out.png"]


@pytest.mark.parametrize("name", ["picture", "ids"])
def test_its_readme_is_right(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lines run as they stand, wherever the folder is."""
    moved = tmp_path / "elsewhere"
    subprocess.run(["cp", "-r", str(request.getfixturevalue(name)), str(moved)], check=True)
    monkeypatch.chdir(moved)
    text = (moved / "README.md").read_text()
    commands = re.findall(r"^    aropt (.*?)(?:    |$)", text, re.MULTILINE)
    assert len(commands) == 2 and "report" not in text
    for command in commands:
        done = aropt(*command.split())
        assert done.returncode == 0, done.stderr
        if name == "ids" and command.startswith("run"):
            assert len(done.stdout.split()) == int(command.split()[-1]) and f"{command.split()[-1]} new tokens" in text
    assert picture_of(Path()) == tmp_path / "elsewhere.png"
    assert (tmp_path / "elsewhere.png").is_file() == (name == "picture")
    call = re.search(r"aropt\.load.*", text)
    count = re.search(r"for (\d+) new ones", text)
    assert call and count and len(eval(call[0], {"aropt": package})[0]) == int(count[1])


def test_what_is_for_people_may_be_edited(ids: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    program = artifact.load(ids)
    artifact.save(program.replace(report=demo()), copy)
    assert artifact.load(copy).report
    for name in ("README.md", "report.json", "report.html"):
        (copy / name).write_text("[notes of mine")
        assert aropt("run", copy).stdout == aropt("run", ids).stdout
    artifact.save(artifact.load(copy), tmp_path / "again")
    for name in ("README.md", "report.json", "report.html"):
        (copy / name).unlink()
    assert aropt("run", copy).stdout == aropt("run", ids).stdout
    artifact.save(program, copy, force=True)
    (copy / "program.txt").write_text("changed")
    refused(aropt("run", copy), 3, "changed", "program.txt")
