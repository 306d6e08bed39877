"""Images by windows of neighbouring ids (Token-Shuffle): fewer rounds, and what they are worth end to end.

    python -m perf.images [--runs 48] [--threads 2]

Optimizes digits-ar, digits-shuffle2 and digits-shuffle4 in the same way, and a 32 x 32-id image model of width 512
(random weights) with windows of 1 and 2, that of 2 also without drafts (`int8-draft`, which `optimize` tries by itself)
and with weights of eight bits (`int8-linears`, lossy: its drift is printed, and bounded by BUDGET); each variant in a
process of its own, taking turns. Says whether a variant drew the ids of the eager one. Writes perf/results/images.json
and prints the table.
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

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "images.json"
LARGE = {"side": 32, "levels": 1024, "classes": 1000, "width": 512, "layers": 8, "heads": 8, "hidden": 1408,
         "mixing": 1024}  # fmt: skip
INT8, PLAIN, BUDGET = "-int8", "-plain", "kl=0.01"
TEMPERATURE = 1.0  # images are drawn: the same noise for all variants
PATIENCE = 60.0  # seconds of a process: slow variants are timed less often
ROUNDS = 2  # processes of each variant, one after the other
# work -> its rows: (model, variant of aropt.bench.timing); then ratios: (slower, faster, the least that is asked for)
WORKS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str, float]]]] = {
    "digits": (
        [("digits-ar", "aropt"), ("digits-shuffle2", "aropt"), ("digits-shuffle4", "aropt"), ("digits-ar", "cached"),
         ("digits-shuffle2", "cached")],
        [("digits-ar, aropt", "digits-shuffle2, aropt", 3.0), ("digits-shuffle2, cached", "digits-shuffle2, aropt", 0)],
    ),
    "32 x 32 ids, width 512": (
        [("window1", "cached"), ("window2", "cached"), ("window1", "aropt"), ("window2", "aropt"),
         ("window2-plain", "aropt"), ("window2-int8", "aropt")],
        [("window2, cached", "window2, aropt", 6.0), ("window2, cached", "window2-plain, aropt", 0),
         ("window2, cached", "window2-int8, aropt", 0), ("window1, cached", "window2, aropt", 0),
         ("window1, aropt", "window2, aropt", 0)],
    ),
}  # fmt: skip


def window1() -> Any:
    return large(1)


def window2() -> Any:
    return large(2)


def large(window: int) -> Any:
    """The larger model, weights of seed 0."""
    import torch

    from aropt.models.shuffle import Shape, ShuffleAR

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ShuffleAR(Shape(window=window, **LARGE))  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", help=", ".join(WORKS))
    parser.add_argument("--runs", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    own_process()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for work in args.works or WORKS:
        found[work] = measured(work, args.runs, args.threads)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        print(table(work, found[work]), flush=True)


def measured(work: str, runs: int, threads: int) -> dict[str, Any]:
    """All rows of a work: {rows: {name: {ms, least, most, n, rounds}}, ratios}."""
    from aropt.bench import timing as bench
    from aropt.loops.request import room
    from aropt.pipeline.describe import environment
    from aropt.pipeline.reading import load

    variants, ratios = WORKS[work]
    outs = {model: built(model, threads) for model in dict.fromkeys(m for m, _ in variants)}
    names = [f"{model}, {variant}" for model, variant in variants]
    timings = {name: bench.Timing(name) for name in names}
    specs, rounds = [], {}
    for name, (model, variant) in zip(names, variants, strict=True):
        program = load(outs[model], target="eager").program
        prompt = [int(t) for t in program.meta["prompts"][0]]
        rounds[name] = int(program.meta["capacity"])
        n = room(program, prompt)
        origin = Origin(str(program.meta["source"]))
        specs.append(Spec(variant, str(outs[model]), prompt, n, threads, TEMPERATURE, origin))
    for _ in range(ROUNDS):
        workers = [bench.Worker(s, timings[name]) for name, s in zip(names, specs, strict=True)]
        bench.take_turns(workers, runs // ROUNDS, lambda text: print(text, file=sys.stderr, flush=True), PATIENCE)
    rows = {name: row(t, rounds[name]) for name, t in timings.items() if t.runs}
    return {
        "env": environment(threads).model_dump(), "rows": rows,
        "drift": {model: found for model, out in outs.items() if (found := drifted(out))},
        "ratios": [[a, b, rows[a]["ms"] / rows[b]["ms"], least] for a, b, least in ratios],
        "same": [
            share(timings[a].tokens, timings[b].tokens) if base_of(a) == base_of(b) else None for a, b, _ in ratios
        ],
        "drafts": {model: found for model, out in outs.items() if (found := drafts(out))},
        "errors": {name: t.failure() for name, t in timings.items() if not t.runs},
    }  # fmt: skip


def base_of(name: str) -> str:
    """The model of a row or an artifact, whatever was done to it: rows of the same one are to have the same ids."""
    return name.partition(",")[0].removesuffix(INT8).removesuffix(PLAIN)


def share(some: list[int], others: list[int]) -> float:
    """The share of equal ids."""
    return sum(a == b for a, b in zip(some, others, strict=True)) / len(some)


def drafts(out: Path) -> str:
    """What trying drafts found."""
    notes = json.loads((out / "report.json").read_text())["notes"]
    return next((note for note in notes if note.startswith("int8-draft")), "")


def row(timing: Any, rounds: int) -> dict[str, Any]:
    ordered = sorted(timing.runs)
    return {
        "ms": statistics.median(ordered),
        "least": ordered[0],
        "most": ordered[-1],
        "n": len(ordered),
        "rounds": rounds,
    }


def built(model: str, threads: int) -> Path:
    """The artifact of a model, optimized from scratch."""
    from aropt.cli.optimize import optimize
    from aropt.cli.options import Doing, Reading, Writing

    out = ROOT / "build" / "bench" / model
    small, base = model.startswith("digits"), base_of(model)
    source = model if small else f"{Path(__file__)}:{base}"
    options: dict[str, Any] = {"passes": ["int8-linears"], "budget": BUDGET} if model.endswith(INT8) else {}
    options |= {"no_pass": ["int8-draft"]} if base != model else {}
    say = lambda text: print(f"{model}: {text}", file=sys.stderr, flush=True)  # noqa: E731
    doing = Doing(runs=0, threads=threads, no_check=not small, measure=True, **options)
    optimize(Reading(source), doing, Writing(out, force=True, say=say))
    return out


def drifted(out: Path) -> dict[str, float]:
    """What a lossy pass was measured to lose; empty without one. Raises SystemExit if it was reverted."""
    passes = json.loads((out / "report.json").read_text())["passes"]
    found = [p for p in passes if p["level"] == "lossy" and p["status"] != "skipped"]
    if any(p["status"] == "reverted" for p in found):
        raise SystemExit(f"{out.name}: reverted: {found[0]['reason']}")
    return {k: p["verify"][k] for p in found for k in ("kl", "kl_max", "top1", "agreement", "measured")}


def table(work: str, found: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"\n### {work}\n",
        "| variant | rounds | median | least to most | n |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {r['rounds']} | {r['ms']:.1f} ms | {r['least']:.1f} to {r['most']:.1f} | {r['n']} |"
        for name, r in found["rows"].items()
    ]
    lines.append("")
    for (slow, fast, ratio, least), same in zip(found["ratios"], found["same"], strict=True):
        asked = f" (asked: {least:g})" if least else ""
        ids = "" if same is None else f"; it drew {same:.0%} of the same ids"
        lines.append(f"* {fast} is {ratio:.2f} times as fast as {slow}{asked}{ids}.")
    lines += [f"* {model}: {note}" for model, note in found["drafts"].items()]
    for model, d in found.get("drift", {}).items():
        rows, ids = f"{d['top1']:.1%} of {d['measured']:.0f} rows", f"{d['agreement']:.0%} of the ids"
        lines.append(f"* {model}: KL {d['kl']:.2g} nats (largest {d['kl_max']:.2g}), the likeliest id is the same in "
                     f"{rows}; drawn with the same noise, {ids} are.")  # fmt: skip
    return "\n".join([*lines, *(f"* {why}" for why in found["errors"].values())])


if __name__ == "__main__":
    main()
