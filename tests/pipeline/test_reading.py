"""Artifacts that come from anyone: only what the manifest lists is read, nothing is run or written, all is told."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aropt
from aropt.errors import AroptError, Unsupported, UsageError, VerificationFailed
from aropt.ir.interpreter import most_rounds, run
from aropt.ir.program import Program
from aropt.loops.request import Request
from aropt.loops.runtime import make_inputs
from aropt.pipeline.artifact import save, write
from aropt.pipeline.manifest import EDITABLE, MANIFEST
from aropt.targets import lower
from tests.support.run import generate


@pytest.fixture(scope="module")
def eager(tiny_stages: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of the tiny program for the eager target."""
    out = tmp_path_factory.mktemp("eager") / "out"
    program = list(tiny_stages.values())[-1]
    save(program.replace(meta={**program.meta, "target": "eager", "prompts": [[1, 2]]}), out)
    return out


@pytest.fixture(scope="module")
def onnx(tiny_stages: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for ONNX Runtime, with its models."""
    out = tmp_path_factory.mktemp("onnx") / "out"
    program = list(tiny_stages.values())[-1]
    out.mkdir()
    lower(program, "onnxruntime", out)
    write(program.replace(meta={**program.meta, "target": "onnxruntime", "prompts": [[1, 2]]}), out, {})
    return out


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda out: Path(shutil.copytree(out, tmp_path / "copy"))


def relist(out: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Writes the hashes of what is there into the manifest, as who changes an artifact would."""
    manifest = json.loads((out / MANIFEST).read_text())
    for entry in manifest["files"]:
        data = (out / entry["path"]).read_bytes()
        entry |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    change(manifest)
    (out / MANIFEST).write_text(json.dumps(manifest))


def state_of(folder: Path) -> dict[str, Any]:
    return {str(p.relative_to(folder)): os.lstat(p).st_mtime_ns for p in folder.rglob("*")}


@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_reading_changes_nothing(kind: str, request: pytest.FixtureRequest, tiny_program: Program) -> None:
    out = request.getfixturevalue(kind)
    before = state_of(out)
    made = aropt.load(out)
    assert generate(made, [[1, 2]], 5) == generate(tiny_program, [[1, 2]], 5)
    assert made.home == str(out) and state_of(out) == before


def test_what_is_for_people_may_be_edited(eager: Path, copied: Callable[[Path], Path]) -> None:
    out = copied(eager)
    (out / "README.md").write_text("mine")
    (out / "picture.png").write_text("mine too")
    aropt.load(out)
    (out / "README.md").unlink()
    assert aropt.load(out).report == {} and "README.md" in EDITABLE


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize("change", [fifo, link, folder, longer, Path.unlink])
@pytest.mark.parametrize("name", ["program.json", "weights.safetensors", "manifest.json"])
def test_only_regular_files_of_the_listed_content(
    change: Callable[[Path], Any], name: str, eager: Path, copied: Callable[[Path], Path]
) -> None:
    out = copied(eager)
    change(out / name)
    if (change, name) == (longer, "manifest.json"):
        return
    with pytest.raises((UsageError, VerificationFailed), match="artifact"):
        aropt.load(out)


def unlisted(name: str) -> Callable[[Path], Any]:
    def change(out: Path) -> None:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(next(out.glob("models/*/onnxruntime/model.onnx")), out / name)

    return change


def dangling(out: Path) -> None:
    """A link to a file that is not there yet, where a model is looked for."""
    path = next(out.glob("models/*/onnxruntime/model.onnx"))
    path.unlink()
    path.symlink_to(out.parent / "written")


WHOLE, ROUNDS = "models/whole/onnxruntime/model.onnx", "models/step_greedy/onnxruntime/rounds-4.onnx"


@pytest.mark.parametrize("change", [unlisted(WHOLE), unlisted(ROUNDS), dangling])
def test_models_are_those_that_the_manifest_lists(
    change: Callable[[Path], Any], onnx: Path, copied: Callable[[Path], Path]
) -> None:
    out = copied(onnx)
    change(out)
    with pytest.raises(VerificationFailed, match="changed"):
        aropt.load(out)
    assert not (out.parent / "written").exists()


def test_a_model_that_is_missing_is_not_written_into_the_artifact(onnx: Path, copied: Callable[[Path], Path]) -> None:
    out = copied(onnx)
    shutil.rmtree(out / "models")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["files"] = [f for f in manifest["files"] if not f["path"].startswith("models/")]
    (out / MANIFEST).write_text(json.dumps(manifest))
    before = state_of(out)
    with pytest.raises(UsageError, match=r"model\.onnx.*\n.*it is missing"):
        aropt.load(out)
    assert state_of(out) == before


def outside(model: Any) -> None:
    """Weights in a file that is none of the artifact's."""
    import onnx

    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../../../secret")
    tensor.ClearField("raw_data")


def other_operator(model: Any) -> None:
    model.graph.node[0].domain, model.graph.node[0].op_type = "evil", "Run"


def other_output(model: Any) -> None:
    model.graph.output[0].type.tensor_type.elem_type = 11


@pytest.mark.parametrize("change", [outside, other_operator, other_output, lambda m: m.ClearField("graph")])
def test_models_are_looked_at_before_they_are_run(
    change: Callable[[Any], Any], onnx: Path, copied: Callable[[Path], Path]
) -> None:
    import onnx as library

    out = copied(onnx)
    path = max(out.glob("models/*/onnxruntime/model.onnx"), key=lambda p: p.stat().st_size)
    model = library.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    relist(out)
    with pytest.raises(UsageError, match="an ONNX model of the artifact"):
        aropt.load(out)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["files"][0].update(path="../x"),
        lambda m: m["files"][0].update(path="/etc/passwd"),
        lambda m: m["files"].append(m["files"][0]),
        lambda m: m["files"][0].update(bytes=-1),
        lambda m: m["files"].clear(),
        lambda m: m.update(files=None),
        lambda m: m.update(target="shell"),
        lambda m: m.update(target=["eager"]),
        lambda m: m.update(schema_version="1"),
    ],
)
def test_the_manifest_is_checked(
    change: Callable[[dict[str, Any]], Any], eager: Path, copied: Callable[[Path], Path]
) -> None:
    out = copied(eager)
    relist(out, change)
    with pytest.raises(UsageError, match=r"'manifest.json' can't be read"):
        aropt.load(out)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "config.json", "chat_template.jinja"])
