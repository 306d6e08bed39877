"""Fast-dLLM and d2Cache as variants of the canvas benchmark: LLaDA in float32 on the CPU, greedy, batch 1.

Run as a script by a Python that has the peer's packages (see NEEDS; tested with torch 2.13.0, transformers 4.52.4). It
needs no aropt. The peer's code is run from a checkout (NVlabs/Fast-dLLM at 24cc59e, Kamichanw/d2Cache at 72feb60).

    python peer_canvas.py '{"peer": "fast-dllm", "checkout": "DIRECTORY", "config": {"d_model": 64, ...},
        "weights": "model.safetensors", "prompt": [1, 2], "gen_length": 128, "block_length": 32, "threshold": 0.9,
        "cache": "dual", "threads": 1}'

`config` has the names of LLaDA's config.json (see perf/llada.py). Without `threshold`, `steps` rounds write equal
shares of the answer. It answers as the workers of `bench.timing` do, in JSON lines: {"ready", "version"} after one
warm-up, then for each line that it reads {"ms", "first", "tokens", "nfe"}: `nfe` counts forwards, `first` is when the
ids of the first round were written. Where it can't: {"missing": packages}, or {"error": text}.

Where the peers differ from LLaDA's loop and from aropt's: they take the argmax over the mask id too (perf/llada.py
keeps it from winning). With a cache, Fast-dLLM runs two forwards in each block, even if the first one fills it, and
can't do one round a block by quota. d2Cache compares float32 probabilities (Fast-dLLM float64, aropt logarithms), where
those above 1 - 3e-8 are all 1, and topk picks any of them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

Generate = Callable[[], Any]  # what the peer returns
Read = Callable[[Any], "list[int]"]  # the ids of the answer in it

# LLaDA-8B's values of what the folder's config.json leaves out
LLADA = {
    "activation_type": "silu",
    "attention_dropout": 0.0,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_device": "cpu",
    "layer_norm_type": "rms",
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
}
CACHES = ("none", "prefix", "dual")
COMMON = ("torch", "transformers", "safetensors", "numpy")
D2CACHE = ("accelerate", "dill", "hydra-core", "loguru", "omegaconf", "pydantic", "python-dotenv", "tqdm")
NEEDS = {"fast-dllm": (*COMMON, "einops"), "d2cache": (*COMMON, *D2CACHE)}


@dataclass(frozen=True)
class Job:
    """What to generate, by whom: `steps` are rounds of the whole answer, used where there is no threshold."""

    peer: str
    checkout: str
    config: dict[str, Any]
    weights: str
    prompt: list[int]
    gen_length: int
    block_length: int
    threshold: float | None = None
    steps: int = 0
    cache: str = "none"
    threads: int = 1

    @property
    def rounds(self) -> int:
        """Rounds of the answer by quota: one id each, unless `steps` says otherwise."""
        return self.steps or self.gen_length


class Forwards:
    """Counts the forwards of a model, and keeps when the second one of a generation began."""

    def __init__(self, model: Any) -> None:
        self.count, self.second = 0, 0.0
        inner = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == 2:
                self.second = time.perf_counter()
            return inner(*args, **kwargs)

        model.forward = forward

    def restart(self) -> None:
        self.count, self.second = 0, 0.0


def missing(peer: str) -> list[str]:
    """The packages on PyPI that this Python lacks."""
    lacking = []
    for package in NEEDS[peer]:
        try:
            version(package)
        except PackageNotFoundError:
            lacking.append(package)
    return lacking


def filled(model: Any, job: Job) -> Any:
    """The model with the weights of the job, float32. Raises ValueError where names differ."""
    from safetensors.torch import load_file

    answer = model.float().load_state_dict(load_file(job.weights), strict=False)
    tied = ["model.transformer.ff_out.weight"] if job.config.get("weight_tying") else []
    lacking = [name for name in answer.missing_keys if name not in tied]
    if wrong := [*lacking, *answer.unexpected_keys]:
        raise ValueError(f"the weights don't fit the peer's model: {wrong[0]}")
    return model.eval().requires_grad_(False)


def configured(kind: Any, job: Job) -> Any:
    """The peer's configuration of this model."""
    given = job.config
    rest = {"embedding_size": given["vocab_size"], "n_kv_heads": given["n_heads"]}
    ids = {"eos_token_id": given["mask_token_id"], "pad_token_id": given["mask_token_id"]}
    return kind(**LLADA, **rest, **ids, **given)


