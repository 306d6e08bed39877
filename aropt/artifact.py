"""The artifact: a folder with the program, its weights, what the target built, and the evidence (design section 9).

Hashes of all files are in manifest.json. No pickle. How it gets to OUT is in aropt.store.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from aropt import __version__
from aropt.errors import UsageError, VerificationFailed, WrongMachine
from aropt.manifest import EDITABLE, SCHEMA, listing, sha256, write_manifest
from aropt.program import Program
from aropt.runtime import fitted, room
from aropt.store import staged


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
    (folder / "README.md").write_text(readme(program, bool(report)))
    write_manifest(
        folder,
        target=program.meta.get("target", "eager"),
        source=program.meta.get("source", ""),
        torch=torch.__version__.split("+")[0],
    )


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
    report = report_of(folder, manifest)
    # another target than the artifact's builds its files elsewhere: an artifact is never changed
    home = folder if target == manifest["target"] else None
    executor = lower(program, target, home, threads=threads)
    return program.replace(executor=executor, report=report)


def report_of(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """The report as it was written; nothing where someone edited it: then it is theirs."""
    file = folder / "report.json"
    known = next((e["sha256"] for e in manifest["files"] if e["path"] == file.name), None)
    if known is None or not file.is_file() or sha256(file) != known:
        return {}
    return dict(json.loads(file.read_text()))


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
    """Raises VerificationFailed where a file that the program is made from is missing or changed."""
    for entry in [e for e in manifest["files"] if e["path"] not in EDITABLE]:
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


def readme(program: Program, reported: bool) -> str:
    """How to use the folder, from within it: that stays right wherever it goes."""
    meta = program.meta
    prompt = fitted(program, (meta.get("prompts") or [[0]])[0])
    most = room(program, prompt)
    n, options, lines = min(20, most), "", []
    if meta.get("modality") == "image":
        n, options = most, ", temperature=0.8"
        lines += [("aropt run . -n 10", "ten pictures in one file beside this folder; -o FILE puts it elsewhere")]
    else:
        given = "TEXT" if (meta.get("modality") == "text") else "'1 2 3'"
        lines += [(f"aropt run . -n {n}", f"{n} new tokens after an example; -p {given} for a prompt of yours")]
    if reported:
        lines += [("aropt bench .", "time it again, here")]
    lines += [("aropt inspect .", "print the program")]
    width = max(len(command) for command, _ in lines) + 4
    commands = "\n".join(f"    {command:<{width}}{what}" for command, what in lines)
    report = "report.html shows what was done and how it was verified; " if reported else ""
    return f"""# {meta.get("name", program.name)}, optimized by aropt {__version__}

In this folder:

{commands}

In Python, with lists of token ids, here for {n} new ones after each prompt:

    import aropt

    aropt.load(".").generate([{prompt}], {n}{options})

{report}program.txt is the program as text.
"""