def test_a_tokenizer_that_nobody_listed_is_not_read(name: str, eager: Path, copied: Callable[[Path], Path]) -> None:
    out = copied(eager)
    (out / name).write_text("{}")
    with pytest.raises(VerificationFailed, match="does not list it"):
        aropt.load(out)


def test_a_tokenizer_that_is_none_is_told(tmp_path: Path) -> None:
    from aropt.frontend.texts import stored_tokenizer

    for text in ("{}", "\x00", '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(UsageError, match=r"'tokenizer.json' can't be read"):
            stored_tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", '{"format": NaN}', "\x00", '{"format": 1}'])
def test_a_program_that_is_no_json(text: str, eager: Path, copied: Callable[[Path], Path]) -> None:
    out = copied(eager)
    (out / "program.json").write_text(text)
    relist(out)
    with pytest.raises(UsageError):
        aropt.load(out)


def test_what_no_check_foresaw_is_told(eager: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the artifact's fault."""
    from aropt.ir import limits

    def fails(*_: object) -> None:
        raise KeyError("modality")

    monkeypatch.setattr(limits, "check_nodes", fails)
    with pytest.raises(UsageError, match=r"program\.json' can't be read"):
        aropt.load(eager)


def test_what_fails_as_it_runs_is_told(eager: Path) -> None:
    """And what the caller's own `on_round` raises is the caller's."""
    made = aropt.load(eager)
    short = {n: w[:2] if n.startswith("embed") else w for n, w in made.program.weights.items()}
    program = made.program.replace(weights=short)
    broken = replace(made, program=program, executor=lower(program, "eager"))
    with pytest.raises(Unsupported, match="fails as it runs"):
        generate(broken, [[5, 6]], 3)
    with pytest.raises(IndexError):
        generate(replace(broken, home=""), [[5, 6]], 3)

    def fails(_: object) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        generate(made, [[1, 2]], 3, on_round=fails)


@pytest.mark.parametrize("kind", ["eager", "onnx"])
def test_a_loop_that_does_not_end_is_told(kind: str, request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    """The limit of 5 tokens counts for nothing here: each round is told that many are left."""
    made = aropt.load(request.getfixturevalue(kind))
    inputs = make_inputs(made.program, Request(((1, 2),), 5))
    most = most_rounds(inputs)
    assert 5 < most < 10_000
    for module in ("aropt.ir.interpreter", "aropt.targets.ort.executor"):
        monkeypatch.setattr(f"{module}.most_rounds", lambda _: 3)
    with pytest.raises(AroptError, match="does not end"):
        run(made.program, inputs, 16, made.executor)
