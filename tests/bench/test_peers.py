"""Other engines in the benchmark, without having them: a stand-in speaks the protocol of workers; and their cache."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aropt.bench import peers, variants
from aropt.bench import timing as bench
from aropt.bench.timing import Timing
from aropt.bench.variants import Origin, Spec
from aropt.cli import run as generation
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.models import CHECKPOINTS
from aropt.pipeline.artifact import write
from perf.run import table
from tests.support.commands import aropt, refused

# Notes its job and its process; noise on both streams, more than a pipe holds; then what an engine would answer.
STAND_IN = """#!{python}
import json, os, sys
job = json.loads(sys.argv[2])
with open({log!r}, "a") as log:
    log.write(json.dumps({{**job, "pid": os.getpid(), "script": sys.argv[1]}}) + "\\n")
print("loading")
sys.stderr.write("noise\\n" * 50000)
print(json.dumps({{"ready": job["variant"], "version": "engine 1.2"}}), flush=True)
for line in sys.stdin:
    {fail}
    print(json.dumps({{"ms": 4.0, "first": 1.5, "tokens": [-1] * job["n"]}}), flush=True)
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a Llama of random weights and a byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("peers") / "llama"
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "text-ar" / file, path / file)
    return path


@pytest.fixture(scope="module")
def artifact(llama: Path, tiny_program: Program) -> Path:
    """Says that it was made from the Llama; its own program is a smaller one, which loads faster."""
    out = llama.parent / "artifact"
    out.mkdir()
    meta = {**tiny_program.meta, "source": str(llama), "prompts": [[1, 2]], "target": "eager"}
    write(tiny_program.replace(meta=meta), out, {})
    return out


def measure(artifact: Path, **options: Any) -> dict[str, bench.Timing]:
    """The stand-in for ort-genai, timed with the model that lies beside the artifact."""
    origin = Origin(str(artifact.parent / "llama"))
    return bench.measure(artifact, ["ort-genai"], [1], 2, 1, origin=origin, **options)


