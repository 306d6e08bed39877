"""The command line: flags in, one result on stdout, progress on stderr, an exit status that says what happened."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from aropt.bench.timing import AGAINST
from aropt.cli import recipes
from aropt.cli.console import Progress, ending, interrupted, note, open_streams, show_plan, show_report
from aropt.cli.options import SEEDS, Doing, ModelArg, Reading, Remote, Writing, split, spread
from aropt.errors import UsageError
from aropt.pipeline import interrupts
from aropt.targets.ort.threads import own_process

app = typer.Typer(
    name="aropt",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="An optimizing compiler for generation loops: a plain model in, a verified and faster program out.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(recipes.app, name="recipes")

Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More detail; -vv shows tracebacks.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


@app.command()
@spread
def optimize(
    read: Reading,
    do: Doing,
    write: Writing,
    *,
    plugin: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="A Python file that holds a pass, an op or a loop; it runs."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what each pass would do.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say where each pass applied, and where it did not and why.")
    ] = False,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first pass after which the lowered program fails.")
    ] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Optimize a model: derive its cache, fuse, lower, prove equal to eager, time, and write OUT."""
    from aropt.cli import optimize as command
    from aropt.pipeline import plugins

    for file in plugin or []:
        plugins.load(file)
    with Progress() as progress:
        write = replace(write, say=progress, show=note)
        if dry_run:
            show_plan(command.plan(read, do, write), as_json, explain)
            return
        if bisect:
            bad = command.run_bisect(read, do, write)
            print(json.dumps({"first_bad": bad}) if as_json else f"first bad pass: {bad or 'none'}")
            return
        report = command.optimize(read, do, write)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        show_report(report, write.out, explain or verbose > 0, time.perf_counter() - progress.start)


