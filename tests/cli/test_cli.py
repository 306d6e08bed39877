"""The command line: the main job, and every kind of bad input with its exit status and one clear message."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from aropt.cli.optimize import samples
from aropt.ir.executor import Values
from aropt.targets.eager import InPlace
from tests.support.commands import MODEL, QUICK, aropt, refused
from tests.support.run import generate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    (path / "model.py").write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face directory with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hf") / "llama"
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def artifact(folder: Path) -> Path:
    out = folder / "artifact"
    done = aropt("optimize", f"{folder}/model.py:good", "-o", out, *QUICK)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("runs", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_digits_end_to_end(tmp_path: Path, runs: int) -> None:
    out = tmp_path / "out"
    done = aropt("optimize", "digits-ar", "-o", out, "--json", "--runs", runs, "--against", "cached")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["verify"]["status"] == "pass" and report["target"] == "onnxruntime"
    assert not runs or report["speedup"]["cached"] > 0
    assert {p["name"]: p["status"] for p in report["passes"]}["kv-cache"] == "applied"
    assert (out / "report.html").stat().st_size < 2**20
    assert {f.name for f in out.iterdir()} >= {
        "manifest.json",
        "program.txt",
        "program.json",
        "weights.safetensors",
        "models",
        "report.json",
    }
    run = aropt("run", out, "-n", "10", "--image", tmp_path / "ten.png", "--json")
    assert run.returncode == 0, run.stderr
    from PIL import Image

    picture = Image.open(tmp_path / "ten.png")
    assert picture.size == (1600, 160) and len(picture.getcolors()) > 8
    six = aropt("run", out, "-n", "6", "--grid", "3x2", "-o", tmp_path / "six.png")
    assert six.returncode == 0 and Image.open(tmp_path / "six.png").size == (480, 320)
    refused(aropt("run", out, "-n", "7", "--grid", "3x2"), 2, "7 pictures don't fit a grid of 3x2")
    refused(aropt("run", out, "-n", "7", "--grid", "3"), 2, "'3' is no grid")
    refused(aropt("run", out, "-n", "1", "-o", tmp_path / "no" / "there.png"), 2, "can't write")
    again = aropt("run", out, "-n", "10", "--image", tmp_path / "ten2.png", "--json", "--target", "eager")
    assert json.loads(again.stdout)["tokens"] == json.loads(run.stdout)["tokens"], "the same noise on another target"


def test_what_needs_tuning_does_not_ship(tmp_path: Path) -> None:
    few = [f"--no-pass={name}" for name in ("token-shuffle-fusion", "merge-linears", "fuse-sampler", "prune")]
    done = aropt("optimize", "digits-ar", "-o", tmp_path / "out", *QUICK, "--pass", "token-shuffle:window=2", *few)
    refused(done, 3, "needs fine-tuning", "python -m aropt.models.train --from digits-ar --shuffle 2")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.failed" / "report.json").is_file()
    refused(
        aropt("optimize", "digits-ar", "-o", tmp_path / "out", "--pass", "token-shuffle:window=3"), 2, "don't divide"
    )


@pytest.mark.slow
@pytest.mark.parametrize("against", ["hf", pytest.param("hf,cached", marks=pytest.mark.exhaustive)])
def test_huggingface_directory_gives_transformers_tokens(llama: Path, against: str, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    timed = ["--runs", "1", "--against", against, "--tokens", "20", "--json"]  # a process each
    done = aropt("optimize", llama, "-o", tmp_path / "out", *timed)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(done.stdout)["speedup"][name] > 0 for name in against.split(","))
    run = aropt("run", tmp_path / "out", "--prompt", "5 6 7", "-n", "60", "--json", "--stop", "")
    tokens = json.loads(run.stdout)["tokens"][0]
    model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    theirs = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60, eos_token_id=None
    )
    assert tokens == theirs[0, 3:].tolist() and len(tokens) == 60


def test_pt2_and_inspect(folder: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(folder))
    try:
        import model

        shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s", max=20)},)
        exported = torch.export.export(model.Model(), (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=shapes)
        fixed = torch.export.export(model.Model(), (torch.zeros(2, 5, dtype=torch.int64),))
    finally:
        sys.path.remove(str(folder))
    torch.export.save(exported, tmp_path / "m.pt2")
    torch.export.save(fixed, tmp_path / "fixed.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"not a zip")
    done = aropt("optimize", tmp_path / "m.pt2", "-o", tmp_path / "out", "--capacity", "20", *QUICK)
    assert done.returncode == 0, done.stderr
    text = aropt("inspect", tmp_path / "out").stdout
    assert "step_greedy" in text and str(tmp_path) not in text
    refused(aropt("inspect", tmp_path / "out", "--graph", "nope"), 2, "no graph 'nope'", "step_greedy")
    refused(aropt("optimize", tmp_path / "fixed.pt2", "-o", tmp_path / "o2", *QUICK), 4, "fixes the")
    refused(aropt("optimize", tmp_path / "bad.pt2", "-o", tmp_path / "o2", *QUICK), 2, "can't be loaded")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("branch", 4, ("branches on the values", "model.py:17", "if self.kind")),
        ("bidirectional", 4, ("bidirectional", "--loop unmask", "scaled_dot_product_attention")),
        ("cumsum", 4, ("cumsum", "accumulates along the sequence", "where:")),
        ("broken", 4, ("not finite", "qkv.weight")),
        ("number", 2, ("does not return an nn.Module", "int")),
        ("missing", 2, ("no function 'missing'",)),
    ],
)
def test_models_that_are_refused(folder: Path, tmp_path: Path, name: str, code: int, words: tuple[str, ...]) -> None:
    refused(aropt("optimize", f"{folder}/model.py:{name}", "-o", tmp_path / "out", *QUICK), code, *words)
    assert not any(tmp_path.iterdir()), "nothing is left behind"


def damaged(llama: Path, to: Path) -> Path:
    to.mkdir()
    for file in llama.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def test_damaged_directories(llama: Path, tmp_path: Path) -> None:
    cut = damaged(llama, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((llama / "model.safetensors").read_bytes()[:-1000])
    refused(aropt("optimize", cut, "-o", tmp_path / "out", *QUICK), 2, "damaged", "model.safetensors")
    garbage = damaged(llama, tmp_path / "garbage")
    (garbage / "model.safetensors").write_bytes(b"\xff" * 4096)
    refused(aropt("optimize", garbage, "-o", tmp_path / "out", *QUICK), 2, "damaged")
    vocabulary = damaged(llama, tmp_path / "vocabulary")
    config = json.loads((llama / "config.json").read_text())
    (vocabulary / "config.json").write_text(json.dumps({**config, "vocab_size": 41}))
    refused(
        aropt("optimize", vocabulary, "-o", tmp_path / "out", *QUICK), 2, "shapes that config.json says", "vocab_size"
    )
    missing = damaged(llama, tmp_path / "missing")
    weights = load_file(llama / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, missing / "model.safetensors", {"format": "pt"})
    refused(aropt("optimize", missing, "-o", tmp_path / "out", *QUICK), 2, "lacks weights", "model.norm.weight")
    nan = damaged(llama, tmp_path / "nan")
    weights = load_file(llama / "model.safetensors")
    weights["model.norm.weight"][0] = float("inf")
    save_file(weights, nan / "model.safetensors", {"format": "pt"})
    refused(aropt("optimize", nan, "-o", tmp_path / "out", *QUICK), 4, "not finite", "model.norm.weight")
    empty = damaged(llama, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(aropt("optimize", empty, "-o", tmp_path / "out", *QUICK), 2, "no weights in safetensors", "save_pretrained")
    assert not (tmp_path / "out").exists()


def test_drafts_that_can_not_be(folder: Path, tmp_path: Path) -> None:
    """A model that there is not, a canvas, another vocabulary, a tree that is none: nothing is written."""
    out, good = tmp_path / "out", f"{folder}/model.py:good"
    refused(aropt("optimize", good, "--draft", "nonesuch", "-o", out), 2, "no model 'nonesuch'")
    refused(
        aropt("optimize", "text-mdlm", "--draft", "text-ar-draft", "-o", out), 2, "can't draft", "canvas", "--draft"
    )
    refused(aropt("optimize", good, "--draft", "digits-ar", "-o", out), 2, "digits-ar can't draft", "17 ids")
    refused(
        aropt("optimize", "text-ar", "--draft", "digits-ar", "--runs", "0", "-o", out), 2, "draft model digits-ar", "64"
    )
    refused(aropt("optimize", good, "--pass", "tree-draft:shape=1-0", "-o", out), 2, "no tree of drafts", "chain:4")
    refused(aropt("optimize", good, "--pass", "tree-draft:draft=nonesuch", "-o", out), 2, "no model 'nonesuch'")
    refused(aropt("optimize", good, "--pass", "tree-draft:accept=all", "-o", out), 2, "accept=all", "typical")
    two = ("--draft", "text-ar-draft", "--pass", "tree-draft:draft=text")
    refused(aropt("optimize", good, *two, "-o", out), 2, "two draft models")
    assert not out.exists()


def test_usage_errors(folder: Path, artifact: Path, tmp_path: Path) -> None:
    good = f"{folder}/model.py:good"
    refused(aropt("optimize", "nonesuch", "-o", tmp_path / "out"), 2, "no model 'nonesuch'", "digits-ar")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--pass", "kv-cash"), 2, "unknown pass 'kv-cash'")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--pass", "prune:x=1"), 2, "no option 'x'")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--target", "tpu"), 2, "unknown target")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--rule", "top-q", *QUICK), 2, "unknown rule")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--capacity", "99", *QUICK), 2, "more than the model takes")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--wrong"), 2, "No such option")
    refused(aropt("optimize", good, "-o", tmp_path / "out", "--loop", "spiral"), 2, "unknown loop")
    refused(aropt("optimize", good, "-o", artifact, *QUICK), 2, "exists", "--force")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(aropt("optimize", good, "-o", tmp_path / "mine", "--force", *QUICK), 2, "not an aropt artifact")
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    refused(aropt("run", artifact, "--prompt", "1 2", "-n", "40"), 2, "don't fit", "20 tokens")
    refused(aropt("run", artifact, "--prompt", "1 99"), 2, "token 99 is not in the vocabulary")
    refused(aropt("run", artifact, "--prompt", "hello"), 2, "no tokenizer")
    refused(aropt("run", artifact, "--param", "min_p=0.1"), 2, "unknown sampling parameter 'min_p'")
    refused(aropt("run", artifact, "--seed", "-1"), 2, "--seed", "greater than or equal to 0")
    refused(aropt("run", tmp_path), 2, "not an aropt artifact")
    refused(aropt("bench", artifact, "--against", "warp"), 2, "unknown variant")


def test_read_only_and_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = f"{folder}/model.py:good"
    refused(aropt("optimize", good, "-o", "/proc/aropt-out", *QUICK), 2, "can't write")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aropt.pipeline.artifact.save_file", full)
    refused(aropt("optimize", good, "-o", tmp_path / "out", *QUICK), 2, "can't write", "No space left")
    assert not any(tmp_path.iterdir())


def test_interrupt_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "aropt.cli.main",
            "optimize",
            f"{folder}/model.py:good",
            "-o",
            str(tmp_path / "out"),
            *QUICK,
        ],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CI": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "kv-cache" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.wait(timeout=60)
    assert process.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
    assert not any(tmp_path.iterdir())


def test_an_interrupt_that_was_lost_in_the_last_step_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback of torch may swallow it; the command has no other step after it."""

    def lost(*given: Any) -> Any:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return samples(*given)

    monkeypatch.setattr("aropt.cli.optimize.samples", lost)
    made = aropt("optimize", f"{folder}/model.py:good", "-o", tmp_path / "out", *QUICK)
    assert made.returncode == 130 and "interrupted" in made.stderr, made.stderr
    assert not any(tmp_path.iterdir())


