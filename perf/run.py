"""The benchmark of the README: optimizes models, times them side by side with other engines, redraws the table.

    python -m perf.run [--runs 48] [--no-readme] [MODEL ...]

Models are digits-ar, text-ar and three random Llamas (see perf.models), which it writes under build/. Writes
perf/results/cpu.json (for each model: device, versions, medians and spread; models that are not named keep theirs) and
the table between the marks in README.md. Engines that are not installed here are listed with how to get them:
AROPT_PYTHON_ORT_GENAI and AROPT_PYTHON_LLAMACPP name Pythons that have them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from aropt.bench.variants import Origin
from aropt.targets.ort.threads import own_process
from perf import models

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "cpu.json"
START, END = "<!-- results: written by python -m perf.run -->", "<!-- end of results -->"
WORK = {
    "digits-ar": ("stepping", "one-call", "cached", "eager", "inductor-max"),
    "text-ar": (
        "no-draft",
        "stepping",
        "one-call",
        "cached",
        "eager",
        "hf",
        "hf-static",
        "hf-lookup",
        "ort-genai",
        "llamacpp",
    ),
    **dict.fromkeys(models.SHAPES, ("no-draft", "hf", "ort-genai", "llamacpp")),
}
LARGE = ("small", "mid")  # validation in fp64 would take longer than the timing; tokens are compared with the peers'
ROUNDS = 2  # processes of each variant, one after the other: the same program may run at another speed in each
PATIENCE = 30.0  # seconds of a process: slow variants are timed less often
TOKENS = 200  # new tokens of a run, where the model has room


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(WORK)} (default: all)")
    parser.add_argument("--runs", type=int, default=48, help="timed runs of each variant, in two processes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-readme", action="store_true", help="only print the table")
    args = parser.parse_args()
    own_process()
    for model in args.models:
        if model not in WORK:
            parser.error(f"no model '{model}'; there are {', '.join(WORK)}")
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for model in args.models or WORK:
        known[model] = measure(model, args.runs, args.threads)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    text = table(known)
    print(text)
    if not args.no_readme:
        write_readme(text)


def measure(model: str, runs: int, threads: int) -> dict[str, Any]:
    """One model optimized from scratch and timed; the parts of its report that a table needs, and engines' versions."""
    from aropt.bench import timing as bench
    from aropt.cli.optimize import optimize
    from aropt.cli.options import Doing, Reading, Writing
    from aropt.cli.sections import timed
    from aropt.ir.units import rows_for
    from aropt.loops.request import fitted, room
    from aropt.pipeline.cost import step_bytes
    from aropt.pipeline.reading import load

    say = lambda text: print(f"{model}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    drawn = model in models.SHAPES
    source = str(models.folder(model, ROOT / "build" / "models")) if drawn else model
    out = ROOT / "build" / "bench" / model
    large = model in LARGE
    doing = Doing(runs=0, threads=threads, no_check=large, measure=True)
    report = optimize(Reading(source), doing, Writing(out, force=True, say=say))
    program = load(out).program
    prompt = models.PROMPT if drawn else fitted(program, program.meta["prompts"][0])
    n = min(TOKENS, room(program, prompt))
    size, rates = step_bytes(program, len(prompt) + rows_for(program.meta, n) // 2), list[float]()

    def read() -> None:
        rates.append(bench.bandwidth(size, threads))
        time.sleep(0.1)  # torch's threads wait busily for a while

    origin = Origin(source)
    timings = bench.measure(out, ["aropt", *WORK[model]], prompt, n, threads, runs, say, ROUNDS, PATIENCE, read, origin)
    kept = {k: report[k] for k in ("env", "target", "verify")}
    kept |= timed(timings, program, n, len(prompt), threads, rates).model_dump()
    kept |= {"loop": program.meta.get("loop", "positions"), "runs": runs, "rounds": ROUNDS}
    return {**kept, "tokens": n, "engines": {v: t.version for v, t in timings.items() if t.version}}


def table(known: dict[str, Any]) -> str:
    """Markdown: a row for each model and variant; then machine, versions and protocol; then what went otherwise."""
    lines = [
        "| model | variant | median | p10 to p90 | tokens/s | first token | of read bandwidth | aropt is faster by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, found in known.items():
        rates = {b["variant"]: b["median"] for b in found["bench"] if b["unit"] == "tok/s"}
        first = {b["variant"]: b["median"] for b in found["bench"] if b["phase"] == "prefill"}
        streams = found.get("loop", "positions") == "positions"  # the first id of a canvas is no sign of the others
        roofline = found["roofline"] or {}
        for b in found["bench"]:
            if b["phase"] == "generate" and b["unit"] == "ms":
                name, factor = b["variant"], found["speedup"].get(b["variant"])
                bound = bool(roofline) and name.startswith(roofline.get("variant", "aropt"))
                cells = [
                    model,
                    name,
                    f"{b['median']:.1f} ms",
                    f"{b['p10']:.1f} to {b['p90']:.1f}",
                    f"{rates[name]:.0f}",
                    f"{first[name]:.1f} ms" if streams else "",
                    f"{roofline['share']:.0%}" if bound else "",
                    f"{factor:.2f}x" if factor else "",
                ]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", protocol(known), *remarks(known)])


def protocol(known: dict[str, Any]) -> str:
    """One paragraph: machine, versions, what a run is; where models differ in one of these, which has what."""
    packages = ("torch", "onnxruntime", "transformers")
    machine = {m: f"{found['env']['cpu']}, {found['env']['threads']} threads" for m, found in known.items()}
    versions = [{m: f"{p} {found['env'][p]}" for m, found in known.items()} for p in packages]
    engines = sorted({e for found in known.values() for e in found.get("engines", {})})
    versions += [{m: f["engines"][e] for m, f in known.items() if e in f.get("engines", {})} for e in engines]
    tokens = {m: str(found.get("tokens", TOKENS)) for m, found in known.items()}
    runs = [b["n"] for found in known.values() for b in found["bench"]]
    number = f"{max(runs)} runs" + (f" ({min(runs)} at least, of slow ones)" if min(runs) < max(runs) else "")
    rounds = {m: str(found.get("rounds", ROUNDS)) for m, found in known.items()}
    setting = ", ".join(map(said, [machine, *versions]))
    return (
        f"{setting}. Batch 1, greedy, {usual(tokens, 'new tokens', str(TOKENS))}; medians of {number} in "
        f"{usual(rounds, 'processes')} of each variant, taking turns."
    )


def said(values: dict[str, str]) -> str:
    """The value, or each with the models that have it."""
    different = dict.fromkeys(values.values())
    if len(different) == 1:
        return next(iter(different))
    return " or ".join(f"{v} ({', '.join(m for m, w in values.items() if w == v)})" for v in different)


def usual(values: dict[str, str], noun: str, most: str = "") -> str:
    """The value that most have, or the one given, of the noun; in brackets the others'."""
    most = most or statistics.mode(values.values())
    others = [v for v in dict.fromkeys(values.values()) if v != most]
    named = [f"{v} of {', '.join(m for m, w in values.items() if w == v)}" for v in others]
    return f"{most} {noun}" + (f" ({'; '.join(named)})" if named else "")


def remarks(known: dict[str, Any]) -> list[str]:
    """What was not timed, or gave other tokens, as a list; engines' versions are in the text above it."""
    lines = []
    for model, found in known.items():
        versions = {f"{variant} is {engine}." for variant, engine in found.get("engines", {}).items()}
        lines += [f"* {model}: {note}" for note in found["notes"] if note not in versions]
    return ["", *lines] if lines else []


def write_readme(text: str) -> None:
    """Puts the table between the marks."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
