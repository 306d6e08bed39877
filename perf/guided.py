"""Guided diffusion beside the shrinking window alone: forwards, time, and what a judge thinks of the answers.

    python -m perf.guided [--prompts 32] [--threads 2]

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
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from perf.canvas import BLOCK, NEW, ROOT, TAU, environment

RESULTS = ROOT / "perf" / "results" / "guided.json"
PROMPT, ORDER, SEED = 64, 6, 0
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # rule, its parameters; the first is what the others are held to
    "free-cache": ("threshold", {"threshold": TAU}),
    "one id a round": ("threshold", {"threshold": 2.0}),
    "guide-argmax": ("guide-argmax", {}),
    "guide-top-k, k = 5": ("guide-top-k", {"guide_k": 5}),
    "guide-relative, half": ("guide-relative", {"guide_share": 0.5}),
    "guide-threshold, 0.1": ("guide-threshold", {"guide_threshold": 0.1}),
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
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    from aropt.models import text

    train, held = text.split()
    judge = NGram(np.array(text.stream(train)), text.VOCAB)
    texts = examples(text.stream(held), args.prompts)
    real = statistics.mean(judge.nll(ids, PROMPT) for ids in texts)
    with TemporaryDirectory(prefix="aropt-") as folder:
        found = {name: measured(name, texts, judge, Path(folder), args.threads) for name in VARIANTS}
    result = {
        "env": environment(args.threads), "tokens": NEW, "block": BLOCK, "prompts": len(texts), "order": ORDER,
        "held_out_nll": real, "rows": {name: described(m, found["free-cache"]) for name, m in found.items()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    for name, m in found.items():
        print(f"{name}: {text.decode(texts[0][:PROMPT])!r} -> {text.decode(m.answers[0])!r}")


def examples(ids: list[int], count: int) -> list[list[int]]:
    """Windows of held-out text, drawn where text-mdlm's tuning draws its own: not in deep indentation."""
    from aropt.models.tune_canvas import flat

    stream = torch.tensor(ids)
    starts = flat(stream, PROMPT + NEW)
    picks = starts[torch.randperm(len(starts), generator=torch.Generator().manual_seed(SEED))[:count]]
    return [stream[i : i + PROMPT + NEW].tolist() for i in picks]


def measured(name: str, texts: list[list[int]], judge: NGram, folder: Path, threads: int) -> Measured:
    import aropt
    from aropt.passmanager import Instruments, pipeline

    rule, params = VARIANTS[name]
    guided = rule.startswith("guide")
    print(name, file=sys.stderr, flush=True)
    program = aropt.capture("text-mdlm", rules=(rule,), guide="text-ar" if guided else None, examples=[])
    program = aropt.optimize(
        program, "onnxruntime", pipeline(["free-cache"]), check=False, folder=folder / name.replace(" ", "-"),
        threads=threads, instruments=Instruments(budget={"kl": float("inf")}),
    )  # fmt: skip
    result = Measured()
    for ids in texts:
        rounds: list[int] = []
        program.generate([ids[:PROMPT]], NEW, block=BLOCK, on_round=lambda _, r=rounds: r.append(1), **params)
        start = time.perf_counter()
        (answer,) = program.generate([ids[:PROMPT]], NEW, block=BLOCK, **params)
        result.ms.append((time.perf_counter() - start) * 1e3)
        result.forwards.append(len(rounds))
        result.nll.append(judge.nll([*ids[:PROMPT], *answer], PROMPT))
        result.answers.append(answer)
    return result


def described(measured: Measured, base: Measured) -> dict[str, Any]:
    """Means over the prompts; differences to the base are paired, with their standard error."""
    worse = [a - b for a, b in zip(measured.nll, base.nll, strict=True)]
    error = statistics.stdev(worse) / len(worse) ** 0.5
    return {
        "forwards": statistics.mean(measured.forwards),
        "fewer": statistics.mean(base.forwards) / statistics.mean(measured.forwards),
        "ms": statistics.median(measured.ms),
        "nll": statistics.mean(measured.nll),
        "worse_by": statistics.mean(worse),
        "standard_error": error,
        "blanks": statistics.mean(a.count(32) / len(a) for a in measured.answers),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| rule | forwards | fewer by | median | judge, nats a byte | against free-cache | blanks |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {r['forwards']:.1f} | {r['fewer']:.2f}x | {r['ms']:.0f} ms | {r['nll']:.2f} | "
        f"{r['worse_by']:+.2f} ± {r['standard_error']:.2f} | {r['blanks']:.0%} |"
        for name, r in result["rows"].items()
    ]
    return "\n".join([*lines, "", f"The judge gives held-out text itself {result['held_out_nll']:.2f} nats a byte."])


if __name__ == "__main__":
    main()
