"""The benchmark of the README: optimizes the reference models, times them side by side, redraws the table.

    python -m perf.run [--runs 7] [--no-readme] [MODEL ...]

Writes perf/results/cpu.json (device, versions, medians and spread) and the table between the marks in README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "cpu.json"
START, END = "<!-- results: written by python -m perf.run -->", "<!-- end of results -->"
WORK = {"digits-ar": ("cached", "eager", "inductor"), "text-ar": ("cached", "eager", "hf", "inductor")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(WORK))
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-readme", action="store_true")
    args = parser.parse_args()
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for model in args.models:
        known[model] = measure(model, args.runs, args.threads)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    text = table(known)
    print(text)
    if not args.no_readme:
        write_readme(text)


def measure(model: str, runs: int, threads: int) -> dict[str, Any]:
    """One model optimized from scratch and timed; the parts of its report that a table needs."""
    from aropt.command import Request, optimize

    say = lambda text: print(f"{model}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    report = optimize(
        Request(
            model,
            ROOT / "build" / "bench" / model,
            runs=runs,
            threads=threads,
            against=WORK.get(model, ("cached", "eager")),
            force=True,
            say=say,
        )
    )
    return {k: report[k] for k in ("env", "target", "verify", "bench", "speedup", "roofline", "notes")}


def table(known: dict[str, Any]) -> str:
    """Markdown: a row for each model and variant."""
    lines = [
        "| model | variant | median | p10 to p90 | tokens/s | aropt is faster by |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for model, found in known.items():
        rates = {b["variant"]: b["median"] for b in found["bench"] if b["unit"] == "tok/s"}
        for b in found["bench"]:
            if b["phase"] == "generate" and b["unit"] == "ms":
                factor = found["speedup"].get(b["variant"])
                lines.append(
                    f"| {model} | {b['variant']} | {b['median']:.1f} ms | {b['p10']:.1f} to {b['p90']:.1f} | "
                    f"{rates[b['variant']]:.0f} | {f'{factor:.1f}x' if factor else ''} |"
                )
    first = next(iter(known.values()))
    env, n = first["env"], first["bench"][0]["n"]
    lines.append("")
    versions = f"torch {env['torch']}, onnxruntime {env['onnxruntime']}, transformers {env['transformers']}"
    lines.append(
        f"{env['cpu']}, {env['threads']} threads, {versions}. Batch 1, greedy; 64 tokens of digits-ar, 200 of text-ar; "
        f"medians of {n} runs, each variant in a process of its own, taking turns."
    )
    return "\n".join(lines)


def write_readme(text: str) -> None:
    """Puts the table between the marks."""
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{START}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
