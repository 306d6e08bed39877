"""How an executor generates is a value: read from an artifact's folder, and given to another executor."""

from __future__ import annotations

from pathlib import Path

import pytest

from aropt.errors import Unsupported
from aropt.ir.executor import Executor
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.targets import lower
from aropt.targets.ort.plan import found
from tests.conftest import make_program
from tests.support.run import generate


@pytest.mark.parametrize("files", [(), ("step/onnxruntime/rounds-4.onnx",), ("whole/onnxruntime/model.onnx",)])
def test_plans_are_read_from_a_folder(files: tuple[str, ...], tmp_path: Path) -> None:
    for file in (*files, "other/onnxruntime/rounds-4.onnx", "step/onnxruntime/model.onnx"):
        path = tmp_path / "models" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    plan = found(tmp_path, ["step"])
    models = [*plan.multi_step.values(), *([plan.single_call] if plan.single_call else [])]
    assert [m.relative_to(tmp_path / "models").as_posix() for m in models] == list(files)
    assert plan.way == {"step": "multi-step", "whol": "single-call"}.get("".join(files)[:4], "stepping")


def test_another_plan_is_another_executor(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    program = run_passes(make_program(1), pipeline(), "onnxruntime", Instruments(check=False))[0]
    stepping = lower(program, "onnxruntime", tmp_path)
    once = stepping.single_call(program)
    assert (stepping.way, once.way, once.stepping().way) == ("stepping", "single-call", "stepping")
    assert not list(tmp_path.glob("models/whole*")), "nothing of it stays in the folder"
    want = generate(program, [[1, 2]], 6)
    assert [generate(program, [[1, 2]], 6, executor=e) for e in (stepping, once, once.stepping())] == [want] * 3


def test_an_executor_that_only_runs_graphs() -> None:
    """It generates in rounds, torch keeps its threads, and there is no other way."""
    program = make_program(1)
    plain = lower(program, "eager")
    assert plain.generate({}) is None and plain.host_threads() is None and not plain.executed()
    assert plain.tuned(program, print) == (plain, {}) and plain.stepping() is plain.multi_step(program) is plain
    assert not plain.shows_values and not plain.intermediates("step", {}, ["x"])
    assert Executor().without_probe(program) is None
    with pytest.raises(Unsupported, match="no whole loop"):
        plain.single_call(program)
    with pytest.raises(NotImplementedError):
        Executor().call("step", {})
