"""How each variant of the benchmark generates, in a worker's process.

Variants that need the model itself take it from the command line: an artifact's word for where it came from is data of
whoever made it, and loading a model may run code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aropt.bench.peers import PEERS, Generate
from aropt.errors import UsageError
from aropt.ir.units import flat, rows, rows_for
from aropt.targets import find_target

if TYPE_CHECKING:
    from aropt.ir.program import Meta  # a spec is read without torch
    from aropt.pipeline.compiled import Compiled

NEED_MODEL = ("eager", "hf", "hf-static", "hf-lookup", "ngram-draft", "no-draft", "plain", *PEERS)
TARGETS = {"cached": "eager", "stepping": "onnxruntime", "one-call": "onnxruntime"} | dict.fromkeys(
    ("inductor", "inductor-max"), "inductor"
)
EIGHT_BITS = {"int8-draft": "int8-drafts", "int8-linears": "int8-weights"}  # what a target can do where a pass pays


@dataclass(frozen=True)
class Origin:
    """What the command line says an artifact was made from, and whether code that comes with it may run."""

    model: str = ""
    trusted: bool = False
    guide: str = ""


REFERENCE = Origin()  # a reference model, or nobody said


@dataclass(frozen=True)
class Spec:
    """What a worker runs: a variant of an artifact, on a prompt; with a temperature it draws (seed 0)."""

    variant: str
    artifact: str
    prompt: list[int]
    n: int
    threads: int
    temperature: float = 0.0
    origin: Origin = REFERENCE


def variant(spec: Spec) -> Generate:
    """How a variant generates."""
    if spec.temperature and spec.variant in ("eager", "hf", "hf-static", "hf-lookup"):
        raise UsageError(what=f"{spec.variant} is timed greedily", hint="leave the temperature out")
    if spec.variant == "eager":
        return eager(spec)
    if spec.variant in ("hf", "hf-static", "hf-lookup"):
        return huggingface(spec)
    if spec.variant in ("ngram-draft", "no-draft", "plain"):
        drafts = ["ngram-draft"] if spec.variant == "ngram-draft" else []
        return stepping(again(spec, [*lossy(spec), *drafts]), spec)
    from aropt.pipeline.reading import load

    target = TARGETS.get(spec.variant)
    able = find_target(target) if target else None
    made = load(spec.artifact, target=target, threads=spec.threads)
    applied = {e.name for e in made.program.ledger}
    if able is not None and any(name in applied and not able.has(word) for name, word in EIGHT_BITS.items()):
        return stepping(again(spec, [], able.name), spec)  # there it makes floats of all weights in each round
    if target is not None:
        made = replace(made, executor=made.executor.stepping())
    if spec.variant == "one-call":
        made = replace(made, executor=made.executor.single_call(made.program))
    generate = {"stepping": stepping, "multi-step": several_rounds, "single-call": one_call}
    return generate[made.executor.way](made, spec)


def stepping(made: Compiled, spec: Spec) -> Generate:
    """The program's own loop, a call a round."""

    def generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        stamps: list[float] = []

        def stamp(_: object) -> bool:
            stamps.append(time.perf_counter())
            return False  # only the first round is of interest, and watching the others would slow them down

        tokens = made.generate([spec.prompt], spec.n, on_round=stamp, temperature=spec.temperature, stop=())
        return tokens[0], (stamps[0] - start) * 1e3

    return generate


class Enough(Exception):
    """Ends a generation that has shown its first token."""


def several_rounds(made: Compiled, spec: Spec) -> Generate:
    """Several rounds a call, where nothing is streamed: the first token's time is that of a streamed generation."""

    def first() -> float:
        def stop(_: object) -> None:
            raise Enough

        start = time.perf_counter()
        with suppress(Enough):
            made.generate([spec.prompt], spec.n, on_round=stop, temperature=spec.temperature, stop=())
        return (time.perf_counter() - start) * 1e3

    def generated() -> list[list[int]]:
        return made.generate([spec.prompt], spec.n, temperature=spec.temperature, stop=())

    def generate() -> tuple[list[int], float, float]:
        shown = [first() for _ in range(3)][-1]
        generated()  # the threads of the sessions above wait busily for a while
        start = time.perf_counter()
        tokens = generated()
        return tokens[0], shown, (time.perf_counter() - start) * 1e3

    return generate


