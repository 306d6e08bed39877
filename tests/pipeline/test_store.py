"""Where results go: what is aropt's is replaced at once, and nothing else is ever touched."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aropt.errors import UsageError
from aropt.pipeline import manifest, store
from aropt.pipeline.manifest import foreign, remove, write_manifest
from tests.support.folders import holds, make, written

FOREIGN = {
    "any manifest": lambda out: (out / "manifest.json").write_text('{"name": "a browser extension"}'),
    "no file listed": lambda out: (out / "manifest.json").write_text(
        '{"tool": {"name": "aropt"}, "schema_version": 1, "files": []}'
    ),
    "a file more": lambda out: make(out) and (out / "thesis.txt").write_text("years of work"),
    "a folder more": lambda out: make(out) and (out / "mine").mkdir(),
    "a file of it changed": lambda out: make(out) and (out / "models" / "step" / "model.onnx").write_text("mine"),
    "a file of it a link": lambda out: make(out) and link(out / "models" / "step" / "model.onnx"),
    "its manifest a link": lambda out: make(out) and link(out / "manifest.json"),
}


def link(file: Path) -> None:
    """The file elsewhere, and a link to it in its place."""
    elsewhere = file.parents[len(file.parts) - 1 - file.parts.index("out")] / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("name", ["out", "out.failed", ".out.1.partial", ".out.1.old"])
def test_what_is_not_proven_is_not_touched(tmp_path: Path, kind: str, name: str) -> None:
    made = tmp_path / "out"
    made.mkdir()
    (made / "my.txt").write_text("mine")
    FOREIGN[kind](made)
    theirs = made.rename(tmp_path / name)
    before = holds(theirs)
    remove(theirs)
    assert holds(theirs) == before
    if name == "out":
        with pytest.raises(UsageError, match="not an aropt artifact"):
            written(tmp_path / "out", "two", force=True)
    else:
        written(tmp_path / "out", "two")
        with pytest.raises(RuntimeError), store.staged(tmp_path / "out", True) as folder:
            assert store.put_aside(make(folder / "aside"), tmp_path / "out").is_dir()
            raise RuntimeError
        assert holds(tmp_path / "out")["model.onnx"] == "two"
    assert holds(theirs) == before


def test_what_is_proven_is_replaced(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (out / "README.md").write_text("with notes of mine")
    with pytest.raises(UsageError, match="exists"):
        written(out, "two")
    written(out, "two", force=True)
    assert set(holds(out)) == {"model.onnx", "manifest.json"} and os.listdir(tmp_path) == ["out"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="exists"):
        written(tmp_path / "empty", "two")
    written(tmp_path / "empty", "two", force=True)
    assert holds(tmp_path / "empty")["model.onnx"] == "two"


def test_a_failed_result_goes_with_the_next_good_one(tmp_path: Path) -> None:
    """But not what only has its name."""
    out = tmp_path / "out"
    good = make(tmp_path / "out.failed", "good")

    def fail(text: str) -> Path:
        with pytest.raises(RuntimeError), store.staged(out, False) as folder:
            (folder / "model.onnx").write_text(text)
            write_manifest(folder)
            aside = store.put_aside(folder, out)
            raise RuntimeError
        return aside

    assert fail("one") == fail("two") == tmp_path / "out.failed-1"
    assert holds(tmp_path / "out.failed-1")["model.onnx"] == "two" and not out.exists()
    assert holds(good)["models/step/model.onnx"] == "good"
    good.rename(tmp_path / "other")
    assert fail("three") == tmp_path / "out.failed"
    written(out, "four")
    assert sorted(os.listdir(tmp_path)) == ["other", "out", "out.failed-1"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("exchanges", [True, False])
def test_what_appears_meanwhile_is_not_replaced(
    tmp_path: Path, force: bool, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(store.ctypes, "CDLL", lambda *_, **__: object())
    out, changes = tmp_path / "out", []
    monkeypatch.setattr(store, "exchange", lambda *paths: changes.append(paths))

    def appear() -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(UsageError, match="not an aropt artifact" if force else "exists"):
        written(out, "two", force, appear)
    assert not changes, "it was looked at before"
    assert holds(out) == {"thesis.txt": "years of work"} and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_file_that_comes_with_the_exchange_comes_back(
    tmp_path: Path, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof is looked at again when nobody can reach the folder by its name."""
    out, change = make(tmp_path / "out"), store.exchange
    if not exchanges:
        monkeypatch.setattr(store.ctypes, "CDLL", lambda *_, **__: object())
    changes = []

    def late(one: Path, other: Path) -> None:
        if not changes:
            (out / "thesis.txt").write_text("years of work")
        changes.append(other)
        change(one, other)

    monkeypatch.setattr(store, "exchange", late)
    with pytest.raises(UsageError, match="thesis"):
        written(out, "two", force=True)
    assert holds(out)["thesis.txt"] == "years of work" and len(holds(out)) == 4 and os.listdir(tmp_path) == ["out"]


