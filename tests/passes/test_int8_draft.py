"""int8-draft: the ids are those of the plain loop, greedy or drawn, whatever the step of eight bits drafts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import UsageError
from aropt.exporters.whole_loop import export_program
from aropt.ir.control import loops
from aropt.ir.program import Program
from aropt.models.shuffle import Shape, ShuffleAR
from aropt.passes.int8_draft import Int8Draft
from aropt.passes.kv_cache import KvCache
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Skips, planned
from aropt.targets.ort import multi_step, run_loop
from aropt.validate.compare import validate, with_probe
from tests.conftest import make_program, rounds_of
from tests.mutants.surgery import aten, swap
from tests.support.run import generate
from tests.support.targets import EAGER
from tests.support.wide import CAPACITY, VOCAB, plain

IDS = st.integers(0, VOCAB - 1)
LEVELS, NULL = 7, 10
ASKED = "int8-draft:drafts=3,least=1000"


@cache
def images(guided: bool = True) -> Program:
    """Windows of 2 x 2 ids, 16 rows, with guidance or without."""
    torch.manual_seed(1)
    shape = Shape(side=8, window=2, levels=LEVELS, classes=3, width=64, layers=1, heads=2, hidden=64, mixing=32)
    rules = ("guidance", "top-k") if guided else ("top-k", "top-p")
    return aropt.capture(ShuffleAR(shape).eval(), rules=rules, prompts=[[8]], vocab=LEVELS, input_vocab=NULL + 1,
                         name="images", modality="image")  # fmt: skip


def unguided() -> Program:
    return images(False)


@cache
def drafted(of: Callable[[], Program] = plain, fused: bool = True) -> Program:
    """The program with three drafts a round, its calls fused or not."""
    passes = pipeline([ASKED], [] if fused else ["fuse-sampler", "prune"])
    return run_passes(of(), passes, "eager", Instruments(check=False))[0]


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_ids_are_those_of_the_plain_loop(data: st.DataObject) -> None:
    prompt = data.draw(st.lists(IDS, min_size=1, max_size=CAPACITY), "prompt")
    n = data.draw(st.integers(0, CAPACITY - len(prompt) + 1), "n")
    stop = data.draw(st.lists(IDS, max_size=2), "stop")
    drawn: dict[str, Any] = {
        "temperature": 1.5,
        "top_k": 9,
        "top_p": 0.9,
        "seed": data.draw(st.integers(0, 99), "seed"),
    }
    options = data.draw(st.sampled_from([{}, drawn]), "options")
    want = generate(plain(), [prompt], n, stop=stop, streams=[5], **options)
    for program in (drafted(), drafted(plain, False)):
        assert generate(program, [prompt], n, stop=stop, streams=[5], **options) == want


@settings(deadline=None, max_examples=25)
@given(st.data())
@pytest.mark.exhaustive
def test_windows_with_guidance(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 64), "n")
    stop = data.draw(st.lists(st.integers(0, LEVELS - 1), max_size=1), "stop")
    options = data.draw(st.sampled_from([{}, {"temperature": 1.0, "seed": 4, "top_k": 5}]), "options")
    for guided in (True, False):
        given_ = {**options, "guidance": 3.0} if guided else options
        want = generate(images(guided), [[8]], n, stop=stop, **given_)
        assert generate(with_drafts(guided), [[8]], n, stop=stop, **given_) == want


@cache
def with_drafts(guided: bool) -> Program:
    found, results, _ = run_passes(images(guided), pipeline([ASKED]), "eager", Instruments(check=False))
    assert next(r for r in results if r.name == "int8-draft").status == "applied"
    return found


def test_rounds_are_fewer_and_end_with_as_many_rows_as_are_left() -> None:
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        seen = rounds_of(drafted(), [[1, 2, 3]], 19, **options)
        assert len(seen) <= 8, "drafts of the same model should mostly be right"
        assert int(seen[-1]["count"]) == 19 and bool(seen[-1]["finished"])
    assert len(rounds_of(plain(), [[1, 2, 3]], 19)) == 19


def test_several_sequences_run_as_before() -> None:
    for prompts, options in (([[1, 2], [3, 4]], {}), ([[1], [3, 4]], {"temperature": 1.0})):
        seen = rounds_of(drafted(), prompts, 6, **options)
        assert len(seen) == 6 and not any("window" in values for values in seen)
        assert generate(drafted(), prompts, 6, **options) == generate(plain(), prompts, 6, **options)


def spoiled(p: Program) -> Program:
    """The step of eight bits drafts nonsense."""
    broken = {w: 255 - v if v.dtype == torch.uint8 else v for w, v in p.weights.items()}
    return p.replace(weights=broken)


@pytest.mark.parametrize("of", [plain, pytest.param(images, marks=pytest.mark.exhaustive)])
def test_whatever_is_drafted_the_ids_are_the_same(of: Callable[[], Program]) -> None:
    verdict = validate(of(), spoiled(with_probe(drafted(of))))
    assert verdict.passed, verdict.outcomes[-1].problem
    before, after = (len(rounds_of(p, [[8]], 16)) for p in (drafted(of), spoiled(drafted(of))))
    assert after > before, "these drafts should be wrong"


@pytest.mark.parametrize(
    ("of", "contrib"),
    [
        (plain, True),  # in standard ops: those of ngram-draft; windows: test_units
        *(pytest.param(*b, marks=pytest.mark.exhaustive) for b in ((plain, False), (images, True), (images, False))),
    ],
)
def test_whole_loop_in_one_call_and_in_chunks(of: Callable[[], Program], contrib: bool, tmp_path: Path) -> None:
    export_program(drafted(of), tmp_path / "model.onnx", contrib)
    assert run_loop.compare(tmp_path / "model.onnx", of())["status"] == "pass"


@pytest.mark.parametrize("of", [pytest.param(plain, marks=pytest.mark.exhaustive), unguided])
def test_onnxruntime_steps_with_drafts(of: Callable[[], Program]) -> None:
    made = aropt.optimize(of(), "onnxruntime", pipeline([ASKED]), instruments=Instruments(check=False), threads=1)
    assert made.report["verify"]["status"] == "pass"
    program = made.program
    assert any("cached_attention" in str(g.fx) for g in program.graphs.values()), "the model should fuse"
    assert loops(program.control, "speculate") and loops(program.control, "draft") and not multi_step.eligible(program)
    for prompt, n in (([8], 16), ([8], 1), ([8], 0), ([8, 1, 2, 3, 4], 12)):
        for options in ({}, {"temperature": 1.0, "seed": 3}):
            assert generate(made, [prompt], n, **options) == generate(of(), [prompt], n, **options)
    assert len(rounds_of(made, [[8]], 16)) < 16


def without_check(p: Program) -> Program:
    """Every draft counts."""
    return swap(
        p, aten.ne.Tensor, lambda a, b: torch.zeros_like(a != b) | (torch.arange(4) == 3), graph="verify_greedy"
    )


def one_more(p: Program) -> Program:
    """The first draft that is wrong counts too."""
    return swap(p, aten.argmin.default, lambda x, axis: (x.argmin(axis) + 1).clamp(max=3), graph="verify_greedy")


def deaf(p: Program) -> Program:
    """Stop tokens within a round end nothing."""
    return swap(p, aten.any.dim, lambda x, axis: torch.zeros_like(x.any(axis)), graph="verify_greedy")


def same_noise(p: Program) -> Program:
    """All rows of a round are drawn with the noise of the first."""
    noise = torch.ops.aropt.noise.default
    return swap(p, noise, lambda seed, s, at, n: torch.ops.aropt.noise(seed, s, at.amin().expand_as(at), n),
                graph="verify_sample")  # fmt: skip


@pytest.mark.parametrize("change", [without_check, one_more, same_noise])
def test_validation_catches(change: Callable[[Program], Program]) -> None:
    assert not validate(plain(), change(spoiled(with_probe(drafted()))), explain=False).passed


def test_a_stop_token_that_is_not_heard_shows() -> None:
    ids = generate(plain(), [[1, 2, 3]], 12)[0]
    stop = [next(i for i in ids[1:] if i != ids[0])]
    want = generate(plain(), [[1, 2, 3]], 12, stop=stop)
    assert generate(drafted(), [[1, 2, 3]], 12, stop=stop) == want
    assert generate(deaf(drafted()), [[1, 2, 3]], 12, stop=stop) != want


def test_a_step_after_wrong_drafts_reads_its_own_keys_and_values() -> None:
    """The rows of the caches after a generation with wrong drafts are those of one without."""
    found = [rounds_of(p, [[1, 2, 3]], 12)[-1] for p in (drafted(), spoiled(drafted()))]
    rows = 3 + 12 - 1
    caches = [n for n, s in drafted().state.items() if s.kind == "append-kv"]
    assert caches
    for name in caches:
        one, other = (values[name].narrow(drafted().state[name].axis or 0, 0, rows) for values in found)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_skips_what_it_is_not_for() -> None:
    cached = KvCache().run(plain())
    one = Int8Draft(least=1000)
    assert isinstance(planned(one, plain(), EAGER), Skips), "without a cache there is no step"
    assert isinstance(planned(one, one.run(cached), EAGER), Skips), "drafts are there already"
    later = ("fuse-sampler", "prune", "token-shuffle-fusion")
    guided = run_passes(images(), pipeline([ASKED], later), "onnxruntime", Instruments(check=False))[1]
    assert "two of it" in next(r.reason for r in guided if r.name == "int8-draft")
    few = planned(Int8Draft(), cached, EAGER)
    assert isinstance(few, Skips) and few.rejected and "eight bits" in few.reason
    other = planned(one, KvCache().run(make_program(1, ("repetition-penalty",))), EAGER)
    assert isinstance(other, Skips) and "seen" in other.reason
    for options, why in (({"drafts": 0}, "drafts=0"), ({"group": 48}, "group=48")):
        with pytest.raises(UsageError, match=why):
            Int8Draft(**options)
