"""What a command leaves: artifacts that can be read and edited, pictures, and what ends it from outside."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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
from aropt.pipeline.reading import load
from aropt.targets.scratch import Scratch, sweep_scratch
from tests.support.commands import MODEL, QUICK, aropt, refused
from tests.support.reports import demo


@pytest.fixture(scope="module")
def picture(tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that makes pictures of two by two pixels."""
    out = tmp_path_factory.mktemp("endings") / "out"
    more = {"modality": "image", "side": 2, "prompts": [[1], [2]], "target": "eager"}
    artifact.save(tiny_program.replace(meta={**tiny_program.meta, **more}), out)
    return out


@pytest.fixture(scope="module")
def ids(tiny_program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that makes ids."""
    out = tmp_path_factory.mktemp("endings") / "out"
    more = {"modality": "tokens", "prompts": [[1, 2]], "target": "eager"}
    artifact.save(tiny_program.replace(meta={**tiny_program.meta, **more}), out)
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
    program = load(ids).program
    artifact.save(program, copy, report=demo())
    assert load(copy).report
    for name in ("README.md", "report.json", "report.html"):
        (copy / name).write_text('{"notes": "mine"}')
        assert aropt("run", copy).stdout == aropt("run", ids).stdout
    load(copy).save(str(tmp_path / "again"))
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
        "import os; from aropt.cli import main as cli; cli.main = lambda: os._exit(os.dup(0)); os.closerange(0, 3); "
        "cli.command_line()"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 3


@pytest.mark.exhaustive
def test_without_any_stream(model: str, tmp_path: Path) -> None:
    shell = f"{sys.executable} -m aropt.cli.main optimize {model} -o {tmp_path}/out {' '.join(QUICK)} >&- 2>&- <&-"
    assert subprocess.run(["sh", "-c", shell], timeout=100).returncode == 0
    assert not foreign(tmp_path / "out") and (tmp_path / "out" / "report.json").is_file()


CHILD = (
    "import time; from aropt.bench import peers; peers.die_with_parent(); print('ready', flush=True); time.sleep(100)"
)
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


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made, here and in what is started."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    sweep_scratch.cache_clear()
    return tmp_path


DIES = """
import fcntl, os, signal, sys, tempfile
from aropt.targets.scratch import Scratch

def die(*given, **more):
    os.kill(os.getpid(), signal.SIGKILL)

def then_die(module, name):
    call = getattr(module, name)
    setattr(module, name, lambda *given, **more: die(call(*given, **more)))

if sys.argv[1] == "it is made":
    then_die(tempfile, "mkdtemp")
elif sys.argv[1] == "it is marked":
    fcntl.flock = die
else:
    then_die(fcntl, "flock")
Scratch()
"""


@pytest.mark.parametrize("when", ["it is made", "it is marked", "it is locked"])
def test_what_a_kill_leaves_of_a_folder_being_made_is_swept(temporary: Path, when: str) -> None:
    done = subprocess.run([sys.executable, "-c", DIES, when])
    assert done.returncode == -signal.SIGKILL and len(os.listdir(temporary)) == 1
    Scratch().cleanup()
    assert not os.listdir(temporary)


@pytest.mark.parametrize("when", ["it is made", "it is marked", "it is locked"])
def test_a_folder_that_is_swept_while_it_is_being_made_is_made_again(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Another process can't tell it from a dead one's until it is locked."""
    make, lock, made, swept = tempfile.mkdtemp, fcntl.flock, [], []

    def sweep(now: str) -> None:
        if now == when and not swept and made:
            swept.append(made[0])
            sweep_scratch.__wrapped__()

    def mkdtemp(*given: Any) -> str:
        name = make(*given)
        made.append(name)
        sweep("it is made")
        return name

    def flock(*given: Any) -> None:
        sweep("it is marked")
        lock(*given)
        sweep("it is locked")

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)
    monkeypatch.setattr(fcntl, "flock", flock)
    with Scratch() as name:
        sweep_scratch.__wrapped__()
        assert os.listdir(temporary) == [Path(name).name] and os.listdir(name) == [".aropt-scratch"]
        assert name == made[-1] and swept == [made[0]] and len(made) == (1 if when == "it is locked" else 2)
    assert not os.listdir(temporary)


def empty(place: Path, name: str, mode: int = 0o700) -> None:
    (place / name).mkdir()
    (place / name).chmod(mode)


OTHERS: dict[str, Callable[[Path], None]] = {
    "a shorter name": lambda place: empty(place, "aropt-abcdefg"),
    "a longer name": lambda place: empty(place, "aropt-abcdefghi"),
    "a name of other letters": lambda place: empty(place, "aropt-abcdefgH"),
    "a mode that all may read": lambda place: empty(place, "aropt-abcdefgh", 0o755),
    "a mode that one may not write": lambda place: empty(place, "aropt-abcdefgh", 0o500),
    "a mode with more": lambda place: empty(place, "aropt-abcdefgh", 0o1700),
    "a link": lambda place: empty(place, "elsewhere") or (place / "aropt-abcdefgh").symlink_to("elsewhere"),
    "a file": lambda place: (place / "aropt-abcdefgh").touch(0o700),
    "something in it": lambda place: empty(place, "aropt-abcdefgh") or (place / "aropt-abcdefgh" / "mine").touch(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_a_killed_process_cannot_have_left_stays(temporary: Path, kind: str) -> None:
    OTHERS[kind](temporary)
    before = sorted(temporary.rglob("*"))
    Scratch().cleanup()
    assert sorted(temporary.rglob("*")) == before


def test_empty_folders_of_other_users_stay(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty(temporary, "aropt-abcdefgh")
    other = os.geteuid() + 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: other)
        sweep_scratch()
    assert os.listdir(temporary) == ["aropt-abcdefgh"]
    sweep_scratch.cache_clear()
    sweep_scratch()
    assert not os.listdir(temporary)


def test_a_folder_that_nobody_cleans_up_is_unlocked_too(temporary: Path) -> None:
    """And a descriptor that was closed, and given out again, is not closed again."""
    kept = Scratch()
    number = kept.lock
    with pytest.warns(ResourceWarning):
        del kept
    with pytest.raises(OSError):
        os.fstat(number)
    kept = Scratch()
    kept.cleanup()
    reused = os.dup2(0, kept.lock)
    kept.cleanup()
    os.fstat(reused)
    os.close(reused)
    assert not os.listdir(temporary)