def test_places_that_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "kept" / "model"
    make(model)
    make(tmp_path / "there")
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path / "there")
    monkeypatch.setenv("HOME", str(tmp_path / "kept" / "home"))
    for name in (".", "..", "/", "~", "../link", "../dangling", "../link/x/..", "../file", "../file/x", "../pipe",
                 "../kept", "../kept/model", "../kept/model/../../there", "x" * 300):  # fmt: skip
        with pytest.raises(UsageError):
            store.check_free(Path(os.path.expanduser(name)), True, [model / "config.json", model])
    with pytest.raises(UsageError, match="holds"):
        store.check_free(model, True, [model / "models" / "step" / "model.onnx"])
    store.check_free(model, True)
    with pytest.raises(UsageError, match="can't write"):
        written(Path("/proc/x"), "two")
    assert (tmp_path / "there" / "models").is_dir() and not (tmp_path / "nowhere").exists()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def other() -> None:
        with pytest.raises(UsageError, match=f"by process {os.getpid()}"):
            written(out, "other", force=True)
        with pytest.raises(UsageError, match="is being written"):
            store.check_free(out, True)
        written(tmp_path / "beside", "not in the way")

    written(out, "one", during=other)
    assert holds(out)["model.onnx"] == "one" and sorted(os.listdir(tmp_path)) == ["beside", "out"]
    (tmp_path / ".out.aropt-lock").write_text("mine")
    with pytest.raises(UsageError, match="in the way"):
        written(out, "two", force=True)
    assert (tmp_path / ".out.aropt-lock").read_text() == "mine"


def test_a_look_for_leftovers_is_in_nobodys_way(tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    lock = os.open(store.lock_file(out), os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    threading.Timer(0.1, lambda: (seen.append(os.listdir(tmp_path)), os.close(lock))).start()
    written(out, "one")
    assert seen == [[".out.aropt-lock"]] and os.listdir(tmp_path) == ["out"]


def test_what_comes_while_it_is_removed_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, look = make(tmp_path / "out"), manifest.foreign

    def then(folder: Path) -> str:
        why = look(folder)
        (folder / "models" / "thesis.txt").write_text("years of work")
        return why

    monkeypatch.setattr(manifest, "foreign", then)
    remove(out)
    assert holds(out)["models/thesis.txt"] == "years of work" and "models/step/model.onnx" not in holds(out)


@pytest.mark.exhaustive
def test_folders_as_deep_as_they_can_be(tmp_path: Path) -> None:
    deep = [tmp_path / "out" / "/".join("x" * (n + 1)) for n in range(1500)]
    make(tmp_path / "out")
    for folder in deep:
        folder.mkdir()
    try:
        assert foreign(tmp_path / "out")
    finally:
        for folder in reversed(deep):
            folder.rmdir()


@pytest.mark.parametrize("stage", ["begun", "made", "sealed"])
def test_what_is_left_beside_others_goes_too(tmp_path: Path, stage: str) -> None:
    """What its process made goes wholly; before and after, what is empty or proven: it may be another's."""
    (tmp_path / ".empty.7.partial").mkdir()
    make(tmp_path / ".proven.7.partial")
    theirs = make(tmp_path / ".unproven.7.partial")
    (theirs / "thesis.txt").write_text("years of work")
    for name in ("empty", "proven", "unproven"):
        store.lock_file(tmp_path / name).write_text(json.dumps({"tool": "aropt", "pid": 7, "stage": stage}))
    before = holds(theirs)
    written(tmp_path / "out", "one")
    assert sorted(os.listdir(tmp_path)) == (["out"] if stage == "made" else [".unproven.7.partial", "out"])
    assert holds(theirs) == ({} if stage == "made" else before)


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_of_the_name_that_is_written_to_stays(tmp_path: Path, force: bool) -> None:
    """What the lock's file says at the end is not that this process made it."""
    out = tmp_path / "out"
    theirs = store.partial(out, os.getpid())
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError):
        written(out, "one", force)
    assert holds(theirs) == {"thesis.txt": "years of work"} and os.listdir(tmp_path) == [theirs.name]


def test_the_journal_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time in one write of the same size."""
    out, write = tmp_path / "out", os.pwrite
    seen: list[tuple[str, bool, bool, int, int]] = []

    def look(lock: int, text: bytes, offset: int) -> int:
        there = store.partial(out, os.getpid()).is_dir(), out.is_dir()
        seen.append((json.loads(text)["stage"], *there, len(text), offset))
        return write(lock, text, offset)

    monkeypatch.setattr(os, "pwrite", look)
    written(out, "one")
    assert seen == [("begun", False, False, 100, 0), ("made", True, False, 100, 0), ("sealed", True, False, 100, 0)]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_the_users(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with store.staged_export(tmp_path / "out", False) as folder:
            make(folder / "sub")
            (folder / "sub" / "README.md").chmod(0o600)
            (folder / "sub" / "manifest.json").chmod(0o755)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=4)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(st.sampled_from(["tool", "name", "schema_version", "files", "path", "sha256"]), inner),
        ),
    ),
    st.sampled_from(["", "../keep.txt", "/etc/hostname", "keep.txt", "models"]),
)
def test_no_manifest_makes_a_stranger_ours(tmp_path: Path, said: object, path: str) -> None:
    """Whatever a manifest says: what is outside the folder, or has another hash, stays."""
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    (tmp_path / "keep.txt").write_text("outside")
    (folder / "keep.txt").write_text("inside")
    base = {"tool": {"name": "aropt"}, "schema_version": 1, "files": [{"path": path, "sha256": "0" * 64}]}
    for made in (said, base | {"files": said}, base, base | {"schema_version": said}):
        (folder / "manifest.json").write_text(json.dumps(made))
        remove(folder)
        assert holds(tmp_path).keys() == {"keep.txt", "out/keep.txt", "out/manifest.json"}
