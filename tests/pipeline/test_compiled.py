"""What optimize returns: a program that is lowered once, and what generates, is shown and is saved with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aropt
from aropt.ir.interpreter import Eager
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.pipeline import api
from aropt.pipeline.registry import make
from aropt.targets import lower
from aropt.validate.compare import with_probe
from tests.support.run import generate

PROMPTS = [[1, 2], [3]]


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that are lowered, in order."""
    found: list[Program] = []

    def counted(program: Program, *given: Any, **options: Any) -> Any:
        found.append(program)
        return lower(program, *given, **options)

    monkeypatch.setattr(api, "lower", counted)
    return found


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("target", [pytest.param("eager", marks=pytest.mark.exhaustive), "inductor", "onnxruntime"])
def test_the_program_is_lowered_once(
    target: str, check: bool, lowered: list[Program], tiny_program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated or not; what validation looked at is in nothing that is shipped."""
    if target == "onnxruntime":
        pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    monkeypatch.setattr("torch.compile", lambda module, **_: module)  # that takes long, and is another test's
    made = aropt.optimize(tiny_program, target, [make("kv-cache"), make("prune")], check=check)
    assert len(lowered) == 1
    assert generate(made, PROMPTS, 5) == generate(tiny_program, PROMPTS, 5)
    executor: Any = made.executor
    assert executor.program.graphs.keys() == made.program.graphs.keys()
    for name, graph in made.program.graphs.items():
        assert executor.program.graphs[name].outputs == graph.outputs


def test_what_validation_looked_at_is_in_no_model(tiny_program: Program, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="needs aropt[onnx]")
    made = aropt.optimize(tiny_program, "onnxruntime", folder=tmp_path)
    outputs = {
        path.parent.parent.name: {o.name for o in onnx.load(path, load_external_data=False).graph.output}
        for path in tmp_path.glob("models/*/onnxruntime/model.onnx")
    }
    probed = with_probe(made.program).graphs
    assert any(probed[n].outputs.keys() > g.outputs.keys() for n, g in made.program.graphs.items())
    assert all(found == {"out." + o for o in made.program.graphs[name].outputs} for name, found in outputs.items())


def test_a_compiled_program_is_shown_and_saved(tiny_program: Program, tmp_path: Path) -> None:
    """Its options win over its own executor."""
    made = aropt.Compiled(tiny_program, Eager(tiny_program))
    assert str(made) == text(tiny_program)
    made.save(str(tmp_path / "out"))
    again = aropt.load(tmp_path / "out")
    want = generate(tiny_program, PROMPTS, 5)
    assert made.generate(PROMPTS, 5) == again.generate(PROMPTS, 5) == want
    assert again.home == str(tmp_path / "out") and str(again) == str(made)

    class Counted(Eager):
        calls = 0

        def call(self, graph: str, inputs: Any) -> Any:
            self.calls += 1
            return super().call(graph, inputs)

    mine = Counted(tiny_program)
    assert made.generate(PROMPTS, 5, executor=mine) == want and mine.calls > 5


def test_a_model_with_recurrent_state_is_read_again(tmp_path: Path) -> None:
    """Its files have operators of ONNX Runtime's own for recurrences."""
    pytest.importorskip("transformers", reason="needs aropt[hf]")
    onnx = pytest.importorskip("onnx", reason="needs aropt[onnx]")
    from aropt.targets.ort.files import graphs
    from tests.support import draft_models

    passes = [make(name) for name in ("canonicalize", "kv-cache", "fuse-sampler", "prune")]
    program = aropt.capture(draft_models.mamba2(), capacity=32)
    made = aropt.optimize(program, "onnxruntime", passes, check=False, threads=1)
    made.save(str(tmp_path / "out"))
    models = [onnx.load(path, load_external_data=False).graph for path in tmp_path.glob("out/models/*/*/model.onnx")]
    own = {node.op_type for model in models for graph in graphs(model) for node in graph.node if node.domain}
    assert {"LinearAttention", "CausalConvWithState"} <= own
    prompts = [[5, 6, 7], [9]]
    assert aropt.load(tmp_path / "out").generate(prompts, 9, plain=True) == made.generate(prompts, 9, plain=True)
