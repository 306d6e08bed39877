"""What `run`, `bench`, `export`, `inspect` and `doctor` do."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from aropt.bench.variants import Origin
from aropt.cli import infill, pictures
from aropt.errors import UsageError
from aropt.frontend.texts import read_texts
from aropt.ir.program import Program
from aropt.loops.request import fitted, parse, room
from aropt.loops.runtime import answer, blaming
from aropt.models import REFERENCES
from aropt.pipeline import store
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.manifest import listing
from aropt.pipeline.reading import load


def run(
    out: Path,
    prompts: Sequence[str] | None,
    n: int | None,
    params: dict[str, Any],
    seed: int,
    stop: Sequence[str] | None,
    image: Path | None,
    target: str | None,
    grid: str | None = None,
    force: bool = False,
    fill: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Generates with an artifact: {tokens, text or image, prompts}. `force` overwrites whatever is at `image`.

    `stop`: ids, or texts of one id. `fill`: answers with blanks in them (see aropt.cli.infill).
    """
    made, coder = load(out, target), tokenizer(out)
    program = made.program

    def part(text: str) -> list[int]:
        """Ids of a part of a text."""
        if coder is None:
            return encode(text, program, None) if text.strip() else []
        return list(coder.encode(text, special=False)) if text else []

    options: dict[str, Any] = {"seed": seed} | ({} if stop is None else {"stop": infill.stops(stop, part)})
    if fill is not None:
        options["fill"] = infill.answers(fill, n, program, part)
    if program.meta["modality"] == "image":
        path = image or beside(out, ".png")
        pictures.check_free(path, force)
        return run_images(made, 10 if n is None else n, prompts, params, options, path, grid, force)
    if grid or image:
        raise UsageError(
            what=f"'{out.name}' makes no pictures", where="--grid, --image", why="its tokens are no grey levels",
            hint="leave them out",
        )  # fmt: skip
    ids = [encode(p, program, coder) for p in prompts or []] or [fitted(program, program.meta["prompts"][0])]
    if fill is not None:
        n = max(map(len, options["fill"]))
    tokens = answered(made, ids, n, params, options)
    result: dict[str, Any] = {"prompts": ids, "tokens": tokens}
    if coder is not None:
        result["text"] = [coder.decode([*p, *t]) for p, t in zip(ids, tokens, strict=True)]
    return result


def answered(
    made: Compiled, ids: list[list[int]], n: int | None, params: dict[str, Any], options: dict[str, Any]
) -> list[list[int]]:
    """New ids of each prompt. Raises UsageError for what the program can't take: parameters are the caller's words."""
    with blaming(made.home):
        return answer(made.program, parse(made.program, ids, n, params, **options), made.executor)


def beside(out: Path, ending: str) -> Path:
    """The artifact's name with an ending, beside it; it may be given as `.`."""
    named = out if out.name not in ("", "..") else out.resolve()
    return named.with_name(named.name + ending)


def run_images(
    made: Compiled,
    n: int,
    prompts: Sequence[str] | None,
    params: dict[str, Any],
    options: dict[str, Any],
    path: Path,
    columns_by_rows: str | None,
    force: bool,
) -> dict[str, Any]:
    """n pictures, classes in turn, side by side in one PNG."""
    if n < 1 and not prompts:
        raise UsageError(what=f"can't draw {n} pictures", where="-n", hint="give a number of 1 or more")
    program = made.program
    classes = [list(map(int, p)) for p in program.meta["prompts"]]
    ids = [encode(p, program, None) for p in prompts] if prompts else [classes[i % len(classes)] for i in range(n)]
    columns, _ = pictures.layout(columns_by_rows, len(ids))
    most = min(room(program, p) for p in ids)
    tokens = answered(made, ids, most, {"temperature": 0.8, **params}, options)
    drawn = [pictures.pixels([*p[1:], *t], program.meta) for p, t in zip(ids, tokens, strict=True)]
    pictures.write(pictures.grid(drawn, columns, program.meta["vocab"]), path, force)
    return {"prompts": ids, "tokens": tokens, "image": str(path)}


def encode(text: str, program: Program, coder: Any) -> list[int]:
    """Token ids of a prompt: numbers as they are, text by the model's tokenizer."""
    parts = text.replace(",", " ").split()
    if coder is None:
        if parts and all(p.isdigit() for p in parts):
            return [int(p) for p in parts]
        raise UsageError(
            what=f"can't read the prompt '{text[:40]}'",
            why="this artifact has no tokenizer",
            hint="give token ids: --prompt '1 2 3'",
        )
    return list(coder.encode(text))


def tokenizer(out: Path) -> Any:
    """The tokenizer in the artifact, or None."""
    return read_texts(out)


def text(result: dict[str, Any]) -> str:
    """What `run` prints: the picture's path, the text, or the ids."""
    if "image" in result:
        return str(result["image"])
    if "text" in result:
        return "\n".join(result["text"])
    return "\n".join(" ".join(map(str, row)) for row in result["tokens"])


