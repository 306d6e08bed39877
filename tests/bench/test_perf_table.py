"""The benchmark's table: what differs between its rows is said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from perf.run import protocol, table
from perf.shuffle_quality import RESULTS, ROOT, summed
from perf.shuffle_quality import table as quality_table

ENV = {"cpu": "AMD EPYC", "threads": 2, "torch": "2.13.0", "onnxruntime": "1.31.1", "transformers": "5.23.0"}


def found(runs: int = 6, env: Mapping[str, Any] = MappingProxyType({}), **more: Any) -> dict[str, Any]:
    rows = []
    for phase, unit in (("generate", "ms"), ("generate", "tok/s"), ("prefill", "ms")):
        one = {"variant": "aropt", "n": runs, "phase": phase, "unit": unit, "median": 5.0, "p10": 1.0, "p90": 9.0}
        rows += [one, {**one, "variant": "eager", "n": 6}]
    fields = {"env": {**ENV, **env}, "bench": rows, "speedup": {}, "roofline": None, "notes": [], "tokens": 200}
    return {**fields, "engines": {}, **more}


def test_rows_that_are_alike() -> None:
    text = protocol({"a": found(engines={"x": "engine 1"}), "b": found(engines={"x": "engine 1"})})
    assert text == (
        "AMD EPYC, 2 threads, torch 2.13.0, onnxruntime 1.31.1, transformers 5.23.0, engine 1. Batch 1, greedy, 200 "
        "new tokens; medians of 6 runs in 2 processes of each variant, taking turns."
    )


def test_rows_that_differ() -> None:
    """Models measured at another time: machine, threads, versions, runs and tokens are named with whose they are."""
    known = {"a": found(engines={"x": "engine 1"}), "b": found(), "c": found(env={"threads": 4, "torch": "2.14.0"})}
    known["d"] = found(runs=3, tokens=64, rounds=1, env={"threads": 4}, engines={"x": "engine 2"})
    text = protocol(known)
    assert text.startswith("AMD EPYC, 2 threads (a, b) or AMD EPYC, 4 threads (c, d), ")
    assert "torch 2.13.0 (a, b, d) or torch 2.14.0 (c), onnxruntime 1.31.1, " in text
    assert "engine 1 (a) or engine 2 (d). Batch 1, greedy, 200 new tokens (64 of d)" in text
    assert text.endswith(
        "medians of 6 runs (3 at least, of slow ones) in 2 processes (1 of d) of each variant, taking turns."
    )


def test_a_canvas_has_no_first_token() -> None:
    lines = table({"a": found(), "b": found(loop="unmask")}).splitlines()
    assert lines[2].endswith("| 5.0 ms |  |  |") and lines[4].endswith("| 5 |  |  |  |")


def test_quality_by_window_is_what_was_measured() -> None:
    """Three seeds of each window at the same steps; means and the table in perf/README.md follow from the runs."""
    result = json.loads(RESULTS.read_text(encoding="utf-8"))
    for window, found in result["windows"].items():
        runs = [r for r in result["runs"] if str(r["window"]) == window]
        assert sorted(r["seed"] for r in runs) == [0, 1, 2]
        assert found == summed(runs)
    assert list(result["windows"]) == ["1", "2", "4"]
    assert quality_table(result) in (ROOT / "perf" / "README.md").read_text(encoding="utf-8")