def executable(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a stand-in in an engine's place; returns the log of its jobs."""

    def install(variant: str, fail: str = "pass") -> Path:
        log = tmp_path / f"{variant}.log"
        script = STAND_IN.format(python=sys.executable, log=str(log), fail=fail)
        monkeypatch.setenv(bench.variable(variant), executable(tmp_path / variant, script))
        return log

    return install


def test_bench_times_what_there_is_and_names_the_rest(
    artifact: Path,
    llama: Path,
    tmp_path: Path,
    stand_in: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = stand_in("ort-genai")
    bare = executable(tmp_path / "bare", f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without any package
    monkeypatch.setenv("AROPT_PYTHON_OPENVINO", bare)
    monkeypatch.setenv("AROPT_PYTHON_LLAMACPP", str(tmp_path / "nowhere"))
    against = "ort-genai,openvino,llamacpp"
    done = aropt(
        "bench", artifact, "--model", llama, "--against", against, "--runs", "2", "-n", "3", "--threads", "1", "--json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {(b["variant"], b["phase"], b["unit"]): b for b in result["bench"]}
    assert {v for v, _, _ in rows} == {"aropt (eager)", "ort-genai"} == {"aropt (eager)", *result["speedup"]}
    assert rows["ort-genai", "generate", "ms"]["n"] == 2
    assert rows["ort-genai", "prefill", "ms"]["median"] == 1.5
    genai, other, openvino, llamacpp = result["notes"]
    assert genai == "ort-genai is engine 1.2."
    assert other == "ort-genai gives other tokens than aropt from new token 0 on."
    packages = "openvino-genai openvino-tokenizers optimum-intel"
    other = "or set AROPT_PYTHON_OPENVINO to a Python that has it"
    assert openvino == f"openvino is not installed: pip install {packages} ({other})"
    assert llamacpp.startswith("llamacpp could not be timed: AROPT_PYTHON_LLAMACPP names no Python that runs")
    job = json.loads(log.read_text())
    assert Path(job["model"]) == llama.resolve() and Path(job["script"]) == Path(peers.__file__).resolve()
    assert (job["n"], job["threads"], job["variant"]) == (3, 1, "ort-genai")


def test_other_engines_take_hugging_face_directories(tmp_path: Path, stand_in: Callable[..., Path]) -> None:
    log = stand_in("llamacpp")
    origin = Origin("digits-ar")
    timing = bench.measure(tmp_path, ["llamacpp"], [1], 2, 1, origin=origin)["llamacpp"]
    assert "takes Hugging Face directories" in timing.failure() and not timing.runs and not log.exists()
    assert peers.directory("text-ar") == CHECKPOINTS / "text-ar" and peers.directory("") is None


def test_what_an_artifact_says_of_its_source_is_not_followed(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a file nor code of a model's directory runs: the command line names the model, or it is left out."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef model(): return None")
    foreign = {"source": f"{tmp_path}/evil.py:model", "trust_remote_code": True, "target": "eager", "prompts": [[1]]}
    out = tmp_path / "out"
    out.mkdir()
    write(tiny_program.replace(meta={**tiny_program.meta, **foreign}), out, {})
    for variant in variants.NEED_MODEL:
        with pytest.raises(UsageError, match="--model MODEL"):
            bench.check([variant], Origin())
    for variant in ("eager", "hf", "no-draft"):
        with pytest.raises(UsageError, match="no model is named"):
            bench.variant(Spec(variant, str(out), [1], 2, 1))
    timed: list[list[str]] = []
    monkeypatch.setattr(
        bench, "measure", lambda _, names, *__, **___: timed.append(names) or {"aropt": Timing("aropt")}
    )
    report = generation.bench(out, [], 1, 2, 1, lambda _: None, Origin())
    assert timed == [["aropt", "cached"]] and "eager, hf are left out" in report["notes"][0]
    assert not (tmp_path / "ran").exists()


def test_a_model_that_aropt_ships_needs_no_name(
    tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an artifact says of its source is followed to such a model alone; another that is named goes before it."""
    (out := tmp_path / "out").mkdir()
    meta = {**tiny_program.meta, "source": "text-ar", "target": "eager", "prompts": [[1]]}
    write(tiny_program.replace(meta=meta), out, {})
    timed: list[str] = []

    def measure(*_: Any, origin: Origin, **__: Any) -> dict[str, Timing]:
        timed.append(origin.model)
        return {"aropt": Timing("aropt")}

    monkeypatch.setattr(bench, "measure", measure)
    for origin in (Origin(), Origin("digits-ar")):
        report = generation.bench(out, ["hf"], 1, 2, 1, lambda _: None, origin)
        assert not any("left out" in note for note in report["notes"])
    assert timed == ["text-ar", "digits-ar"]


def test_unknown_variants_and_help(artifact: Path, llama: Path, tmp_path: Path) -> None:
    names = ", ".join(bench.AGAINST)
    assert {*peers.PEERS, *bench.DEFAULT_AGAINST, *bench.SETTINGS} <= {*bench.AGAINST}
    refused(aropt("bench", artifact, "--against", "eager,warp"), 2, "unknown variant 'warp'", names)
    refused(aropt("optimize", llama, "-o", tmp_path / "o", "--against", "warp"), 2, "unknown variant 'warp'", names)
    assert not (tmp_path / "o").exists()
    for command in ("bench", "optimize"):
        shown = "".join(aropt(command, "--help").stdout.split())
        assert names.replace(" ", "") in shown


def test_rounds_are_processes(artifact: Path, stand_in: Callable[..., Path]) -> None:
    log = stand_in("ort-genai")
    turns: list[int] = []
    found = measure(artifact, runs=5, rounds=2, between=lambda: turns.append(1))
    timing = found["ort-genai"]
    assert len(turns) == 2  # of three runs and of two
    assert (timing.runs, timing.first, timing.tokens) == ([4.0] * 5, [1.5] * 5, [-1, -1])
    assert len({json.loads(line)["pid"] for line in log.read_text().splitlines()}) == 2


def test_a_slow_variant_is_timed_less_often(
    artifact: Path, stand_in: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("ort-genai")
    monkeypatch.setattr(bench, "PATIENCE", 0.015)  # two warm-ups and two runs of 4 ms are more
    assert measure(artifact, runs=5)["ort-genai"].runs == [4.0] * 2


def test_an_engine_that_dies_is_a_note(artifact: Path, stand_in: Callable[..., Path]) -> None:
    stand_in("ort-genai", fail="sys.exit('out of registers')")
    timing = measure(artifact, runs=1, rounds=2)["ort-genai"]
    assert timing.failure() == "ort-genai could not be timed: out of registers"


@pytest.mark.parametrize("variant", peers.PEERS)
def test_the_script_needs_no_packages(variant: str, llama: Path) -> None:
    job = peers.Job(variant, str(llama), [1], 1, 1)
    command = [sys.executable, "-I", "-S", peers.__file__, json.dumps(job.__dict__)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(done.stdout) == {"missing": " ".join(peers.PEERS[variant].needs)}


@pytest.mark.slow
@pytest.mark.parametrize("variant", [v for v in peers.PEERS if v != "llamacpp-q8"])
def test_engines_give_the_same_tokens(
    variant: str, artifact: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where they are installed, or AROPT_PYTHON_... names a Python that has them."""
    from transformers import LlamaForCausalLM

    monkeypatch.setenv("AROPT_CACHE", str(tmp_path))
    prompt, n = [72, 101, 108], 62  # the model's length, and the token after it
    timing = bench.measure(artifact, [variant], prompt, n, 1, runs=1, origin=Origin(str(llama)))[variant]
    if timing.missing:
        pytest.skip(timing.failure())
    assert not timing.error
    ids = torch.tensor([prompt])
    for _ in range(n):
        ids = torch.cat([ids, LlamaForCausalLM.from_pretrained(llama)(ids).logits[:, -1:].argmax(-1)], 1)
    assert timing.tokens == ids[0, len(prompt) :].tolist()


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built aside, once for each content of the model; a failed build leaves nothing."""
    monkeypatch.setenv("AROPT_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    calls: list[Path] = []

    def build(source: Path, folder: Path) -> None:
        assert source == model and folder.is_dir() and not any(folder.iterdir())
        calls.append(folder)
        (folder / "engine.bin").write_text(str(len(calls)))
        if len(calls) == 1:
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        peers.built(model, "x-1", build)
    (home,) = (tmp_path / "cache" / "peers").iterdir()
    assert not any(home.iterdir())
    folder = peers.built(model, "x-1", build)
    assert folder == home / "x-1" and calls[-1].parent == home and calls[-1] != folder
    assert peers.built(model, "x-1", build) == folder and len(calls) == 2
    assert [f.name for f in home.iterdir()] == ["x-1"] and (folder / "engine.bin").read_text() == "2"
    (model / "config.json").write_text("[]")
    assert peers.built(model, "x-1", build) != folder and len(calls) == 3


def test_a_build_that_another_run_finished_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AROPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()

    def build(_: Path, folder: Path) -> None:
        other = folder.with_name("x-1")
        other.mkdir()
        (other / "first").touch()

    folder = peers.built(tmp_path / "model", "x-1", build)
    assert os.listdir(folder) == ["first"] and os.listdir(folder.parent) == ["x-1"]


def test_safetensors_are_read_without_torch(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    torch.manual_seed(0)
    kinds = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float16}
    known = {name: torch.randn(3, 5).to(kind) for name, kind in kinds.items()}
    save_file({"a": known["a"], "c": known["c"]}, tmp_path / "1.safetensors", {"format": "pt"})
    save_file({"b": known["b"]}, tmp_path / "2.safetensors")
    found = {name: torch.tensor(value) for name, value in peers.tensors(tmp_path)}
    assert found.keys() == known.keys()
    assert all(torch.equal(found[name], known[name].float()) for name in known)


@pytest.mark.parametrize(
    "change", [{"model_type": "gpt2"}, {"attention_bias": True}, {"rope_parameters": {"rope_type": "llama3"}}]
)
def test_llamacpp_refuses_what_it_would_get_wrong(
    change: dict[str, object], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match="plain Llama"):
        peers.build_llamacpp(tmp_path, tmp_path)


def test_table_of_the_readme() -> None:
    """First tokens of all, the roofline of the row that it is about, and what was not timed."""
    row = {"p10": 1.0, "p90": 9.0, "n": 6}
    kinds = (("generate", "ms", 200.0), ("generate", "tok/s", 1000.0), ("prefill", "ms", 3.25))
    found = {
        "env": {"cpu": "C", "threads": 2, "torch": "2", "onnxruntime": "1", "transformers": "5"},
        "bench": [
            {"variant": v, "phase": phase, "unit": unit, "median": value, **row}
            for v in ("aropt (onnxruntime)", "ort-genai")
            for phase, unit, value in kinds
        ],
        "speedup": {"ort-genai": 1.25},
        "roofline": {"share": 0.413},
        "notes": ["ort-genai is engine 1.2.", "llamacpp is not installed: pip install it"],
        "tokens": 64,
        "engines": {"ort-genai": "engine 1.2"},
    }
    lines = table({"text-ar": found}).splitlines()
    assert lines[2] == "| text-ar | aropt (onnxruntime) | 200.0 ms | 1.0 to 9.0 | 1000 | 3.2 ms | 41% |  |"
    assert lines[3] == "| text-ar | ort-genai | 200.0 ms | 1.0 to 9.0 | 1000 | 3.2 ms |  | 1.25x |"
    assert "engine 1.2. Batch 1" in lines[5] and "(64 of text-ar)" in lines[5] and "6 runs in 2 processes" in lines[5]
    assert lines[7:] == ["* text-ar: llamacpp is not installed: pip install it"]
    found["roofline"] = {"share": 0.413, "variant": "ort-genai"}
    assert [line.split("|")[7].strip() for line in table({"text-ar": found}).splitlines()[2:4]] == ["", "41%"]
