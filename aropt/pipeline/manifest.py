"""The manifest of a folder that aropt wrote: what is in it, and the proof that it is aropt's to replace or remove."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aropt import __version__
from aropt.errors import UsageError

SCHEMA = 1
MANIFEST = "manifest.json"
EDITABLE = ("README.md", "report.json", "report.html")  # for people: an artifact is right whatever they say


def write_manifest(folder: Path, **more: Any) -> None:
    """The manifest of a folder's files; `more` is what it says besides."""
    tool = {"name": "aropt", "version": __version__}
    manifest = {"schema_version": SCHEMA, "tool": tool, **more, "files": listing(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def listing(folder: Path) -> list[dict[str, Any]]:
    """Path, sha256 and size of every file but the manifest."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    return [{"path": str(f.relative_to(folder)), "sha256": sha256(f), "bytes": f.stat().st_size} for f in files]


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def foreign(folder: Path) -> str:
    """Why a folder is not wholly aropt's; nothing if its manifest proves that it is, or if it is empty."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    found = sorted(contents(folder))
    if not found:
        return ""
    known = proven(folder)
    if known is None:
        return f"it has no {MANIFEST} of aropt"
    folders = {str(parent) for name in known for parent in Path(name).parents}
    for name, entry in found:
        if entry.is_dir(follow_symlinks=False):
            if name not in folders:
                return f"'{name}' is not in its manifest"
        elif name not in known or not entry.is_file(follow_symlinks=False):
            return f"'{name}' is not in its manifest"
        elif name not in (MANIFEST, *EDITABLE) and known[name] != sha256(folder / name):
            return f"'{name}' is not the file that aropt wrote"
    return ""


def contents(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """All that a folder holds, by its relative name; links are not followed."""
    waiting = [""]
    while waiting:
        under = waiting.pop()
        with os.scandir(folder / under) as entries:
            for entry in entries:
                yield under + entry.name, entry
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(f"{under}{entry.name}/")


def proven(folder: Path) -> dict[str, str] | None:
    """The files that an aropt manifest lists, with their hashes, and the manifest; None where there is no such one."""
    file = folder / MANIFEST
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_bytes())
        if manifest["tool"]["name"] != "aropt" or type(manifest["schema_version"]) is not int:
            return None
        return {str(f["path"]): str(f["sha256"]) for f in manifest["files"]} | {MANIFEST: ""}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def mark_failed(folder: Path) -> None:
    """Says in the manifest that the result failed."""
    said = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**said, "failed": True}, indent=1))


def remove_failed(folder: Path) -> None:
    """As `remove`, for a folder that says that it failed."""
    if proven(folder) is not None and json.loads((folder / MANIFEST).read_text()).get("failed") is True:
        remove(folder)


def refuse_foreign(folder: Path, out: Path) -> None:
    """Raises UsageError where `folder`, which the user knows as `out`, is not wholly aropt's."""
    if why := foreign(folder):
        raise UsageError(
            what=f"'{out}' is not an aropt artifact as aropt wrote it",
            why=f"{why}; --force only replaces what aropt wrote",
            hint="choose another folder, or move it away",
        )


def remove(folder: Path) -> None:
    """Removes a folder that is wholly aropt's, and no other: file by file, its manifest last."""
    if not os.path.lexists(folder) or foreign(folder):
        return
    known = set(proven(folder) or ()) - {MANIFEST}
    names = [(name, entry.is_dir(follow_symlinks=False)) for name, entry in contents(folder)]
    with contextlib.suppress(OSError):  # what can't be removed stays, and so does what came meanwhile
        for name in [name for name, is_folder in names if not is_folder and name in known]:
            (folder / name).unlink()
        for name in sorted((name for name, is_folder in names if is_folder), key=len, reverse=True):
            (folder / name).rmdir()
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()