@app.command()
def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact.")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Text, or token ids parted by commas or blanks.")
    ] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=0, help="Sequences for an image model, new tokens for others.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.")] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.")] = None,
    top_p: Annotated[float | None, typer.Option(help="1 is off.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other parameter of the rule.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Seed of the noise.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="An id or a text of one that ends a sequence (default: the model's own; '' is none)."),
    ] = None,
    fill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ANSWER", help="What a canvas's answer holds: [MASK] is an id to find, [MASK*8] are eight."
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option("--image", "-o", help="Where the picture goes (image models).")] = None,
    grid: Annotated[str | None, typer.Option(metavar="COLUMNSxROWS", help="Rows of pictures, such as 8x5.")] = None,
    target: Annotated[str | None, typer.Option(help="Run on another target than the artifact's.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a picture that aropt didn't draw.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Generate with an artifact."""
    from aropt.cli import run as generation

    params = {k: v for k, v in {"temperature": temperature, "top_k": top_k, "top_p": top_p}.items() if v is not None}
    for pair in param or []:
        name, _, value = pair.partition("=")
        try:
            params[name.replace("-", "_")] = float(value)
        except ValueError:
            raise UsageError(
                what=f"'{pair}' is not NAME=VALUE", where="--param", hint="e.g. --param min_p=0.05"
            ) from None
    result = generation.run(out, prompt, n, params, seed, stop, image, target, grid, force, fill)
    print(json.dumps(result) if as_json else generation.text(result))


@app.command("bench")
def bench_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact.")],
    against: Annotated[list[str] | None, typer.Option(help=f"{', '.join(AGAINST)}.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs of each variant.")] = 5,
    tokens: Annotated[int, typer.Option("-n", min=1, help="New tokens of a run.")] = 200,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Threads.")] = None,
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="What OUT was made from, for variants that run the model itself.")
    ] = "",
    guide: Annotated[str, typer.Option(metavar="MODEL", help="The guide of OUT's canvas, for the same.")] = "",
    trust_remote_code: Remote = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Time an artifact against others, taking turns, each in a process of its own."""
    from aropt.bench.variants import Origin
    from aropt.cli import run as generation
    from aropt.pipeline.report import table

    origin = Origin(model, trust_remote_code, guide)
    with Progress() as progress:
        report = generation.bench(out, split(against), runs, tokens, threads, progress, origin)
    print(
        json.dumps({k: report[k] for k in ("env", "bench", "speedup", "roofline", "notes") if k in report}, indent=1)
        if as_json
        else table(report) + "".join(f"\nnote: {text}" for text in report["notes"])
    )


@app.command()
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="An artifact.")],
    to: Annotated[str, typer.Option(help="onnx.")] = "onnx",
    folder: Annotated[Path | None, typer.Option("--out", "-o", help="Where to write (default: OUT-onnx).")] = None,
    whole_loop: Annotated[
        bool, typer.Option("--whole-loop", help="One model.onnx that generates: prompt in, tokens out.")
    ] = False,
    ort: Annotated[bool, typer.Option("--ort", help="Allow operators that only ONNX Runtime has (faster).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Write an artifact's graphs as ONNX files with a loop.json that says how to run them, or all as one model."""
    from aropt.cli import run as generation

    folder = folder or generation.beside(out, f"-{to}")
    with Progress() as progress:
        written = generation.export(out, to, folder, force, progress, whole_loop, ort)
    if as_json:
        print(json.dumps(written))
        return
    print("\n".join(f["path"] for f in written["files"]))
    if "verify" in written:
        print(f"verified: {written['verify']['cases']} cases, {written['verify']['tokens']} tokens equal")


@app.command()
def inspect(
    model: ModelArg,
    graph: Annotated[str | None, typer.Option(help="Only this graph.")] = None,
    fold: Annotated[bool, typer.Option(help="Print repeated layers once.")] = True,
    capacity: Annotated[int | None, typer.Option(help="Tokens of a sequence at most.")] = None,
    trust_remote_code: Remote = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Print the program of a model or of an artifact."""
    from aropt.cli import run as generation

    print(generation.inspect(model, graph, fold, capacity, trust_remote_code, as_json))


@app.command()
def models(as_json: Json = False, verbose: Verbose = 0) -> None:
    """List the reference models."""
    from aropt.models import REFERENCES

    if as_json:
        print(
            json.dumps(
                [
                    {
                        "name": r.name,
                        "modality": r.modality,
                        "vocab": r.vocab,
                        "capacity": r.capacity,
                        "heldout": r.heldout,
                        "description": r.description,
                    }
                    for r in REFERENCES.values()
                ],
                indent=1,
            )
        )
        return
    for r in REFERENCES.values():
        measured = ", ".join(f"{k} {v:.4g}" for k, v in r.heldout.items() if isinstance(v, (int, float)))
        rows = "tokens" if r.unit == 1 else f"windows of {r.unit} tokens"
        print(
            f"{r.name:<16} {r.modality:<6} vocabulary {r.vocab}, up to {r.capacity} {rows}. {r.description}\n"
            f"{'':<16} held out: {measured}"
        )


@app.command()
def passes(as_json: Json = False, verbose: Verbose = 0) -> None:
    """List the passes in order, with their level, when they run, and their options."""
    import dataclasses

    from aropt.pipeline.registry import names, pass_class

    found = []
    for name in names():
        cls = pass_class(name)
        what = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        options = {f.name: f.default for f in dataclasses.fields(cls)}
        facts = {"level": cls.contract.level, "when": cls.contract.when, "after": cls.contract.after}
        found.append({"name": name, **facts, "options": options, "what": what})
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for p in found:
        print(
            f"{p['name']:<20} {p['level']:<9} {p['when']:<7} {p['what']}"
            + (f" Options: {p['options']}" if p["options"] else "")
        )


@app.command()
def doctor(as_json: Json = False, verbose: Verbose = 0) -> None:
    """Say what this machine can build and run."""
    from aropt.cli import run as generation

    found = generation.doctor()
    print(json.dumps(found, indent=1) if as_json else "\n".join(f"{k:<14} {v}" for k, v in found.items()))


def main() -> None:
    """Runs the command line; every error is one message and one exit status."""
    verbose = sum(a.count("v") for a in sys.argv if a.startswith("-v") and set(a[1:]) == {"v"}) + sys.argv.count(
        "--verbose"
    )
    with interrupts.listening():
        try:
            code = app(standalone_mode=False) or 0
            if sys.stdout is not None:
                sys.stdout.flush()  # what can't be written is an error that can be told
        except typer.Exit as done:
            code = done.exit_code
        except BaseException as error:
            code = ending(error, verbose)
        sys.exit(interrupted() if code == 130 else code)  # typer turns Ctrl-C into a silent exit


def command_line() -> None:
    """`main` in a process that runs nothing else."""
    open_streams()
    own_process()
    main()


if __name__ == "__main__":
    command_line()
