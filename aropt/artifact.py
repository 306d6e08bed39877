"""The artifact: a folder with the program, its weights, what the target built, and the evidence (design section 9).

Written aside and renamed: OUT is there whole, or not at all. Hashes of all files are in manifest.json. No pickle.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aropt import __version__
from aropt.errors import UsageError, VerificationFailed, WrongMachine
from aropt.program import Program

SCHEMA = 1


@contextlib.contextmanager
def staged(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out` to write into; renamed to `out` if the block ends well, removed if not."""
    check_free(out, force)
    staging = out.parent / f".{out.name}.{os.getpid()}.partial"
    with disk_errors(out):
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
        except OSError as error:
            raise UsageError(
                what=f"can't write '{out}'", why=str(error.strerror), hint="choose another folder"
            ) from error
        try:
            yield staging
            replace(staging, out)
        except BaseException:  # an interrupt too leaves nothing half-written; it goes on
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextlib.contextmanager
def staged_export(out: Path, force: bool) -> Iterator[Path]:
    """As `staged`, with a manifest of what was written."""
    with staged(out, force) as folder:
        yield folder
        manifest = {
            "schema_version": SCHEMA,
            "tool": {"name": "aropt", "version": __version__},
            "files": listing(folder),
        }
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def check_free(out: Path, force: bool) -> None:
    """Raises UsageError if `out` can't be written."""
    if out.exists() and not force:
        raise UsageError(what=f"'{out}' exists", hint="choose another folder, or overwrite it with --force")
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            what=f"'{out}' is not an aropt artifact",
            why="--force only replaces folders that aropt wrote",
            hint="choose another folder",
        )
    parent = next(p for p in out.absolute().parents if p.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(
            what=f"can't write to '{parent}'", why="permission denied or read-only", hint="choose another folder"
        )


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a UsageError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
            raise UsageError(
                what=f"can't write '{out}'",
                why=str(error.strerror),
                where=str(error.filename or out),
                hint="free some space or choose another folder; nothing was left behind",
            ) from error
        raise


def replace(staging: Path, out: Path) -> None:
    """Puts the new folder in the place of the old one."""
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    if out.exists():
        out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save(program: Program, path: str | Path, force: bool = False) -> None:
    """Writes the program with whatever its report holds; a lowered program brings its built files along."""
    with staged(Path(path), force) as folder:
        write(program, folder)


def write(
    program: Program, folder: Path, report: dict[str, Any] | None = None, extra: list[Path] | None = None
) -> None:
    """All files of an artifact into `folder`; those under models/ may be there already."""
    from aropt.printer import text
    from aropt.serialize import to_json

    report = report if report is not None else program.report
    built = getattr(program.executor, "folder", None)
    if built is not None and Path(built) != folder and (Path(built) / "models").is_dir():
        shutil.copytree(Path(built) / "models", folder / "models", dirs_exist_ok=True)
    (folder / "program.txt").write_text(text(program))
    (folder / "program.json").write_text(json.dumps(to_json(program), indent=1))
    save_file({n: w.detach().contiguous() for n, w in unique(program.weights).items()}, folder / "weights.safetensors")
    for file in extra or []:
        shutil.copy(file, folder / file.name)
    if report:
        from aropt.report import html, validate

        whole = validate({**report, "artifacts": listing(folder)}).model_dump(mode="json")
        (folder / "report.json").write_text(json.dumps(whole, indent=1))
        (folder / "report.html").write_text(html(whole))
    (folder / "README.md").write_text(readme(program))
    manifest = {
        "schema_version": SCHEMA,
        "tool": {"name": "aropt", "version": __version__},
        "target": program.meta.get("target", "eager"),
        "source": program.meta.get("source", ""),
        "torch": torch.__version__.split("+")[0],
        "files": listing(folder),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def unique(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory: copies those that do."""
    seen: set[int] = set()
    result = {}
    for name, value in weights.items():
        shared = value.untyped_storage().data_ptr() in seen
        seen.add(value.untyped_storage().data_ptr())
        result[name] = (
            value.clone()
            if shared or value.numel() * value.element_size() != value.untyped_storage().nbytes()
            else value
        )
    return result


def listing(folder: Path) -> list[dict[str, Any]]:
    """Path, sha256 and size of every file but the manifest."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json")
    return [{"path": str(f.relative_to(folder)), "sha256": sha256(f), "bytes": f.stat().st_size} for f in files]


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load(path: str | Path, target: str | None = None, threads: int | None = None, check: bool = True) -> Program:
    """The program of an artifact, ready to generate on its target (or another one).

    Raises UsageError for what is no artifact, VerificationFailed where a file is not the one that was written.
    """
    from aropt.serialize import from_json
    from aropt.targets import lower

    folder = Path(path)
    manifest = read_manifest(folder)
    if check:
        check_files(folder, manifest)
    program = from_json(json.loads((folder / "program.json").read_text()), load_file(folder / "weights.safetensors"))
    target = target or manifest["target"]
    report = json.loads((folder / "report.json").read_text()) if (folder / "report.json").is_file() else {}
    # another target than the artifact's builds its files elsewhere: an artifact is never changed
    home = folder if target == manifest["target"] else None
    executor = lower(program, target, home, threads=threads)
    return program.replace(executor=executor, report=report)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Raises UsageError where the folder is not an artifact, WrongMachine for a newer format."""
    file = folder / "manifest.json"
    if not file.is_file():
        raise UsageError(
            what=f"'{folder}' is not an aropt artifact",
            why="manifest.json is missing",
            hint="make one: aropt optimize MODEL -o OUT",
        )
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        version = int(manifest["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            what="the manifest can't be read", where=str(file), why=str(error), hint="make the artifact again"
        ) from error
    if version > SCHEMA:
        raise WrongMachine(
            what="the artifact is of a newer aropt",
            where=str(file),
            why=f"format {version}, this aropt reads {SCHEMA}",
            hint="upgrade aropt, or make the artifact again",
        )
    return manifest


def check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Raises VerificationFailed where a file is missing or changed."""
    for entry in manifest["files"]:
        file = folder / entry["path"]
        if not file.is_file():
            raise VerificationFailed(
                what="a file of the artifact is missing", where=str(file), hint="make the artifact again"
            )
        if sha256(file) != entry["sha256"]:
            raise VerificationFailed(
                what="a file of the artifact was changed",
                where=str(file),
                why="its hash is not the manifest's",
                hint="make the artifact again",
            )


def readme(program: Program) -> str:
    """How to use the folder."""
    name = program.meta.get("name", program.name)
    return f"""# {name}, optimized by aropt {__version__}

    aropt run . -n 1            generate
    aropt bench .               time it again, here
    aropt inspect .             print the program

report.html shows what was done and how it was verified; program.txt is the program as text.
In Python: `aropt.load("{name}").generate([[...ids...]], n)`.
"""
