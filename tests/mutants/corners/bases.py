"""The optimized programs that the mutants of this folder change, each with what it is held to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import aropt
from aropt.frontend.trace import capture_model
from aropt.ir.program import Program
from aropt.loops.positions import autoregressive
from aropt.loops.rules import DEFAULT
from aropt.models.canvas import MASK, CanvasLM
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.validate.compare import with_probe
from tests.mutants.surgery import Tiny

VOCAB, CAPACITY, NULL, BLOCK = 48, 176, 5, 16
TRUSTING = Instruments(check=False, trust=True, budget={"kl": float("inf")})


@dataclass(frozen=True)
class Base:
    """A right program with its probe, and the reference that validation compares it with."""

    reference: Program
    program: Program


@functools.cache
def positions(rules: tuple[str, ...], seed: int = 3, **shape: Any) -> Program:
    """The plain loop over positions of a tiny transformer."""
    torch.manual_seed(seed)  # of texts that repeat little, so that they show what is wrong
    model = Tiny(**{"vocab": VOCAB, "capacity": CAPACITY, "scale": 3.0, **shape})
    graph, weights = capture_model(model, VOCAB, CAPACITY)
    meta = {"vocab": VOCAB, "capacity": CAPACITY, "null": NULL, "prompts": [[1, 2, 3]]}
    return autoregressive(graph, weights, meta, rules)


@functools.cache
def canvas(block: int, *rules: str) -> Program:
    """The plain loop of a tiny model that unmasks, with blocks of its own or none."""
    torch.manual_seed(1)
    model = CanvasLM(block, width=32, layers=2, heads=2, hidden=48)
    for parameter in model.parameters():
        parameter.data *= 4  # else all logits are about alike
    model.capacity = 128  # type: ignore[assignment]
    return aropt.capture(model.eval(), mask=MASK, block=block, rules=rules, prompts=[[1, 2, 3]])


FULL = ("repetition-penalty", "bias", "temperature", "top-k", "top-p", "min-p")
TWO = {"layers": 2, "groups": 2}
PLAIN: dict[str, Callable[[], Program]] = {
    "lean": lambda: positions(DEFAULT, **TWO),
    "full": lambda: positions(FULL, 2, learned=True),
    "window": lambda: positions(DEFAULT, layers=2, window=24),
    "guided": lambda: positions(("guidance", "top-k", "repetition-penalty")),
    "interval": lambda: positions(("guidance-interval", "top-k")),
    "ngram": lambda: positions(DEFAULT, scale=2.0, **TWO),
    "int8": lambda: positions(DEFAULT, width=64, **TWO),
    "dense": lambda: positions(DEFAULT, width=64, **TWO),
    "canvas": lambda: canvas(0),
    "blocks": lambda: canvas(BLOCK, "threshold"),
    **dict.fromkeys(("prefix", "dual", "free", "dkv", "vicinity"), lambda: canvas(0, "threshold")),
}
ASKED = {
    "interval": "cfg-interval", "ngram": "ngram-draft", "int8": "int8-draft:drafts=3,least=1000",
    "prefix": "prefix-cache", "dual": "dual-cache", "free": "free-cache:refresh=16", "dkv": "dkv-cache:refresh=4",
    "vicinity": "vicinity:before=1,after=2,warmup=2",
}  # fmt: skip
TARGET = {"dense": "onnxruntime", "canvas": "onnxruntime", "free": "onnxruntime"}  # whose passes are run


@functools.cache
def base(name: str) -> Base:
    """The base of that name; what a lossy pass made is its own reference."""
    plain = PLAIN[name]()
    asked = [ASKED[name]] if name in ASKED else []
    made, results, reference = run_passes(plain, pipeline(asked), TARGET.get(name, "eager"), TRUSTING)
    applied = [r.name for r in results if r.status == "applied"]
    assert not asked or asked[0].partition(":")[0] in applied, f"{asked} was not applied: {results}"
    return Base(reference, with_probe(made))
