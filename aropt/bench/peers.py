"""Other engines as variants of the benchmark: onnxruntime-genai, OpenVINO GenAI, llama.cpp; greedy, batch 1.

Run as a script by any Python that has the engine; it needs no aropt: the top level imports the standard library only.

    python peers.py '{"variant": "ort-genai", "model": "HF_DIRECTORY", "prompt": [1, 2], "n": 10, "threads": 2}'

It answers as a worker of `aropt.bench.timing` does, in JSON lines: {"ready", "version"} after one warm-up, then for
each line that it reads {"ms", "first", "tokens"}. Where it can't: {"missing": packages to install}, or {"error": text}.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

# New tokens, milliseconds to the first one; and those of the generation, where that is not all that was run.
Generate = Callable[[], "tuple[list[int], float] | tuple[list[int], float, float]"]


@dataclass(frozen=True)
class Job:
    """What to generate: n new tokens after `prompt`, by `variant`, with the model of a Hugging Face directory."""

    variant: str
    model: str
    prompt: list[int]
    n: int
    threads: int


@dataclass(frozen=True)
class Peer:
    """An engine; `needs` are packages on PyPI, the engine's own first."""

    needs: tuple[str, ...]
    build: Callable[[Path, Path], None]  # from a Hugging Face directory into an empty folder
    load: Callable[[Path, Job], Generate]  # from that folder


def directory(model: str) -> Path | None:
    """The Hugging Face directory of a model; None where it is anything else."""
    from aropt.models import REFERENCES

    path = REFERENCES[model].checkpoint if model in REFERENCES else Path(model)
    return path if model and (path / "config.json").is_file() else None


def installed(package: str) -> str:
    """The version of a package, or nothing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def serve(generate: Generate, out: TextIO, variant: str, version: str = "") -> None:
    """A worker's loop: one warm-up, then one timed run for each line on stdin."""
    generate()
    print(json.dumps({"ready": variant, "version": version}), file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        result = generate()
        elapsed = result[2] if len(result) == 3 else (time.perf_counter() - start) * 1e3
        tokens, first = result[:2]
        print(json.dumps({"ms": elapsed, "first": first, "tokens": tokens}), file=out, flush=True)


def die_with_parent() -> None:
    """Has the kernel kill this process as soon as its parent has ended; where it can't, its input ends then."""
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(text: str) -> None:
    """Answers on what was stdout; whatever the engine prints goes to stderr."""
    die_with_parent()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(text))
    peer = PEERS[job.variant]
    try:
        if missing := [package for package in peer.needs if not installed(package)]:
            print(json.dumps({"missing": " ".join(missing)}), file=out, flush=True)
            return
        number = installed(peer.needs[0])
        folder = built(Path(job.model), f"{job.variant}-{number}", peer.build)
        serve(peer.load(folder, job), out, job.variant, f"{peer.needs[0]} {number}")
    except Exception as error:  # a peer that fails is a line of the result
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        print(json.dumps({"error": why[:300]}), file=out, flush=True)


