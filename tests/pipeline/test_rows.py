"""What a trial learns from the time that rows take, and what a report says of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aropt.ir.program import Program, Spec, StateSpec
from aropt.passes.ngram_draft import NgramDraft
from aropt.passes.tree_draft import TreeDraft
from aropt.pipeline import api, report
from aropt.pipeline import autotune as trial
from aropt.pipeline.memory import measured, memory
from aropt.pipeline.registry import make, pipeline
from aropt.targets import lower
from tests.conftest import make_program

REPEATING = [[3, 5, 7, 3, 5, 7, 3], [2, 2, 2]]
CHAIN = TreeDraft(draft="text", shape="chain:4")


def texts(**meta: Any) -> Program:
    program = make_program()
    return program.replace(meta={**program.meta, "modality": "text", "prompts": REPEATING, **meta})


ROWS = [
    (CHAIN, {1: 2.0, 4: 9.2, 8: 20.0}, "4 rows takes 4.6 times as long as one of 1, and gives 5 ids at most"),
    (CHAIN, {1: 2.0, 4: 9.0, 8: 20.0}, ""),
    (TreeDraft(shape="3x3"), {1: 1.0, 8: 2.9, 16: 99.0}, "8 rows takes 2.9 times"),
    (TreeDraft(shape="grown:2x4:7"), {1: 1.0, 8: 2.0}, ""),
    (TreeDraft(draft="masks", shape="chain:3"), {1: 1.0, 16: 4.0}, "gives 4 ids at most"),
    (CHAIN, {}, ""),
    (NgramDraft(), {1: 1.0, 4: 99.0}, ""),
]


@pytest.mark.parametrize(("one", "rows", "why"), ROWS)
def test_what_can_not_pay_even_with_drafts_that_are_all_right(one: Any, rows: dict[int, float], why: str) -> None:
    """Times of as many rows as a round has, or of fewer: it takes at least as long."""
    found = trial.hopeless(one, rows)
    assert why in found if why else not found


def test_a_way_that_can_not_pay_is_not_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program without drafts is, and what rows take says the rest."""
    made: list[Program] = []
    plain = trial.lowered
    monkeypatch.setattr(trial, "lowered", lambda p, *more: (made.append(p), plain(p, *more))[1])
    monkeypatch.setattr(trial, "timed", None)
    monkeypatch.setattr(trial, "rows_timed", lambda *_: {1: 1.0, 4: 6.0})
    passes, found = trial.trial(texts(), pipeline(), [CHAIN], "onnxruntime", 1)
    assert passes == pipeline() and not found.kept and len(made) == 1
    assert found.left[trial.written(CHAIN)] in found.told() and "6.0 times as long" in found.told()


def test_rows_are_timed_up_to_the_capacity() -> None:
    program = make("kv-cache").run(make("canonicalize").run(texts()))
    made = trial.lowered(program, "onnxruntime", 1)
    found = trial.rows_timed(made, REPEATING, False)
    assert list(found) == [n for n in trial.ROWS if n < program.meta["capacity"]] and min(found.values()) > 0
    assert not trial.rows_timed(made, [], False)


def test_memory_is_what_is_declared_and_what_was_held() -> None:
    program = make("kv-cache").run(make("canonicalize").run(texts()))
    plan, capacity = memory(program), int(program.meta["capacity"])
    caches = {n: s for n, s in program.state.items() if s.kind == "append-kv"}
    one_row = sum(s.nbytes({"B": 1, "S": 1}) for s in caches.values())
    assert caches and plan.state["append-kv"] == capacity * one_row
    assert plan.weights == sum(w.nbytes for w in program.weights.values())
    held = measured(program, lower(program, "eager"))
    assert held["peak"] > one_row * held["tokens"] and held["tokens"] > 1
    assert measured(program.replace(meta={**program.meta, "prompts": []}), lower(program, "eager")) == {}


def test_a_report_shows_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was tried, with its arithmetic, and the memory of state, of what is kept aside, and as measured."""
    monkeypatch.setattr(trial, "timed", lambda ways, *_: {way: 9.0 if way == "without" else 6.0 for way in ways})
    monkeypatch.setattr(trial, "rows_timed", lambda *_: {1: 1.0, 4: 1.5})
    made = api.optimize(texts(), "onnxruntime", pipeline(), check=False, measure=True, tries=[[CHAIN]], threads=1)
    found = made.report
    (one,) = found["tried"]
    assert one["kept"] == trial.written(CHAIN) and one["ms"] == {trial.written(CHAIN): 6.0, "without": 9.0}
    assert one["rows"] == {"1": 1.0, "4": 1.5} and one["ids"]["without"] == 1
    (drafts,) = [p for p in found["passes"] if p["name"] == "tree-draft"]
    assert drafts["memory"]["aside"] > 0 and drafts["memory"]["pairs"] == 25
    assert found["memory"]["peak"] > found["memory"]["tokens"] > 1
    page = report.html(found)
    assert "<h2>Drafts</h2>" in page and "1.50×" in page and "<h2>Memory</h2>" in page and "aside, tree-draft" in page


def test_a_size_that_a_loop_of_one_s_own_counts_is_one() -> None:
    """Nothing here knows the symbols of all loops."""
    program = texts()
    state = {**program.state, "boxes": StateSpec("tokens", Spec(torch.int64, ("B", "2*J", 3)), 0)}
    assert memory(program.replace(state=state)).state["tokens"] == memory(program).state["tokens"] + 8 * 2 * 3