def test_failed_verification_is_put_aside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that computes something else: exit status 3, OUT.failed with the report, no OUT."""
    out, right = tmp_path / "out", InPlace.call

    def wrong(self: InPlace, graph: str, inputs: Values) -> Values:
        return {k: v * 1.001 if k == "row" else v for k, v in right(self, graph, inputs).items()}

    monkeypatch.setattr(InPlace, "call", wrong)
    done = aropt("optimize", f"{folder}/model.py:good", "-o", out, *QUICK)
    refused(done, 3, "does not match", "out.failed/report.html")
    assert (
        not out.exists()
        and json.loads((tmp_path / "out.failed" / "report.json").read_text())["verify"]["status"] == "fail"
    )


def test_a_changed_file_is_noticed(artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(artifact), str(copy)], check=True)
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-5] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    refused(aropt("run", copy, "--prompt", "1 2"), 3, "changed", "weights.safetensors")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "schema_version": 99}))
    refused(aropt("run", copy, "--prompt", "1 2"), 6, "newer aropt")


def test_run_is_reproducible_and_streams_to_stdout(artifact: Path) -> None:
    one, two = (
        aropt("run", artifact, "--prompt", "1 2", "-n", "8", "--temperature", "1", "--seed", "5") for _ in range(2)
    )
    assert one.returncode == 0 and one.stdout == two.stdout and len(one.stdout.split()) == 8


def test_plan_export_and_lists(folder: Path, artifact: Path, tmp_path: Path) -> None:
    plan = aropt("optimize", f"{folder}/model.py:good", "-o", tmp_path / "out", "--dry-run", "--json")
    planned = {p["name"]: p["status"] for p in json.loads(plan.stdout)["passes"]}
    assert [planned[n] for n in ("kv-cache", "fuse-sampler", "prune")] == ["applies"] * 3, planned
    assert not (tmp_path / "out").exists()
    done = aropt("export", artifact, "--to", "onnx", "-o", tmp_path / "onnx", "--json")
    assert done.returncode == 0, done.stderr
    import onnxruntime

    assert len(onnxruntime.InferenceSession(tmp_path / "onnx" / "step_greedy.onnx").get_inputs()) > 5
    assert "control" in json.loads((tmp_path / "onnx" / "loop.json").read_text())
    refused(aropt("export", artifact, "--to", "tvm"), 2, "can't export to 'tvm'")
    assert {m["name"] for m in json.loads(aropt("models", "--json").stdout)} >= {
        "digits-ar",
        "text-ar",
        "text-mdlm",
        "text-bd",
    }
    assert {p["name"] for p in json.loads(aropt("passes", "--json").stdout)} >= {"kv-cache", "fuse-sampler", "prune"}
    assert json.loads(aropt("doctor", "--json").stdout)["target eager"] == "ready"


def test_python_interface(tmp_path: Path) -> None:
    """capture, optimize, save, load with an nn.Module: the README's lines."""
    import aropt as package

    namespace: dict[str, object] = {}
    exec(MODEL, namespace)
    model = namespace["good"]()  # type: ignore[operator]
    assert isinstance(model, nn.Module)
    program = package.capture(model, capacity=18)
    fast = package.optimize(program, target="onnxruntime")
    assert fast.report["verify"]["status"] == "pass"
    tokens = fast.generate([[1, 2, 3], [4, 5]], 10, temperature=0.8, top_p=0.9, seed=7)
    assert tokens == generate(program, [[1, 2, 3], [4, 5]], 10, temperature=0.8, top_p=0.9, seed=7)
    fast.save(str(tmp_path / "out"))
    assert (
        package.load(tmp_path / "out").generate([[1, 2, 3], [4, 5]], 10, temperature=0.8, top_p=0.9, seed=7) == tokens
    )
