"""A command that ends early, by a signal or a disk: what was there is there, and nothing half done."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aropt.errors import UsageError
from aropt.pipeline import interrupts, store
from aropt.pipeline.manifest import foreign
from tests.support.folders import holds, make, written

KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from aropt.pipeline import manifest, store
out, where, old = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "old"
if old:
    store.ctypes.CDLL = lambda *_, **__: object()
number = 0
def step(name):
    def audit(event, arguments):
        global number
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "ctypes.call_function", "open"):
            number += 1
            if number == int(where):
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(audit)
step(where)
with store.staged_export(out, True) as folder:
    (folder / "a").mkdir()
    (folder / "a" / "model.onnx").write_text("two")
print(number)
"""


@pytest.mark.parametrize("system", ["new", "old"])
def test_killed_anywhere(tmp_path: Path, system: str) -> None:
    """A kill at each call that changes the disk: OUT is the old one or the new one, and the next run finds the rest."""
    total, seen, number = 1000, set(), 1
    while number <= total:
        home = tmp_path / str(number)
        home.mkdir()
        out = home / "out"
        written(out, "one")
        child = os.fork()
        if not child:
            sys.argv = ["", str(out), str(number), system]
            sys.stdout = open(home.with_suffix(".log"), "w")  # noqa: SIM115
            try:
                exec(KILLED, {"__name__": "killed"})
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(child, 0)
        if text := home.with_suffix(".log").read_text():
            total = min(total, int(text))
            assert number > 12, "the hook saw next to nothing"
            break
        if out.exists():
            assert not foreign(out)
            seen.add("new" if (out / "a").exists() else "old")
        else:
            assert system == "old", "the names are exchanged at once"
        with pytest.raises(UsageError, match="exists"):
            written(out, "three")
        assert os.listdir(home) == ["out"] and not foreign(out), f"after step {number}: {os.listdir(home)}"
        number += 1
    assert seen == {"old", "new"}


@pytest.mark.parametrize("code", ["ENOSPC", "EFBIG", "EACCES", "EROFS", "EDQUOT"])
def test_a_disk_that_refuses(tmp_path: Path, code: str) -> None:
    out = make(tmp_path / "out")

    def refuse() -> None:
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), "some file")

    for place in (out, tmp_path / "new" / "deep" / "out"):
        with pytest.raises(UsageError, match="can't write"):
            written(place, "two", True, refuse)
    assert holds(out)["models/step/model.onnx"] == "one" and os.listdir(tmp_path) == ["out"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow over 4,096 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_files")
def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    """safetensors says so in an error of its own."""
    import torch
    from safetensors.torch import save_file

    with pytest.raises(UsageError, match="File too large"):
        written(tmp_path / "out", "", False, lambda: save_file({"w": torch.zeros(5000)}, tmp_path / "w"))
    assert not any(tmp_path.iterdir())


def test_signals_wait_for_what_must_not_stop_halfway() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts.listening():
        try:
            with interrupts.held():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                done.append("block")
            done.append("not here")
        finally:
            assert interrupts.caught() == signal.SIGTERM
    assert done == ["block"]
    with interrupts.listening():
        assert not interrupts.caught()


@pytest.mark.parametrize("when", ["the folder was made", "the block ended", "it is put in its place"])
def test_an_interrupt_between_two_steps_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    out, mkdir, held = tmp_path / "out", Path.mkdir, store.held
    make(out)
    before = holds(out)

    def made(self: Path, *given: Any, **more: Any) -> None:
        mkdir(self, *given, **more)
        if self.name.endswith(".partial") and when == "the folder was made":
            raise KeyboardInterrupt

    calls: list[str] = []

    @contextlib.contextmanager
    def interrupted() -> Iterator[None]:
        calls.append(when)
        if when == "it is put in its place" and len(calls) == 1:
            raise KeyboardInterrupt
        with held():
            yield

    monkeypatch.setattr(Path, "mkdir", made)
    monkeypatch.setattr(store, "held", interrupted)
    with pytest.raises(KeyboardInterrupt), store.staged(out, True) as folder:
        make(folder)
        if when == "the block ended":
            raise KeyboardInterrupt
    assert holds(out) == before and os.listdir(tmp_path) == ["out"]
