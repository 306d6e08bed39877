"""What is optional may fail: the whole loop in one call. And example prompts that leave no room for new tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

import aropt
from aropt.bench import timing as bench
from aropt.bench.variants import Origin, Spec
from aropt.cli.sections import benchmark, samples
from aropt.errors import MissingTool, UsageError
from aropt.frontend.facts import Source
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.loops.request import fitted, room
from aropt.pipeline.artifact import save
from aropt.targets.ort import pick, run_loop, single_call
from aropt.targets.ort.plan import Plan, Planned
from tests.conftest import Tiny, make_program
from tests.support.canvases import tiny


@cache
def canvas(length: int) -> Program:
    """A canvas of 8 ids, whose example prompt is of that length."""
    if length != 30:
        program = canvas(30)
        return program.replace(meta={**program.meta, "prompts": [[1] * length]})
    return aropt.capture(tiny(), mask=259, capacity=8, prompts=[[1] * 30], modality="tokens")


class Stub(Planned, Eager):
    """An executor that has what `pick` asks for."""

    def __init__(self, program: Program, folder: Path, plan: Plan) -> None:
        super().__init__(program)
        self.folder, self.threads, self.plan = folder, 1, plan

    def with_plan(self, plan: Plan) -> Stub:
        return Stub(self.program, self.folder, plan)

    def generate(self, inputs: Any) -> Any:
        one = self.plan.single_call
        return super().generate(inputs) if one is None else single_call.SingleCall(one, 1).generate(inputs)

    def translated(self, name: str) -> None:
        return None


class Fail(Exception):
    """As ONNX Runtime's: no RuntimeError."""


ERRORS = [Fail("bad\nmodel"), MissingTool("no tool"), UsageError("no room"), KeyError()]
EVERY = [(where, error) for where in ("export", "compare", "run") for error in ERRORS]
SPREAD = [pytest.param(*both, marks=[pytest.mark.exhaustive] * (i % 5 > 0)) for i, both in enumerate(EVERY)]


@pytest.mark.parametrize(("where", "error"), SPREAD)
def test_stepping_where_one_call_fails(
    error: Exception, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise error

    def writes(_: object, path: Path, **__: object) -> None:
        path.parent.mkdir(parents=True)
        path.write_text("model")
        if where == "export":
            fails()

    monkeypatch.setattr("aropt.exporters.whole_loop.export_program", writes)
    monkeypatch.setattr(run_loop, "compare", fails if where == "compare" else lambda *_: {})
    monkeypatch.setattr(single_call.SingleCall, "generate", fails)
    program = make_program(1)
    program = program.replace(meta={**program.meta, "prompts": [[1]]})
    executor, found = pick.pick(program, Stub(program, tmp_path, Plan({"step": tmp_path}, tmp_path)))
    reason = (str(error).splitlines() or ["KeyError"])[0]
    assert found["picked"] == "stepping" and found["reason"].endswith(f"one call: {reason}") and not found["graphs"]
    assert executor.plan == Plan() and not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize(("longer", "picked"), [(1.2, "stepping"), (0.9, "one call")])
def test_one_call_must_win_with_longer_answers_too(
    longer: float, picked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It copies caches, which grow."""
    program = make_program(1)
    program = program.replace(meta={**program.meta, "prompts": [[1]], "capacity": 100})
    executor, lengths = Stub(program, tmp_path, Plan()), []

    def timed(_: object, ways: dict[str, Any], prompts: object, n: int, *turns: int) -> dict[str, float]:
        lengths.append(n)
        return {way: 1.0 if way == "stepping" else 0.8 if n <= 64 else longer for way in ways}

    monkeypatch.setattr(pick, "several", lambda *_: 1 / 0)
    monkeypatch.setattr(pick, "one_call", lambda *_: (executor.with_plan(Plan(single_call=tmp_path)), {}))
    monkeypatch.setattr(pick, "timed", timed)
    made, found = pick.pick(program, executor)
    assert bool(made.plan.single_call) == (picked == "one call")
    assert (found["picked"], found["tokens"]) == (picked, 100) and lengths[-2:] == [64, 100]


@pytest.mark.parametrize(("prompt", "kept"), [(3, 3), (7, 7), (8, 4), (30, 4)])
def test_a_prompt_is_cut_only_where_nothing_fits(prompt: int, kept: int) -> None:
    program = canvas(prompt)
    assert len(fitted(program, program.meta["prompts"][0])) == kept


@pytest.mark.parametrize("mask", [259, None])
def test_example_prompts_that_are_longer_than_the_capacity(mask: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples and timing are of prompts that fit."""
    model: Any = Tiny(1) if mask is None else tiny()
    plain = {"capacity": 8, "prompts": [[1] * 30], "modality": "tokens"}
    program = aropt.capture(model, **plain) if mask is None else canvas(30)
    (sample,) = samples(program, aropt.Compiled(program, Eager(program)), Source(model, program.meta))
    assert sample.same and len(str(sample.after).split()) == 8 + (mask is None)
    seen: list[Any] = []

    def measure(
        out: Path, variants: list[str], prompt: list[int], n: int, *_: object, **__: object
    ) -> dict[str, bench.Timing]:
        seen.append((len(prompt), n))
        return {v: bench.Timing(v, error="none") for v in variants}

    monkeypatch.setattr(bench, "measure", measure)
    found = benchmark(Path("out"), program, [], 5, 200, 1, print, Origin())
    assert not found.bench and found.notes == ["aropt could not be timed: none"]
    assert seen == [(4, 4 + (mask is None))]


def test_a_worker_says_what_ended_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import json
    from dataclasses import asdict

    def fails(_: Spec) -> None:
        raise Fail("bad model")

    monkeypatch.setattr(bench, "variant", fails)
    bench.main(json.dumps(asdict(Spec("aropt", "out", [1], 2, 1))))
    assert json.loads(capsys.readouterr().out) == {"error": "bad model"}


def test_run_says_that_a_prompt_is_too_long(tmp_path: Path) -> None:
    """Without -n as well: not that it can't generate fewer than no tokens."""
    from aropt.cli import run as generation

    program = canvas(30)
    assert room(program, [1] * 30) < 0
    save(program, tmp_path / "out")
    assert len(generation.run(tmp_path / "out", None, None, {}, 0, None, None, "eager")["tokens"][0]) == 4
    with pytest.raises(UsageError, match="prompt of 9 tokens and 1 new ones don't fit"):
        generation.run(tmp_path / "out", ["1 1 1 1 1 1 1 1 1"], None, {}, 0, None, None, "eager")
