"""Guided diffusion beside the shrinking window alone: forwards, time, and what a judge thinks of the answers.

    python -m perf.guided [--prompts 64] [--seed 0] [--threads 2]

Either can be had faster and worse, so each guided rule is held to the threshold 0.9, and to the slowest setting without
a guide that the judge likes no better. A guide goes from the left itself, so it needs no blocks: both run without, too.

The judge is neither model: a byte n-gram of the training documents, frozen before anything is generated (see `NGram`).
Prompts are held-out text. Writes perf/results/guided.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aropt.targets.ort.threads import own_process
from aropt.targets.scratch import Scratch
from perf.canvas import BLOCK, NEW, ROOT, TAU, environment

RESULTS = ROOT / "perf" / "results" / "guided.json"
PROMPT, ORDER = 64, 6
DEFAULT = f"free-cache, {TAU}"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # rule, its parameters
    DEFAULT: ("threshold", {"threshold": TAU}),
    "free-cache, 0.95": ("threshold", {"threshold": 0.95}),
    "free-cache, 0.98": ("threshold", {"threshold": 0.98}),
    "free-cache, 0.99": ("threshold", {"threshold": 0.99}),
    "free-cache, 0.999": ("threshold", {"threshold": 0.999}),
    "free-cache, one id a round": ("threshold", {"threshold": 2.0}),
    "free-cache, one block, 0.9": ("threshold", {"threshold": 0.9, "block": NEW}),
    "free-cache, one block, 0.95": ("threshold", {"threshold": 0.95, "block": NEW}),
    "free-cache, one block, 0.99": ("threshold", {"threshold": 0.99, "block": NEW}),
    "guide-argmax": ("guide-argmax", {}),
    "guide-top-k, k = 5": ("guide-top-k", {"guide_k": 5}),
    "guide-relative, half": ("guide-relative", {"guide_share": 0.5}),
    "guide-relative, half, one block": ("guide-relative", {"guide_share": 0.5, "block": NEW}),
    "guide-threshold, 0.05": ("guide-threshold", {"guide_threshold": 0.05}),
    "guide-threshold, 0.1": ("guide-threshold", {"guide_threshold": 0.1}),
    "guide-threshold, 0.2": ("guide-threshold", {"guide_threshold": 0.2}),
    "guide-product, 0.5": ("guide-product", {"guide_weight": 0.5}),
    "guide-product, 0.7": ("guide-product", {"guide_weight": 0.7}),
    "guide-product, 0.3, one block": ("guide-product", {"guide_weight": 0.3, "block": NEW}),
    "guide-product, 0.5, one block": ("guide-product", {"guide_weight": 0.5, "block": NEW}),
    "guide-product, 0.7, one block": ("guide-product", {"guide_weight": 0.7, "block": NEW}),
    "guide-product, 0.7 within 1, one block": (
        "guide-product",
        {"guide_weight": 0.7, "guide_margin": 1.0, "block": NEW},
    ),
}


class NGram:
    """P(id | the ids before it), interpolated over orders by Witten and Bell's weights (1991, method C)."""

    def __init__(self, ids: np.ndarray, vocab: int) -> None:
        self.vocab = vocab
        self.tables = []
        for order in range(ORDER):
            contexts = hashed(ids, order)
            pairs = contexts * np.uint64(vocab) + ids[order:].astype(np.uint64)
            seen, counts = np.unique(pairs, return_counts=True)
            before, first, kinds = np.unique(seen // np.uint64(vocab), return_index=True, return_counts=True)
            self.tables.append((seen, counts, before, kinds, np.add.reduceat(counts, first)))

    def nll(self, ids: list[int], start: int) -> float:
        """Mean negative log likelihood of ids[start:], in nats an id."""
        every = np.array(ids)
        chance = np.full(len(every) - start, 1 / self.vocab)
        for order, (seen, counts, before, kinds, totals) in enumerate(self.tables):
            contexts = hashed(every, order)[start - order :]
            count = looked_up(seen, counts, contexts * np.uint64(self.vocab) + every[start:].astype(np.uint64))
            kind, total = looked_up(before, kinds, contexts), looked_up(before, totals, contexts)
            known = total > 0
            chance[known] = ((count + kind * chance) / (total + kind).clip(1))[known]
        return float(-np.log(chance).mean())


def hashed(ids: np.ndarray, order: int) -> np.ndarray:
    """The `order` ids before each id from `order` on, as uint64 [N - order]; below 2^55, so that an id fits beside."""
    total = np.zeros(len(ids) - order, np.uint64)
    for i in range(order):
        total = total * np.uint64(512) + ids[i : len(ids) - order + i].astype(np.uint64) + np.uint64(1)
    return total


def looked_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[keys == wanted], 0 where there is none; keys ascend."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


@dataclass
class Measured:
    """Of each prompt: forwards of the canvas model, milliseconds, the judge's nats an id, and the answer."""

    forwards: list[int] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of prompts")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own_process()
    from aropt.models import text

    train, held = text.split()
    judge = NGram(np.array(text.stream(train)), text.VOCAB)
    texts = examples(text.stream(held), args.prompts, args.seed)
    real = statistics.mean(judge.nll(ids, PROMPT) for ids in texts)
    found: dict[str, Measured] = {}
    aside = RESULTS.with_suffix(".partial.json")  # what is there if this is interrupted
    with Scratch() as folder:
        for name in VARIANTS:
            found[name] = measured(name, texts, judge, Path(folder), args.threads)
            result = {
                "env": environment(args.threads), "tokens": NEW, "block": BLOCK, "prompts": len(texts),
                "seed": args.seed, "order": ORDER, "held_out_nll": real,
                "rows": {n: described(n, found) for n in found},
            }  # fmt: skip
            aside.write_text(json.dumps(result, indent=1) + "\n")
    aside.rename(RESULTS)
    print(table(result))
    for name, m in found.items():
        print(f"{name}: {text.decode(texts[0][:PROMPT])!r} -> {text.decode(m.answers[0])!r}")


def examples(ids: list[int], count: int, seed: int) -> list[list[int]]:
    """Windows of held-out text, drawn where text-mdlm's tuning draws its own: not in deep indentation."""
    from aropt.models.tune_canvas import flat

    stream = torch.tensor(ids)
    starts = flat(stream, PROMPT + NEW)
    picks = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(seed))[:count]]
    return [stream[i : i + PROMPT + NEW].tolist() for i in picks]


