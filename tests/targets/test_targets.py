"""The reference models on every target: greedy and sampled tokens are those of the plain program."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import aropt
from aropt.ir.executor import Executor
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.targets import lower
from aropt.validate.compare import cases, validate, with_probe
from tests.conftest import make_program
from tests.support.run import generate


@dataclass
class Pair:
    plain: Program
    fast: Program


@pytest.fixture(scope="module", params=[pytest.param("digits-ar", marks=pytest.mark.exhaustive), "text-ar"])
def pair(request: pytest.FixtureRequest) -> Pair:
    plain = aropt.capture(request.param, capacity=64)
    fast, results, _ = run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))
    not_all = {
        "canonicalize", "merge-linears", "block-cache", "guide-cache", "fuse-canvas", "fuse-tree",
        "cfg-batch", "token-shuffle-fusion",
    }  # fmt: skip
    assert all(r.status == "applied" or r.name in not_all for r in results), results
    return Pair(plain, fast)


@pytest.fixture(scope="module")
def sessions(pair: Pair) -> Executor:
    return lower(pair.fast, "onnxruntime")


@pytest.mark.parametrize("target", [pytest.param("eager", marks=pytest.mark.exhaustive), "onnxruntime"])
def test_target_is_the_reference(pair: Pair, target: str) -> None:
    probed = with_probe(pair.fast)
    verdict = validate(pair.plain, probed, lower(probed, target))
    assert verdict.passed, [o for o in verdict.outcomes if o.problem]
    assert verdict.metrics()["tokens"] > 200


@pytest.mark.slow
@pytest.mark.exhaustive
def test_inductor_is_verified(pair: Pair) -> None:
    """Compiling takes long, so the smaller model only."""
    if pair.plain.name != "digits-ar":
        pytest.skip("one compiled model is enough")
    chosen = cases(pair.plain)
    verdict = validate(pair.plain, with_probe(pair.fast), lower(with_probe(pair.fast), "inductor"), chosen)
    assert verdict.passed, [o for o in verdict.outcomes if o.problem]
    assert len(verdict.outcomes) >= len(chosen) > 20


def test_inductor_takes_all_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles once a shape, and requests have more shapes than torch compiles of its own accord."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # which is fast
    plain = make_program(1)
    fast = run_passes(plain, pipeline(), "inductor", Instruments(check=False))[0]
    executor, limit = lower(fast, "inductor"), torch._dynamo.config.recompile_limit
    for sequences, length, stops in itertools.product((3, 1), (5, 1), (2, 1)):  # a size of one is a shape of its own
        prompts = [[1 + i % 9 for i in range(length + j % 2)] for j in range(sequences)]
        for temperature in (0.0, 1.0):
            options: dict[str, Any] = {"temperature": temperature, "stop": [10, 9][:stops]}
            found = generate(fast, prompts, 3, executor=executor, **options)
            assert found == generate(plain, prompts, 3, **options)
    assert torch._dynamo.config.recompile_limit == limit


def test_eager_target_updates_caches_in_place(pair: Pair) -> None:
    """The target may overwrite its inputs; the reference interpreter must not."""
    graph = pair.fast.graphs["ragged_greedy"]  # the other one's caches belong to an op, which returns new ones
    assert {n for n, s in pair.fast.state.items() if s.kind == "append-kv"} == set(graph.aliases)
    sizes = {"B": 1, "S": 8, "R": 1, "K": 1}
    inputs = {
        n: torch.zeros([sizes.get(d, d) if isinstance(d, str) else d for d in s.dims], dtype=s.dtype)
        for n, s in graph.inputs.items()
    }
    kept = {n: v.clone() for n, v in inputs.items()}
    Eager(pair.fast).call("ragged_greedy", inputs)
    assert all(torch.equal(kept[n], inputs[n]) for n in inputs)
    out = lower(pair.fast, "eager").call("ragged_greedy", inputs)
    assert out["k_0"].data_ptr() == inputs["k_0"].data_ptr()


def test_onnxruntime_copies_no_cache(pair: Pair, sessions: Executor) -> None:
    """The session writes each cache into its own buffer."""
    pointers: list[set[int]] = []
    caches = [n for n, s in pair.fast.state.items() if s.kind == "append-kv"]
    prompt = pair.plain.meta["prompts"][0]
    generate(
        pair.fast, [prompt], 6, executor=sessions, on_round=lambda v: pointers.append({v[c].data_ptr() for c in caches})
    )
    assert all(p == pointers[0] for p in pointers) and len(pointers[0]) == len(caches)


def test_batches_agree_with_single_runs(pair: Pair, sessions: Executor) -> None:
    """Padding and batching change nothing, greedy or sampled."""
    prompts = [list(map(int, p)) for p in pair.plain.meta["prompts"][:3]]
    prompts[1] = [*prompts[1], 3, 5]
    for params in ({}, {"temperature": 0.9, "top_k": 5}):
        together = generate(pair.fast, prompts, 8, seed=4, executor=sessions, **params)
        assert together == generate(pair.plain, prompts, 8, seed=4, **params)