def load_fast_dllm(job: Job) -> tuple[Any, Generate, Read]:
    """Fast-dLLM, version 1. It compiles its attention on import, for each shape anew: `main` turns that off."""
    sys.path.insert(0, str(Path(job.checkout, "llada")))
    import generate as engine  # type: ignore[import-not-found]
    import torch
    from model.configuration_llada import LLaDAConfig  # type: ignore[import-not-found]
    from model.modeling_llada import LLaDAModelLM  # type: ignore[import-not-found]

    model = filled(LLaDAModelLM(configured(LLaDAConfig, job)), job)
    prompt = torch.tensor([job.prompt])
    functions = (engine.generate, engine.generate_with_prefix_cache, engine.generate_with_dual_cache)
    function = functions[CACHES.index(job.cache)]

    def generate() -> Any:
        return function(
            model,
            prompt,
            steps=job.rounds,
            gen_length=job.gen_length,
            block_length=job.block_length,
            mask_id=job.config["mask_token_id"],
            threshold=job.threshold,
        )

    return model, generate, lambda result: result[0][0, len(job.prompt) :].tolist()


def load_d2cache(job: Job) -> tuple[Any, Generate, Read]:
    """d2Cache's "vanilla" loop with its prefix caches. Raises ValueError for shares that it can't express."""
    if job.threshold is None and job.gen_length % job.rounds:
        raise ValueError("d2Cache writes the same number of ids in every round")
    os.environ["MASK_TOKEN_ID"] = str(job.config["mask_token_id"])
    without_lm_eval()
    sys.path.insert(0, job.checkout)
    import torch
    from src.cache import PrefixCache  # type: ignore[import-not-found]
    from src.generation import utils  # type: ignore[import-not-found]
    from src.generation.vanilla import vanilla_generate  # type: ignore[import-not-found]
    from src.models.llada import LLaDAConfig, LLaDAModelLM  # type: ignore[import-not-found]

    utils.get_token_freq = lambda *_: None  # of LLaDA-8B's ids; only a rule that is not used here looks at them
    model = filled(LLaDAModelLM(configured(LLaDAConfig, job)), job)
    prompt = torch.tensor([job.prompt])

    def cache(config: Any) -> Any:
        return PrefixCache(config, use_dual=job.cache == "dual")

    def generate() -> Any:
        return vanilla_generate(
            model,
            prompt,
            gen_length=job.gen_length,
            block_length=job.block_length,
            num_transfer_tokens=1 if job.threshold is not None else job.gen_length // job.rounds,
            threshold=job.threshold,
            mask_token_id=job.config["mask_token_id"],
            cache_cls=None if job.cache == "none" else cache,
        )

    return model, generate, lambda record: record[-1].generated_tokens[0].tolist()  # applies all rounds again


def without_lm_eval() -> None:
    """Empty stand-ins for what d2Cache imports from lm_eval: its evaluation, which is not run here."""
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.instance"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["lm_eval.api.model"].TemplateLM = type("TemplateLM", (), {})  # type: ignore[attr-defined]
    sys.modules["lm_eval.api.instance"].Instance = type("Instance", (), {})  # type: ignore[attr-defined]


PEERS: dict[str, Callable[[Job], tuple[Any, Generate, Read]]] = {"fast-dllm": load_fast_dllm, "d2cache": load_d2cache}


def serve(job: Job, out: TextIO) -> None:
    """A worker's loop: one warm-up, then one timed run for each line on stdin."""
    model, generate, read = PEERS[job.peer](job)
    forwards = Forwards(model)
    generate()
    say(out, ready=job.peer, version=f"torch {version('torch')}, transformers {version('transformers')}")
    for _ in sys.stdin:
        forwards.restart()
        start = time.perf_counter()
        result = generate()
        end = time.perf_counter()
        first = (forwards.second or end) - start
        say(out, ms=(end - start) * 1e3, first=first * 1e3, tokens=read(result), nfe=forwards.count)


def say(out: TextIO, **answer: Any) -> None:
    """One line of JSON."""
    print(json.dumps(answer), file=out, flush=True)


def main(text: str) -> None:
    """Answers on what was stdout; whatever the peer prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(text))
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(job.threads)}
    try:
        if lacking := missing(job.peer):
            say(out, missing=" ".join(lacking))
            return
        import torch

        torch.set_num_threads(job.threads)
        serve(job, out)
    except Exception as error:  # a peer that fails is a line of the result
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(out, error=f"{type(error).__name__}: {why[:300]}")


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules would hide others, such as `models`
    main(sys.argv[1])