def measured(name: str, texts: list[list[int]], judge: NGram, folder: Path, threads: int) -> Measured:
    import aropt
    from aropt.pipeline.checks import Instruments
    from aropt.pipeline.registry import pipeline

    rule, params = VARIANTS[name]
    params = {"block": BLOCK, **params}
    guided = rule.startswith("guide")
    print(name, file=sys.stderr, flush=True)
    plain = aropt.capture("text-mdlm", rules=(rule,), guide="text-ar" if guided else None, examples=[])
    made = aropt.optimize(
        plain, "onnxruntime", pipeline(["free-cache"]), check=False, folder=folder / name.replace(" ", "-"),
        threads=threads, instruments=Instruments(budget={"kl": float("inf")}),
    )  # fmt: skip
    reverted = [p["name"] for p in made.report["passes"] if p["status"] == "reverted"]
    if reverted:
        raise SystemExit(f"{name}: {', '.join(reverted)} was reverted")
    result = Measured()
    for ids in texts:
        rounds: list[int] = []
        made.generate([ids[:PROMPT]], NEW, on_round=lambda _, r=rounds: r.append(1), **params)
        start = time.perf_counter()
        (answer,) = made.generate([ids[:PROMPT]], NEW, **params)
        result.ms.append((time.perf_counter() - start) * 1e3)
        result.forwards.append(len(rounds))
        result.nll.append(judge.nll([*ids[:PROMPT], *answer], PROMPT))
        result.answers.append(answer)
    return result


def described(name: str, found: dict[str, Measured]) -> dict[str, Any]:
    """Means over the prompts. Of a guided rule also how it does beside the default and its rival (see `beside`)."""
    own = found[name]
    row: dict[str, Any] = {
        "forwards": statistics.mean(own.forwards),
        "ms": statistics.median(own.ms),
        "nll": statistics.mean(own.nll),
        "blanks": statistics.mean(a.count(32) / len(a) for a in own.answers),
    }
    free = {n: m for n, m in found.items() if not n.startswith("guide")}
    if name not in free:
        other = rival(own, free)
        row["against"] = [beside(own, n, free[n]) for n in (DEFAULT, other) if n is not None]
    return row


def beside(own: Measured, name: str, other: Measured) -> dict[str, Any]:
    """How many times fewer forwards than `other`, and the paired difference in nats, with its standard error."""
    worse = [a - b for a, b in zip(own.nll, other.nll, strict=True)]
    return {
        "name": name,
        "fewer": statistics.mean(other.forwards) / statistics.mean(own.forwards),
        "worse_by": statistics.mean(worse),
        "standard_error": statistics.stdev(worse) / len(worse) ** 0.5,
    }


def rival(guided: Measured, free: dict[str, Measured]) -> str | None:
    """The setting without a guide that runs most forwards and is not better by the judge; None if all are better."""
    no_better = [n for n, m in free.items() if statistics.mean(m.nll) >= statistics.mean(guided.nll)]
    return max(no_better, key=lambda n: statistics.mean(free[n].forwards), default=None)


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| rule | forwards | median | judge, nats a byte | blanks "
        f"| fewer than {DEFAULT} | slowest no better | fewer by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for name, r in result["rows"].items():
        cells = [name, f"{r['forwards']:.1f}", f"{r['ms']:.0f} ms", f"{r['nll']:.3f}", f"{r['blanks']:.0%}"]
        told = [f"{a['fewer']:.2f}x, {a['worse_by']:+.3f} ± {a['standard_error']:.3f}" for a in r.get("against", ())]
        cells += told[:1] + ([r["against"][1]["name"], told[1]] if len(told) > 1 else [])
        lines.append("| " + " | ".join([*cells, *[""] * (8 - len(cells))]) + " |")
    return "\n".join([*lines, "", f"The judge gives held-out text itself {result['held_out_nll']:.2f} nats a byte."])


if __name__ == "__main__":
    main()
