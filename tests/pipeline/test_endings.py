"""What a command leaves: artifacts that can be read and edited, pictures, and what ends it from outside."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import aropt as package
from aropt.bench import peers
from aropt.cli.run import beside
from aropt.ir.program import Program
from aropt.pipeline import artifact
from aropt.pipeline.manifest import foreign
from aropt.targets.scratch import Scratch, sweep_scratch
from tests.cli.test_cli import MODEL, QUICK, aropt, refused
from tests.pipeline.test_report import demo


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
    assert beside(Path(), ".png") == tmp_path / "elsewhere.png" and beside(Path("a/b"), "-onnx") == Path("a/b-onnx")
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
        (copy / name).write_text('{"notes": "mine"}')
        assert aropt("run", copy).stdout == aropt("run", ids).stdout
    artifact.save(artifact.load(copy), tmp_path / "again")
    for name in ("README.md", "report.json", "report.html"):
        (copy / name).unlink()
    assert aropt("run", copy).stdout == aropt("run", ids).stdout
    artifact.save(program, copy, force=True)
    (copy / "program.txt").write_text("changed")
    refused(aropt("run", copy), 3, "changed", "program.txt")


def started(*arguments: object, wait_for: str = "", **more: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own; comes back when stderr has shown `wait_for`."""
    command = [sys.executable, "-m", "aropt.cli.main", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "CI": "1"}, **more)
    assert process.stderr is not None
    next((line for line in process.stderr if wait_for in line), None) if wait_for else None
    return process


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "model.py"
    path.write_text(MODEL)
    return f"{path}:good"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.exhaustive)])
def test_signals_clean_up_and_say_so(model: str, tmp_path: Path, number: int) -> None:
    process = started("optimize", model, "-o", tmp_path / "deep" / "out", *QUICK, wait_for="kv-cache")
    process.send_signal(number)
    _, rest = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "interrupted" in rest and "Traceback" not in rest
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads(unbuffered: str) -> None:
    """A full disk behind stdout is an error; a reader that has enough is none, nor is a stderr that takes nothing."""

    def ends(redirected: str, *command: str) -> tuple[int, str]:
        shell = f"{sys.executable} -m aropt.cli.main {' '.join(command)} {redirected}"
        more = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60, env=more)
        return done.returncode, done.stderr

    code, said = ends("> /dev/full", "models")
    assert code == 2 and "No space left on device, for stdout" in said and "Exception" not in said
    assert ends("> >(true); sleep 0.1", "models")[1] == ""
    assert ends("| true; exit ${PIPESTATUS[0]}", "models") == (0, "")
    assert ends("2> /dev/full", "models", "--wrong")[0] == 2
    assert ends(">&- 2>&- <&-", "models")[0] == 0


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    script = (
        "import os; from aropt import cli; cli.main = lambda: os._exit(os.dup(0)); os.closerange(0, 3); "
        "cli.command_line()"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 3


@pytest.mark.exhaustive
def test_without_any_stream(model: str, tmp_path: Path) -> None:
    shell = f"{sys.executable} -m aropt.cli.main optimize {model} -o {tmp_path}/out {' '.join(QUICK)} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", shell], timeout=100).returncode == 0
    assert not foreign(tmp_path / "out") and (tmp_path / "out" / "report.json").is_file()


CHILD = "import time; from aropt import peers; peers.die_with_parent(); print('ready', flush=True); time.sleep(100)"
PARENT = f"""
import subprocess, sys, time
from aropt.targets.scratch import Scratch
kept = Scratch()
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, kept.name, flush=True)
time.sleep(100)
"""


def test_a_kill_takes_the_children_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next process removes the temporary folder of the dead one, but no other."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child, kept = parent.stdout.readline().split()
    (tmp_path / "aropt-mine").mkdir()
    (tmp_path / "aropt-theirs").mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / "aropt-theirs" / ".aropt-scratch").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr("tempfile.tempdir", None)
    sweep_scratch.cache_clear()
    with Scratch() as own:
        assert Path(kept).is_dir() and Path(own).is_dir(), "it lives"
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not peers.alive(child):
            break
        time.sleep(0.1)
    assert not peers.alive(child)
    sweep_scratch.cache_clear()
    Scratch().cleanup()
    assert sorted(os.listdir(tmp_path)) == ["aropt-mine", "aropt-theirs", "elsewhere"]