def built(model: Path, name: str, build: Callable[[Path, Path], None]) -> Path:
    """The folder `name` in the model's cache; built aside and renamed, so that it is there whole or not at all."""
    home = os.environ.get("AROPT_CACHE") or Path.home() / ".cache" / "aropt"
    folder = Path(home, "peers", digest(model), name)
    if folder.is_dir():
        return folder
    aside = folder.with_name(f".{name}.{os.getpid()}.partial")
    for left in folder.parent.glob(f".{name}.*.partial"):
        if not alive(left.suffixes[-2][1:]):
            shutil.rmtree(left, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        build(model, aside)
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another run was first, and built the same
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def alive(process: str) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(int(process), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def digest(model: Path) -> str:
    """A hash of the names and contents of a directory's files."""
    found = hashlib.sha256()
    for file in sorted(f for f in model.rglob("*") if f.is_file()):
        found.update(f"{file.relative_to(model)}\0{file.stat().st_size}\0".encode())
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def tool(command: list[str]) -> None:
    """Runs a converter, without the network. Raises RuntimeError with the last line of its message."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:  # they leave caches, and modules here would hide others
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, preexec_fn=die_with_parent
        )
    if done.returncode:
        raise RuntimeError("its converter fails: " + (done.stderr.strip().splitlines() or ["no message"])[-1])


def build_genai(model: Path, folder: Path) -> None:
    """onnxruntime-genai's own builder: float32 for the CPU."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    tool([*command, "-i", str(model), "-o", str(folder), "-p", "fp32", "-e", "cpu"])
    file = folder / "genai_config.json"
    config = json.loads(file.read_text())
    config["model"]["eos_token_id"] = []  # no token ends it: a least length would keep EOS from being chosen instead
    file.write_text(json.dumps(config, indent=1))


def load_genai(folder: Path, job: Job) -> Generate:
    import onnxruntime_genai as engine

    length = len(job.prompt) + job.n
    config = engine.Config(str(folder))
    options = {"intra_op_num_threads": job.threads}
    # the last token is never fed, so that a full context may hold one more
    config.overlay(json.dumps({"model": {"context_length": length, "decoder": {"session_options": options}}}))
    model = engine.Model(config)

    def generate() -> tuple[list[int], float]:
        start, first = time.perf_counter(), 0.0
        params = engine.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length)
        generator = engine.Generator(model, params)
        generator.append_tokens(job.prompt)
        tokens: list[int] = []
        for _ in range(job.n):
            generator.generate_next_token()
            tokens.append(int(generator.get_next_tokens()[0]))
            first = first or (time.perf_counter() - start) * 1e3
        return tokens, first

    return generate


def build_openvino(model: Path, folder: Path) -> None:
    """optimum-intel's export with float32 weights."""
    command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", str(model)]
    tool([*command, "--task", "text-generation-with-past", "--weight-format", "fp32", str(folder)])


def load_openvino(folder: Path, job: Job) -> Generate:
    """Asks for float32 everywhere: OpenVINO's default is bfloat16, where the CPU has it."""
    import numpy as np
    import openvino
    import openvino_genai as engine

    precision = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    speed = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY"}
    pipeline = engine.LLMPipeline(str(folder), "CPU", **precision, **speed)
    config = engine.GenerationConfig(max_new_tokens=job.n, do_sample=False, ignore_eos=True)
    prompt = openvino.Tensor(np.array([job.prompt], np.int64))
    stamps: list[float] = []

    class Stream(engine.StreamerBase):  # type: ignore[misc]
        def write(self, token: Any) -> Any:
            stamps.append(time.perf_counter())
            return engine.StreamingStatus.RUNNING

        def end(self) -> None:
            pass

    def generate() -> tuple[list[int], float]:
        stamps.clear()
        start = time.perf_counter()
        result = pipeline.generate(prompt, config, Stream())
        return list(map(int, result.tokens[0])), (stamps[0] - start) * 1e3

    return generate


def build_llamacpp(model: Path, folder: Path) -> None:
    """A GGUF of float32 tensors, without a tokenizer. Raises ValueError for what is no plain Llama."""
    import gguf
    import numpy as np

    config = json.loads((model / "config.json").read_text())
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    scaled = rope.get("rope_type", "default") != "default" or config.get("rope_scaling")
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") != "llama" or scaled or biased:
        raise ValueError("it takes plain Llama models (no biases, no scaled rotary embedding), and this is none")
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(str(folder / "model.gguf"), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, value in tensors(model):
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = heads if "q_proj" in name else groups  # ggml rotates neighbours, Hugging Face the halves of a head
            value = value.reshape(rows, 2, width // 2, -1).swapaxes(1, 2).reshape(value.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def build_llamacpp_q8(model: Path, folder: Path) -> None:
    """The same with weights of eight bits: Q8_0, groups of 32 with a scale each, as its own tool makes them."""
    import llama_cpp as engine

    build_llamacpp(model, folder)
    whole = folder / "whole.gguf"
    (folder / "model.gguf").rename(whole)
    options = engine.llama_model_quantize_default_params()
    options.ftype = engine.LLAMA_FTYPE_MOSTLY_Q8_0
    if engine.llama_model_quantize(str(whole).encode(), str(folder / "model.gguf").encode(), options):
        raise RuntimeError("llama_model_quantize fails")
    whole.unlink()


def tensors(model: Path) -> Iterator[tuple[str, Any]]:
    """(name, float32 array) of a directory's safetensors files: 8 bytes of length, a JSON header, the data."""
    import numpy as np

    for file in sorted(model.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        data = np.memmap(file, np.uint8, "r", offset=8 + size)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            raw = data[slice(*entry["data_offsets"])]
            if entry["dtype"] == "BF16":  # the upper half of a float32
                value = (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
            else:
                value = raw.view({"F32": np.float32, "F16": np.float16}[entry["dtype"]]).astype(np.float32)
            yield name, value.reshape(entry["shape"])


def load_llamacpp(folder: Path, job: Job) -> Generate:
    """llama.cpp's C API: its Python class keeps the last prompt's cache, and adds work to each token."""
    import llama_cpp as engine

    engine.llama_backend_init()
    model = engine.llama_model_load_from_file(str(folder / "model.gguf").encode(), engine.llama_model_default_params())
    params = engine.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(job.prompt) + job.n
    params.n_threads = params.n_threads_batch = job.threads
    params.type_k = params.type_v = engine.GGML_TYPE_F32
    params.flash_attn_type = engine.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = engine.llama_init_from_model(model, params) if model else None
    if not context:
        raise RuntimeError("llama.cpp can't load the model that was converted for it")
    sampler = engine.llama_sampler_init_greedy()

    def step(ids: list[int]) -> int:
        array = (engine.llama_token * len(ids))(*ids)
        if engine.llama_decode(context, engine.llama_batch_get_one(array, len(ids))):
            raise RuntimeError("llama_decode fails")
        return int(engine.llama_sampler_sample(sampler, context, -1))

    def generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        engine.llama_memory_clear(engine.llama_get_memory(context), False)
        tokens = [step(job.prompt)]
        first = (time.perf_counter() - start) * 1e3
        while len(tokens) < job.n:
            tokens.append(step(tokens[-1:]))
        return tokens, first

    return generate


PEERS = {
    "ort-genai": Peer(("onnxruntime-genai", "onnx-ir", "torch", "transformers"), build_genai, load_genai),
    "openvino": Peer(("openvino-genai", "openvino-tokenizers", "optimum-intel"), build_openvino, load_openvino),
    "llamacpp": Peer(("llama-cpp-python", "gguf"), build_llamacpp, load_llamacpp),
    "llamacpp-q8": Peer(("llama-cpp-python", "gguf"), build_llamacpp_q8, load_llamacpp),
}

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: modules of aropt would hide others, such as `trace`
    main(sys.argv[1])
