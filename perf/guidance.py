"""Guidance by two calls of the cached step, by one batch, in an interval, and eliminated: forwards and time.

    python -m perf.guidance [--model digits-ar] [--batch 1] [--runs 15] [--threads 2] [--targets onnxruntime,eager]

The variants of a rule draw the same images, and take turns within a target. The eliminated program is that of the
weights that were tuned to need no guidance (MODEL-cca), of the same size. Writes perf/results/guidance.json and prints
the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aropt.bench.timing import IN_A_ROW, PAUSE
from aropt.ir.executor import Executor
from aropt.targets.ort.threads import own_process
from aropt.targets.scratch import Scratch
from perf.canvas import ROOT, environment

RESULTS = ROOT / "perf" / "results" / "guidance.json"
SCALE, SEED = 3.0, 1


@dataclass(frozen=True)
class Variant:
    """How the program is made: its rule, passes asked for and left out, and whether guidance is in the middle half."""

    rule: str = "guidance"
    chosen: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    half: bool = False
    free: bool = False


VARIANTS = {
    "two calls": Variant(dropped=("cfg-batch", "fuse-sampler")),
    "one batch, unfused": Variant(dropped=("fuse-sampler",)),
    "two calls in one graph": Variant(dropped=("cfg-batch",)),
    "one batch": Variant(),
    "middle half, one batch": Variant("guidance-interval", half=True),
    "middle half, skipped outside": Variant("guidance-interval", ("cfg-interval",), half=True),
    "eliminated": Variant(chosen=("cfg-eliminate",), free=True),
}
AGAINST = {"one batch, unfused": "two calls", "middle half, skipped outside": "middle half, one batch"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits-ar")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", default="onnxruntime,eager")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own_process()
    result: dict[str, Any] = {"env": environment(args.threads), "model": args.model, "batch": args.batch, "targets": {}}
    for target in args.targets.split(","):
        with Scratch() as folder:
            result["targets"][target] = measured(args, target, Path(folder))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measured(args: argparse.Namespace, target: str, folder: Path) -> dict[str, Any]:
    """Of each variant: forwards, the sequences that they ran on, and milliseconds of a generation."""
    rows: dict[str, Any] = {}
    runners = {}
    for name, variant in VARIANTS.items():
        print(f"{target}: {name}", file=sys.stderr, flush=True)
        runners[name], rows[name] = prepared(args, variant, target, folder / name.replace(" ", "-"))
    tokens = {name: run() for name, run in runners.items()}
    groups = [[n for n, v in VARIANTS.items() if v.half is half and not v.free] for half in (False, True)]
    for first, *others in groups:
        for name in others:
            assert tokens[name] == tokens[first], f"{name} draws other images than {first}"
    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(-(-args.runs // IN_A_ROW)):
        for name, run in runners.items():
            time.sleep(PAUSE)
            run()  # not counted: threads of the variant before may still spin
            for _ in range(IN_A_ROW):
                start = time.perf_counter()
                run()
                times[name].append((time.perf_counter() - start) * 1e3)
    for name, row in rows.items():
        row["ms"] = statistics.median(times[name])
        row["spread"] = [min(times[name]), max(times[name])]
    return rows


def prepared(args: argparse.Namespace, variant: Variant, target: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """What generates once, and how many forwards that takes."""
    import aropt
    from aropt.loops.request import room
    from aropt.pipeline.registry import pipeline

    plain = aropt.capture(args.model + "-cca" * variant.free, rules=[variant.rule, "temperature"])
    passes = pipeline(variant.chosen, variant.dropped)
    program = aropt.optimize(plain, target, passes, check=False, folder=folder, threads=args.threads)
    prompts = [plain.meta["prompts"][i % len(plain.meta["prompts"])] for i in range(args.batch)]
    n = room(plain, prompts[0])
    rounds = n // int(plain.meta.get("unit", 1))
    options: dict[str, Any] = {"temperature": 1.0, "seed": SEED} | ({} if variant.free else {"guidance": SCALE})
    options |= {"guidance_from": rounds // 4, "guidance_to": rounds * 3 // 4} if variant.half else {}
    apart = aropt.optimize(plain, "eager", pipeline(variant.chosen, {*variant.dropped, "fuse-sampler"}), check=False)
    counter = Counted(apart.executor)
    apart.generate(prompts, n, executor=counter, **options)
    return lambda: program.generate(prompts, n, **options), counter.found


class Counted(Executor):
    """An executor that counts the calls of the forward, and the sequences that they run on."""

    def __init__(self, executor: Any) -> None:
        self.executor, self.found = executor, {"forwards": 0, "sequences": 0}

    def call(self, graph: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if "ids" in inputs:
            self.found["forwards"] += 1
            self.found["sequences"] += inputs["ids"].shape[0]
        results: dict[str, torch.Tensor] = self.executor.call(graph, inputs)
        return results


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| target | guidance | forwards | sequences | median | against two calls | against |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
    for target, rows in result["targets"].items():
        for name, row in rows.items():
            own = AGAINST.get(name, "two calls in one graph")
            ratios = (rows[other]["ms"] / row["ms"] for other in ("two calls", own))
            first, second = (f"{ratio:.2f}x" for ratio in ratios)
            lines.append(
                f"| {target} | {name} | {row['forwards']} | {row['sequences']} | {row['ms']:.1f} ms | {first} | "
                f"{second} {own} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