def bench(
    out: Path,
    against: Sequence[str],
    runs: int,
    tokens: int,
    threads: int | None,
    say: Callable[[str], None],
    origin: Origin,
) -> dict[str, Any]:
    """Times an artifact again, against what can be had by default; returns the new measurements as a report's."""
    import torch

    from aropt.bench import timing
    from aropt.bench.variants import NEED_MODEL
    from aropt.cli.sections import benchmark
    from aropt.pipeline.describe import environment

    timing.check(against)
    program, threads = load(out).program, threads or torch.get_num_threads()
    said = str(program.meta.get("source", ""))
    origin = replace(origin, model=origin.model or (said if said in REFERENCES else ""))  # these run no foreign code
    timing.check(against, origin)
    left = [] if against else [v for v in timing.DEFAULT_AGAINST if v in NEED_MODEL and not origin.model]
    against = against or [v for v in timing.DEFAULT_AGAINST if v not in left]
    found = benchmark(out, program, against, runs, tokens, threads, say, origin)
    told = [f"{', '.join(left)} are left out: name the model with --model MODEL."] if left else []
    return {
        "env": environment(threads).model_dump(),
        **found.model_dump(exclude_none=True),
        "notes": told + found.notes,
    }


def export(
    out: Path,
    to: str,
    folder: Path,
    force: bool,
    say: Callable[[str], None],
    whole_loop: bool = False,
    ort: bool = False,
) -> dict[str, Any]:
    """The program as ONNX files: its graphs and a loop.json that says how to run them, or all of it as one model.

    `ort` allows ONNX Runtime's own operators. The one model is run and compared with the program.
    """
    if to != "onnx":
        raise UsageError(what=f"can't export to '{to}'", where="--to", hint="this version exports to onnx")
    from aropt.exporters.onnx import export as export_graph
    from aropt.ir.serialize import to_json

    made = load(out, target="eager")
    program = made.program
    verify: dict[str, Any] = {}
    with store.staged_export(folder, force, [out]) as staging:
        if whole_loop:
            from aropt.exporters.whole_loop import export_program
            from aropt.targets.ort import run_loop

            say("export the loop")
            export_program(program, staging / "model.onnx", ort)
            say("compare it with the program")
            verify = run_loop.compare(staging / "model.onnx", program, made.executor, made.home)
        else:
            for name, graph in program.graphs.items():
                say(f"export {name}")
                export_graph(graph, program.weights, staging / f"{name}.onnx", ort)
            data = to_json(program)
            loop = {k: data[k] for k in ("inputs", "state", "control", "outputs", "meta") if k in data}
            (staging / "loop.json").write_text(json.dumps(loop, indent=1))
    files = [{"path": str(folder / f["path"]), "sha256": f["sha256"]} for f in listing(folder)]
    return {"files": files, **({"verify": verify} if verify else {})}


def inspect(model: str, graph: str | None, fold: bool, capacity: int | None, trusted: bool, as_json: bool) -> str:
    """The program's text, or its JSON form."""
    from aropt.ir.printer import graph_text
    from aropt.ir.printer import text as program_text
    from aropt.ir.serialize import to_json

    if (Path(model) / "manifest.json").is_file():
        if capacity is not None:
            raise UsageError(
                what="an artifact's capacity is what it was made with",
                where="--capacity",
                why=f"'{model}' is an artifact, whose caches have that size",
                hint="leave it out, or name the model",
            )
        program = load(model, target="eager").program
    else:
        from aropt.pipeline.api import capture

        program = capture(model, capacity=capacity, trust_remote_code=trusted)
    if graph is not None and graph not in program.graphs:
        raise UsageError(what=f"no graph '{graph}'", hint="graphs: " + ", ".join(program.graphs))
    if as_json:
        return json.dumps(to_json(program), indent=1)
    return (
        program_text(program, fold=fold)
        if graph is None
        else graph_text(program.graphs[graph], program.weights, fold=fold)
    )


def doctor() -> dict[str, str]:
    """Versions, devices, and which targets work here."""
    from importlib.util import find_spec

    from aropt import __version__
    from aropt.pipeline.describe import environment

    found = environment(None).model_dump()
    result = {
        "aropt": __version__,
        **{k: "not installed" if v is None and k != "gpu" else str(v or "none") for k, v in found.items()},
    }
    installed = {
        p: find_spec(p) is not None
        for p in ("onnxruntime", "onnxscript", "transformers", "triton", "tensorrt", "tensorrt_rtx")
    }
    ready = installed["onnxruntime"] and installed["onnxscript"]
    result["target eager"] = "ready"
    result["target inductor"] = "ready" if compiler() else "needs a C++ compiler (g++ or clang++)"
    result["target onnxruntime"] = "ready" if ready else "pip install 'aropt[onnx]'"
    result["models from Hugging Face directories"] = "ready" if installed["transformers"] else "pip install 'aropt[hf]'"
    result["python"] = sys.version.split()[0]
    return result


def compiler() -> bool:
    """Whether a C++ compiler is on the path."""
    from shutil import which

    return any(which(c) for c in ("g++", "clang++", "c++"))
