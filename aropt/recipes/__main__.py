"""Measure recipes and write down the results: python -m aropt.recipes [NAME ...] [--train] [--page].

Writes aropt/recipes/results.json and, from it, docs/systems.md. `--train` makes the checkpoints first, `--page` writes
the page alone.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from importlib.metadata import version

import torch

from aropt.models.optimise import log
from aropt.recipes import RESULTS, checkpoint, names, recipe, results
from aropt.recipes._page import PAGE, page

PACKAGES = ("torch", "onnxruntime", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aropt.recipes", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="*", choices=[*names(), []], help="recipes (default: all)")
    parser.add_argument("--train", action="store_true", help="make the checkpoints first")
    parser.add_argument("--page", action="store_true", help="write docs/systems.md from the results alone")
    arguments = parser.parse_args()
    for name in [] if arguments.page else arguments.name or names():
        if arguments.train:
            train(name)
        measure(name)
    PAGE.write_text(page(results()), encoding="utf-8")


def train(name: str) -> None:
    """Makes the recipe's checkpoint, where it has one."""
    from safetensors.torch import save_file

    if (make := recipe(name).train) is not None:
        path = checkpoint(name)
        path.parent.mkdir(exist_ok=True)
        save_file({n: v.to(torch.bfloat16).contiguous() for n, v in make().state_dict().items()}, path)
        path.chmod(0o644)  # the writer leaves it unreadable to other users


def measure(name: str) -> None:
    """Measures a recipe, and writes what was found into the results."""
    rows = []
    for row in recipe(name).check(log, False):
        log(f"{name}: {row.claim}: {row.measured}" + ("" if row.holds else " (does not hold)"))
        rows.append(asdict(row))
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    found = results() | {name: {"versions": versions, "rows": rows}}
    RESULTS.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
