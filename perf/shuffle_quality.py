"""What larger windows cost in quality: the same architecture with windows 1, 2 and 4, equal but for the compression.

    OMP_NUM_THREADS=1 python -m perf.shuffle_quality --models FOLDER [--steps 400]

Trains each window with seeds 0, 1 and 2 (FOLDER keeps the models, so that a stopped run goes on where it was), measures
on held-out images, writes perf/results/shuffle_quality.json and prints the table.  Window 1 is a raster model.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from aropt.models import quality_digits, shuffle, train_digits
from aropt.models.optimise import parameters

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "shuffle_quality.json"
WINDOWS, SEEDS, GUIDED = (1, 2, 4), (0, 1, 2), (1.0, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the models trained here")
    parser.add_argument("--steps", type=int, default=400, help="of training, the same for all")
    args = parser.parse_args()
    args.models.mkdir(parents=True, exist_ok=True)
    runs = [one(window, seed, args.steps, args.models) for seed in SEEDS for window in reversed(WINDOWS)]
    result = {
        "command": f"OMP_NUM_THREADS=1 python -m perf.shuffle_quality --models FOLDER --steps {args.steps}",
        "env": {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "shape": asdict(shuffle.Shape()),
        "training": {"steps": args.steps, "images": train_digits.ROWS, "dropout": train_digits.DROPOUT},
        "held_out_images": len(train_digits.data()[2][0]),
        "sampled_images": quality_digits.SAMPLED * 10,
        "real": quality_digits.floor(),
        "windows": {str(window): summed([r for r in runs if r["window"] == window]) for window in WINDOWS},
        "runs": sorted(runs, key=lambda r: (r["window"], r["seed"])),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def one(window: int, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Trains and measures one model, or reads what was measured before."""
    name = f"window{window}-seed{seed}-steps{steps}"
    known = folder / f"{name}.json"
    if known.exists():
        found: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return found
    print(name, file=sys.stderr, flush=True)
    torch.manual_seed(seed)
    model = shuffle.ShuffleAR(shuffle.Shape(window=window), train_digits.DROPOUT)
    start = time.perf_counter()
    best_step = train_digits.fit(model, name, steps, seed=seed)
    seconds = time.perf_counter() - start
    shuffle.save(model, folder / f"{name}.safetensors")
    model.eval()
    fit, stop, held, _ = train_digits.data()
    found = {
        "window": window, "seed": seed, "parameters": parameters(model), "steps_of_an_image": model.capacity,
        "best_step": best_step, "seconds": round(seconds), "nll": train_digits.nll(model, *held),
        "nll_fit": train_digits.nll(model, *fit), "nll_stop": train_digits.nll(model, *stop),
        "sampled": {f"{g:g}": quality_digits.sampled(model, g, seed) for g in GUIDED},
    }  # fmt: skip
    known.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def summed(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, each with its least and greatest."""

    def over(values: list[float]) -> dict[str, float]:
        return {"mean": statistics.mean(values), "least": min(values), "greatest": max(values)}

    return {
        "steps_of_an_image": runs[0]["steps_of_an_image"],
        "parameters": runs[0]["parameters"],
        "nll": over([r["nll"] for r in runs]),
        "nll_fit": over([r["nll_fit"] for r in runs]),
        **{
            f"{measure}_guidance_{g}": over([r["sampled"][g][measure] for r in runs])
            for measure in ("class_accuracy", "frechet_distance")
            for g in runs[0]["sampled"]
        },
    }


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| window | steps | parameters | held-out NLL, nats a pixel | class accuracy | with guidance 2 | distance "
        "| with guidance 2 |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]

    def shown(cell: dict[str, float], form: str) -> str:
        return f"{cell['mean']:{form}} ({cell['least']:{form}} to {cell['greatest']:{form}})"

    for window, r in result["windows"].items():
        accuracy = (shown(r[f"class_accuracy_guidance_{g}"], ".0%") for g in (1, 2))
        distance = (shown(r[f"frechet_distance_guidance_{g}"], ".1f") for g in (1, 2))
        cells = [window, str(r["steps_of_an_image"]), f"{r['parameters']:,}", shown(r["nll"], ".3f")]
        lines.append(f"| {' | '.join([*cells, *accuracy, *distance])} |")
    real = result["real"]
    cells = ["real images", "", "", "", f"{real['class_accuracy']:.0%}", "", f"{real['frechet_distance']:.1f}", ""]
    return "\n".join([*lines, f"| {' | '.join(cells)} |"])


if __name__ == "__main__":
    main()
