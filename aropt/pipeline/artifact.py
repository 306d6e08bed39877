"""The artifact: a folder with the program, its weights, what the target built, and the evidence (design section 9).

Hashes of all files are in manifest.json. No pickle. How it gets to OUT is in aropt.pipeline.store.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from aropt import __version__
from aropt.ir.program import Program
from aropt.loops.request import fitted, room
from aropt.pipeline.manifest import listing, write_manifest
from aropt.pipeline.store import staged


def save(
    program: Program,
    path: str | Path,
    force: bool = False,
    report: dict[str, Any] | None = None,
    built: Path | None = None,
) -> None:
    """Writes the program with its report; `built` is the folder with what a target built, which is brought along."""
    with staged(Path(path), force) as folder:
        if built is not None and (built / "models").is_dir():
            shutil.copytree(built / "models", folder / "models")
        write(program, folder, report)


def write(
    program: Program, folder: Path, report: dict[str, Any] | None = None, extra: list[Path] | None = None
) -> None:
    """All files of an artifact into `folder`; those under models/ may be there already."""
    from aropt.ir.printer import text
    from aropt.ir.serialize import to_json

    (folder / "program.txt").write_text(text(program))
    (folder / "program.json").write_text(json.dumps(to_json(program), indent=1))
    save_file({n: w.detach().contiguous() for n, w in unique(program.weights).items()}, folder / "weights.safetensors")
    for file in extra or []:
        shutil.copy(file, folder / file.name)
    if report:
        from aropt.pipeline.report import html, validate

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