def one_call(made: Compiled, spec: Spec) -> Generate:
    """The whole loop in one call, which shows no first token: that is the time of a generation of one."""

    def timed(n: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        tokens = made.generate([spec.prompt], n, temperature=spec.temperature, stop=())
        return tokens[0], (time.perf_counter() - start) * 1e3

    def generate() -> tuple[list[int], float, float]:
        first = timed(1)[1]
        tokens, ms = timed(spec.n)
        return tokens, first, ms

    return generate


def model(spec: Spec) -> tuple[Any, Meta]:
    """The model that the command line names, as the artifact's program takes it, and that program's meta."""
    from aropt.frontend.sources import resolve
    from aropt.loops.scheme import scheme_in
    from aropt.pipeline.reading import load

    meta = load(spec.artifact, target="eager").program.meta
    if not spec.origin.model:
        raise UsageError(what="no model is named", hint="--model MODEL")
    source = resolve(spec.origin.model, int(meta["capacity"]), spec.origin.trusted, scheme_in(meta).masked)
    source.meta |= {k: meta[k] for k in ("mask", "block", "shift") if k in meta}
    return source, meta


def guided(spec: Spec, meta: Meta) -> str | None:
    """The guide that the command line names. Raises UsageError where the artifact has one and none is named."""
    if meta.get("guide") and not spec.origin.guide:
        raise UsageError(what="the artifact's canvas has a guide, and none is named", hint="--guide MODEL")
    return spec.origin.guide or None


def eager(spec: Spec) -> Generate:
    """The model as its owner runs it without a cache: forward over all tokens, argmax, append; or the plain canvas."""
    import torch

    from aropt.frontend.forwards import Forward
    from aropt.ir.interpreter import Eager
    from aropt.loops.scheme import scheme_in
    from aropt.pipeline.api import capture
    from aropt.pipeline.compiled import Compiled

    source, meta = model(spec)
    if not scheme_in(meta).forced:  # rounds of their own, as the plain program has them
        kind, guide = scheme_in(meta).kind, guided(spec, meta)
        plain = capture(source, loop=kind, rules=meta.get("rules"), guide=guide)
        return stepping(Compiled(plain, Eager(plain)), spec)
    forward, prompt = Forward(source.module), rows(source.meta, spec.prompt)

    def generate() -> tuple[list[int], float]:
        start, first = time.perf_counter(), 0.0
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(rows_for(source.meta, spec.n)):
                token = forward(ids)[:, -1].argmax(-1)
                ids = torch.cat([ids, token.unsqueeze(1)], 1)
                first = first or (time.perf_counter() - start) * 1e3
        return flat(ids[:, len(prompt) :])[0][: spec.n], first

    return generate


def lossy(spec: Spec) -> list[str]:
    """The lossy passes of an artifact, as the command line has them."""
    from aropt.pipeline.reading import load

    ledger = load(spec.artifact, target="eager", threads=spec.threads).program.ledger
    found = [e for e in ledger if e.level == "lossy"]
    return [f"{e.name}:" + ",".join(f"{k}={v}" for k, v in e.options.items()) for e in found]


def again(spec: Spec, chosen: Sequence[str], target: str = "onnxruntime") -> Compiled:
    """The artifact's model with these passes and the usual ones, not validated: its tokens are compared with the
    artifact's.
    """
    from aropt.loops.speculate import checks_drafts
    from aropt.pipeline.api import capture, optimize
    from aropt.pipeline.checks import Instruments
    from aropt.pipeline.registry import pipeline

    source, meta = model(spec)
    program = capture(source, rules=meta.get("rules"))
    trusting = Instruments(check=False, trust=True, budget={"kl": float("inf")})
    made = optimize(program, target, pipeline(chosen), check=False, threads=spec.threads, instruments=trusting)
    if "ngram-draft" in chosen and not checks_drafts(made.program.control):
        raise UsageError(what="the pass ngram-draft does not apply to this model", hint="leave it out of --against")
    return made


def huggingface(spec: Spec) -> Generate:
    """transformers' generate with its default (dynamic) cache, or with a static one and its built-in torch.compile, or
    with drafts from the text itself.
    """
    import torch

    module = model(spec)[0].module
    if not hasattr(module, "generate"):
        raise UsageError(what="this model has no generate() of transformers", hint="leave hf out of --against")
    options = {"hf-static": static_cache, "hf-lookup": lookup}.get(spec.variant, dict)()

    class First:
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: object) -> None:
            self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([spec.prompt])

    def generate() -> tuple[list[int], float]:
        streamer, start = First(), time.perf_counter()
        with torch.inference_mode():
            out = module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=spec.n,
                eos_token_id=None,
                pad_token_id=0,
                streamer=streamer,
                **options,
            )
        return out[0, len(spec.prompt) :].tolist(), (streamer.stamps[1] - start) * 1e3

    return generate


def lookup() -> dict[str, Any]:
    """Options of generate(): prompt lookup with as many drafts as ours."""
    from aropt.passes.ngram_draft import NgramDraft

    return {"prompt_lookup_num_tokens": NgramDraft().drafts}


def static_cache() -> dict[str, Any]:
    """Options of generate(): a static cache, and the step compiled."""
    from transformers import CompileConfig

    compiling = CompileConfig(fullgraph=True, mode="default")
    compiling._compile_all_devices = True  # otherwise it compiles for accelerators only, and stays eager here
    return {"cache_implementation": "static", "compile_config": compiling}
