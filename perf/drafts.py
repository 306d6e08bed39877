"""What drafts from the text itself are worth on held-out text: text-ar with and without the pass ngram-draft.

    python -m perf.drafts [--prompts 16] [--runs 9] [--threads 2]

Prompts are windows of 64 bytes of held-out documents, answers 200 bytes, greedy. Both programs generate each answer in
turns, and must give the same ids. Writes perf/results/drafts.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from aropt.bench.drafted import unchecked
from aropt.targets.ort.threads import own_process
from perf.canvas import ROOT, environment

RESULTS = ROOT / "perf" / "results" / "drafts.json"
PROMPT, NEW, DRAFTS = 64, 200, (2, 4, 6)
PAUSE = 0.05  # seconds before each run: the threads of the one before wait busily for a while


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9, help="of each program and prompt; medians")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own_process()
    programs = {"plain": optimized([], args.threads)}
    programs |= {f"{n} drafts": optimized([f"ngram-draft:drafts={n}"], args.threads) for n in DRAFTS}
    rows = [measured(programs, prompt, args.runs) for prompt in prompts(args.prompts)]
    result = {"env": environment(args.threads), "prompt": PROMPT, "new": NEW, "runs": args.runs, "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


def optimized(chosen: list[str], threads: int) -> Any:
    import aropt

    return unchecked(aropt.capture("text-ar"), chosen, threads)


def prompts(count: int) -> list[list[int]]:
    """Windows of held-out text, evenly spaced."""
    from aropt.models import text

    return text.heldout(count, PROMPT)


def measured(programs: dict[str, Any], prompt: list[int], runs: int) -> dict[str, Any]:
    """Milliseconds (median) and rounds of each program; raises if they give other ids."""
    ms: dict[str, list[float]] = {name: [] for name in programs}
    rounds, answers = dict.fromkeys(programs, 0), {}
    for name, program in programs.items():
        seen: list[int] = []
        program.generate([prompt], NEW, on_round=lambda _, seen=seen: seen.append(1))
        rounds[name] = len(seen)
    for _ in range(runs):
        for name, program in programs.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            answers[name] = program.generate([prompt], NEW)
            ms[name].append((time.perf_counter() - start) * 1e3)
    if any(answer != answers["plain"] for answer in answers.values()):
        raise SystemExit(f"other ids with drafts, prompt {prompt}")
    return {"ms": {name: statistics.median(times) for name, times in ms.items()}, "rounds": rounds}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: over the prompts, ids a round, how many times as fast as without drafts, what a round costs."""
    lines = [
        "| drafts | ids a round | least to most | as fast as plain | least to most | a round costs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in rows[0]["ms"]:
        if name != "plain":
            ids = sorted(NEW / row["rounds"][name] for row in rows)
            gain = sorted(row["ms"]["plain"] / row["ms"][name] for row in rows)
            cost = [r["ms"][name] / r["rounds"][name] / (r["ms"]["plain"] / r["rounds"]["plain"]) for r in rows]
            lines.append(
                f"| {name.removesuffix(' drafts')} | {statistics.median(ids):.1f} | {ids[0]:.1f} to {ids[-1]:.1f} "
                f"| {statistics.median(gain):.2f}x | {gain[0]:.2f} to {gain[-1]:.2f} | {statistics.median(cost):.2f}x |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
