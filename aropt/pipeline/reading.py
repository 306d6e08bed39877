"""Reading an artifact, which may come from anyone: it is data, and what is wrong with it is said.

Only what the manifest lists is opened: regular files of the listed size and hash, reached without links. Nothing is
written into the folder. A graph's target files are checked by the target (see `aropt.targets.ort.files`).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aropt.errors import AroptError, UsageError, VerificationFailed, WrongMachine
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.manifest import EDITABLE, MANIFEST, SCHEMA

NEEDED = ("program.json", "weights.safetensors")
LARGEST = {MANIFEST: 2**24, "report.json": 2**26, "program.json": 2**29}  # bytes of what is parsed whole
READ = (".json", ".model", ".txt", ".jinja", ".safetensors", ".py")  # kinds of files that tokenizers are read from too
HASH = re.compile(r"[0-9a-f]{64}")
AGAIN = "get the artifact again, or make it again: aropt optimize MODEL -o OUT"


def load(path: str | Path, target: str | None = None, threads: int | None = None, check: bool = True) -> Compiled:
    """The program of an artifact, ready to generate on its target (or another one).

    `check=False` leaves out the hashes, for an artifact that was just written.
    Raises UsageError for what is no artifact, VerificationFailed where a file is not the one that was written,
    Unsupported for a program that aropt does not run, WrongMachine for a newer format.
    """
    from aropt.ir.serialize import from_json
    from aropt.loops.scheme import scheme_of
    from aropt.targets import lower

    folder = Path(path)
    manifest = read_manifest(folder)
    check_files(folder, manifest, check)
    data, weights = read_json(folder / "program.json"), read_weights(folder / "weights.safetensors")
    home = folder if target in (None, manifest["target"]) else None  # another target builds its files elsewhere
    try:
        program = from_json(data, weights)
        scheme_of(program)  # a kind of loop that is known
        executor = lower(program, target or manifest["target"], home, threads=threads, read=home is not None)
    except AroptError:
        raise
    except Exception as error:  # whatever a check or a target meets in what nobody foresaw
        bad(folder / "program.json", f"{type(error).__name__}: {error}")
    return Compiled(program, executor, read_report(folder, manifest), str(folder))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UsageError where the folder is not an artifact, WrongMachine for a newer format."""
    from aropt.targets import TARGETS

    file = folder / MANIFEST
    if not os.path.lexists(file):
        raise UsageError(
            what=f"'{folder}' is not an aropt artifact",
            why="manifest.json is missing",
            hint="make one: aropt optimize MODEL -o OUT",
        )
    manifest = read_json(file)
    version, files = manifest.get("schema_version"), manifest.get("files")
    if type(version) is not int or version < 1:
        bad(file, f"its schema_version is {version!r}")
    if version > SCHEMA:
        raise WrongMachine(
            what="the artifact is of a newer aropt",
            where=str(file),
            why=f"format {version}, this aropt reads {SCHEMA}",
            hint="upgrade aropt, or make the artifact again",
        )
    if not isinstance(files, list):
        bad(file, "it lists no files")
    for entry in files:
        check_entry(file, entry)
    names = [entry["path"] for entry in files]
    if len(set(names)) < len(names) or not {*NEEDED} <= {*names}:
        bad(file, f"it lists a file twice, or not all of {', '.join(NEEDED)}")
    if manifest.get("target") not in TARGETS:
        bad(file, f"its target is {str(manifest.get('target'))[:40]!r}; there are {', '.join(TARGETS)}")
    return manifest


def check_entry(file: Path, entry: Any) -> None:
    """Raises UsageError unless it is a path within the folder, a hash and a size."""
    kinds = {"path": str, "sha256": str, "bytes": int}
    if not isinstance(entry, dict) or any(type(entry.get(key)) is not kind for key, kind in kinds.items()):
        bad(file, f"{str(entry)[:100]} is not a path with its sha256 and bytes")
    name, path = entry["path"], PurePosixPath(entry["path"])
    plain = str(path) == name and name.isprintable() and "\\" not in name and len(name) < 1024
    if not plain or path.is_absolute() or ".." in path.parts or name in (".", MANIFEST):
        bad(file, f"{name[:100]!r} is not a path within the artifact")
    if not HASH.fullmatch(entry["sha256"]) or not 0 <= entry["bytes"] < 2**63:
        bad(file, f"'{name[:100]}' has no such hash or size")


def check_files(folder: Path, manifest: dict[str, Any], hashes: bool = True) -> None:
    """Raises VerificationFailed where a listed file is missing or changed, or one is not listed that might be read."""
    listed = {entry["path"]: entry for entry in manifest["files"]}
    for name, entry in listed.items():
        if name in EDITABLE and not os.path.lexists(folder / name):
            continue
        with opened(folder, name) as file:
            if name in EDITABLE:
                continue
            if os.fstat(file.fileno()).st_size != entry["bytes"]:
                changed(folder / name, f"it has not the {entry['bytes']} bytes that the manifest says")
            if hashes and hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                changed(folder / name, "its hash is not the manifest's")
    for path in folder.iterdir():
        if path.suffix in READ and path.name not in (MANIFEST, *EDITABLE) and path.name not in listed:
            changed(path, "the manifest does not list it")
    for parent, folders, files in os.walk(folder / "models"):
        for one in [*files, *(f for f in folders if os.path.islink(os.path.join(parent, f)))]:
            path = Path(parent, one).relative_to(folder)
            if path.as_posix() not in listed:
                changed(folder / path, "the manifest does not list it")


@contextmanager
def opened(folder: Path, name: str) -> Iterator[Any]:
    """A regular file of the folder, opened for reading; no link is followed, and nothing is waited for."""
    path = folder
    try:
        for part in PurePosixPath(name).parts[:-1]:
            path = path / part
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                changed(path, "it is no folder")
        path = folder / name
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise VerificationFailed(what="a file of the artifact is missing", where=str(path), hint=AGAIN) from None
    except OSError as error:
        changed(path, "it is a link" if os.path.islink(path) else str(error.strerror))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        changed(path, "it is no regular file")
    with os.fdopen(descriptor, "rb") as file:
        yield file


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file of an artifact. Raises UsageError for anything else."""
    with opened(path.parent, path.name) as file:
        most = LARGEST[path.name]
        text = file.read(most + 1)
    if len(text) > most:
        bad(path, f"it has more than {most >> 20} MiB")
    try:
        data = json.loads(text, parse_constant=lambda name: bad(path, f"{name} is no JSON"))
    except (ValueError, RecursionError) as error:
        bad(path, str(error))
    return data if isinstance(data, dict) else bad(path, "it is no JSON object")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UsageError for what is none."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        bad(path, str(error))


def read_report(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The report as it was written; nothing where someone edited it: then it is theirs, and nothing depends on it."""
    known = [entry["sha256"] for entry in manifest["files"] if entry["path"] == "report.json"]
    try:
        with opened(folder, "report.json") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() in known
        return read_json(folder / "report.json") if same else {}
    except (UsageError, VerificationFailed):
        return {}


def bad(file: Path, why: str) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(what=f"'{file.name}' can't be read", where=str(file), why=why[:300], hint=AGAIN)


def changed(file: Path, why: str) -> NoReturn:
    """Raises VerificationFailed."""
    raise VerificationFailed(what="a file of the artifact was changed", where=str(file), why=why, hint=AGAIN)
