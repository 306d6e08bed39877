"""Weights of eight bits (`int8-linears`) beside float32 and llama.cpp's Q8_0: time, and what is lost.

    python -m perf.int8 [--runs 24] [--threads 2] [MODEL ...]

Models are text-ar and random Llamas of perf.models. Each variant runs in a process of its own, taking turns, greedy
and without drafts. The budget is KL alone, and the Llamas are not validated, which would take longer than the timing.
Lost is what aropt measures itself (drift, against the float32 program), and for all the share of ids that float32
writes too, each after its own. AROPT_PYTHON_LLAMACPP and _LLAMACPP_Q8 name a Python that has llama.cpp. Writes
perf/results/int8.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from aropt.bench.variants import Origin, Spec
from aropt.targets.ort.threads import own_process
from perf import models
from perf.images import ROOT, ROUNDS, drifted

RESULTS = ROOT / "perf" / "results" / "int8.json"
MODELS, TOKENS, PATIENCE = ("text-ar", "small", "mid"), 200, 30.0
FLOAT, INT8 = "aropt, float32", "aropt, int8-linears"
LOSSY = {"passes": ["int8-linears:least=4096"], "budget": "kl=0.05"}
VARIANTS = {FLOAT: "aropt", INT8: "aropt", "llama.cpp, float32": "llamacpp", "llama.cpp, Q8_0": "llamacpp-q8"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    own_process()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for model in args.models or MODELS:
        found[model] = measured(model, args.runs, args.threads)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


def built(model: str, out: Path, threads: int, **lossy: Any) -> Path:
    """The artifact, optimized from scratch; large ones are not validated, as that takes longer than the timing."""
    from aropt.cli.optimize import optimize
    from aropt.cli.options import Doing, Reading, Writing

    source = str(models.folder(model, ROOT / "build" / "models")) if model in models.SHAPES else model
    say = lambda text: print(f"{out.name}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    doing = Doing(
        runs=0, threads=threads, no_check=model in models.SHAPES, measure=True, no_pass=["ngram-draft"], **lossy
    )
    optimize(Reading(source), doing, Writing(out, force=True, say=say))
    return out


def measured(model: str, runs: int, threads: int) -> dict[str, Any]:
    """{rows: {variant: {ms, first, agreement, version}}, drift}."""
    from aropt.bench import timing as bench
    from aropt.loops.request import fitted, room
    from aropt.pipeline.describe import environment
    from aropt.pipeline.reading import load

    folder = ROOT / "build" / "bench"
    outs = {FLOAT: built(model, folder / f"{model}-float32", threads)}
    outs[INT8] = built(model, folder / f"{model}-int8", threads, **LOSSY)
    program = load(outs[FLOAT], target="eager").program
    prompt = models.PROMPT if model in models.SHAPES else fitted(program, program.meta["prompts"][0])
    n = min(TOKENS, room(program, prompt))
    timings = {name: bench.Timing(variant) for name, variant in VARIANTS.items()}
    made = {name: str(outs.get(name, outs[FLOAT])) for name in VARIANTS}
    origin = Origin(str(program.meta["source"]))
    specs = {name: Spec(v, made[name], prompt, n, threads, origin=origin) for name, v in VARIANTS.items()}
    for _ in range(ROUNDS):
        workers = [bench.Worker(specs[name], t) for name, t in timings.items() if not t.error]
        bench.take_turns(workers, runs // ROUNDS, lambda text: print(text, file=sys.stderr, flush=True), PATIENCE)
    right = timings[FLOAT].tokens
    rows = {
        name: {"ms": statistics.median(t.runs), "p10": t.quantile(0.1), "p90": t.quantile(0.9), "n": len(t.runs),
               "first": statistics.median(t.first), "version": t.version,
               "agreement": sum(a == b for a, b in zip(t.tokens, right, strict=True)) / len(right)}
        for name, t in timings.items() if t.runs
    }  # fmt: skip
    errors = {name: t.failure() for name, t in timings.items() if not t.runs}
    return {
        "env": environment(threads).model_dump(),
        "tokens": n,
        "rows": rows,
        "drift": drifted(outs[INT8]),
        "errors": errors,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| model | variant | median | p10 to p90 | tokens/s | first token | ids as float32's |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, f in found.items():
        for name, r in f["rows"].items():
            rate = f["tokens"] / r["ms"] * 1e3
            lines.append(f"| {model} | {name} | {r['ms']:.1f} ms | {r['p10']:.1f} to {r['p90']:.1f} | {rate:.0f} | "
                         f"{r['first']:.1f} ms | {r['agreement']:.0%} |")  # fmt: skip
    lines.append("")
    for model, f in found.items():
        d, rows = f["drift"], f["rows"]
        faster = ", ".join(f"{rows[n]['ms'] / rows[INT8]['ms']:.2f} times {n}" for n in rows if n != INT8)
        lines.append(f"* {model}: {INT8} is {faster}. KL {d['kl']:.2g} nats (largest {d['kl_max']:.2g}), the likeliest "
                     f"id is the same in {d['top1']:.1%} of {d['measured']:.0f} rows.")  # fmt: skip
        lines += [f"* {why}" for why in f["errors"].values()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
