"""The sides of a token-shuffle model in ONNX Runtime: as they are written, and as token-shuffle-fusion makes them.

    python -m perf.shuffle [--runs 300] [--threads 2]

A model of 32 x 32 ids (1024 levels, windows of 2 x 2, random weights) without its backbone, so that nothing but the
sides is timed: both published layouts, without and with the residual MLPs, which no fusion removes. Both graphs run
with all of ONNX Runtime's own optimizations, in turns. Writes perf/results/shuffle.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from perf.canvas import ROOT, environment
from perf.nodes import session

RESULTS = ROOT / "perf" / "results" / "shuffle.json"
WIDTHS, BATCHES, BLOCKS = (512, 1024), (1, 16), (0, 1)
TURN = 20  # runs in a row, by one session and then by the other
ASKED = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=300)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    rows = []
    for layout, width, blocks in product(("compress", "concat"), WIDTHS, BLOCKS):
        print(f"{layout}, width {width}, {blocks} MLPs a side", file=sys.stderr, flush=True)
        rows += measured(layout, width, blocks, args.runs, args.threads)
    result = {"env": environment(args.threads), "rows": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result))


def measured(layout: str, width: int, blocks: int, runs: int, threads: int) -> list[dict[str, Any]]:
    """A row for each batch: medians, least times and the ratio, and how far the logits are from each other."""
    from aropt.exporters.onnx import export

    plain, fused = programs(layout, width, blocks)
    ids = np.random.default_rng(0).integers(1, 1024, (max(BATCHES), 1, 4))
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for name, program in (("written", plain), ("fused", fused)):
            path = Path(folder) / f"{name}.onnx"
            export(program.graphs["model"], program.weights, path)
            sessions[name] = session(path, threads)
        return [
            {"layout": layout, "width": width, "blocks": blocks, **compared(sessions, ids[:batch], runs)}
            for batch in BATCHES
        ]


def programs(layout: str, width: int, blocks: int) -> tuple[Any, Any]:
    """The two sides alone as a program, and what the pass makes of it."""
    import aropt
    from aropt.models.shuffle import Layout, Shape, ShuffleAR
    from aropt.passes.token_shuffle_fusion import TokenShuffleFusion

    torch.manual_seed(0)
    shape = Shape(
        side=32, window=2, levels=1024, classes=1000, width=width, layers=0, heads=8, blocks=blocks, mixing=2 * width,
        layout=cast(Layout, layout),
    )  # fmt: skip
    plain = aropt.capture(ShuffleAR(shape))
    return plain, TokenShuffleFusion().run(plain)


def compared(sessions: dict[str, Any], ids: Any, runs: int) -> dict[str, Any]:
    """Both sessions on the same ids, in turns; microseconds."""
    given = {"ids": ids}
    logits = {name: made.run(None, given)[0] for name, made in sessions.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(runs // TURN + 1):
        for name, made in sessions.items():
            for _ in range(TURN):
                start = time.perf_counter()
                made.run(None, given)
                if turn:
                    times[name].append((time.perf_counter() - start) * 1e6)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "batch": len(ids), "n": len(times["fused"]), "us": medians, "least": {n: min(t) for n, t in times.items()},
        "ratio": medians["written"] / medians["fused"],
        "difference": float(np.abs(logits["written"] - logits["fused"]).max()),
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| layout | width | residual MLPs | batch | as written | fused | ratio | largest difference of a logit |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result["rows"]:
        us, mlps = r["us"], f"{r['blocks']} a side" if r["blocks"] else "none"
        lines.append(
            f"| {r['layout']} | {r['width']} | {mlps} | {r['batch']} | {us['written']:.0f} us | {us['fused']:.0f} us "
            f"| {r['ratio']:.2f}x | {r['difference']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
