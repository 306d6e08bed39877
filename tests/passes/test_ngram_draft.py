"""ngram-draft: the ids are the greedy ones whatever the drafts, in fewer rounds where the text repeats itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import aropt
from aropt.bench import timing as bench
from aropt.cli.sections import roofline
from aropt.errors import UsageError
from aropt.exporters.whole_loop import export_program
from aropt.ir.control import loops
from aropt.ir.program import Program
from aropt.loops import speculate
from aropt.passes.kv_cache import KvCache
from aropt.passes.ngram_draft import NgramDraft
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Skips, planned
from aropt.targets.ort import multi_step, run_loop
from aropt.validate.compare import validate, with_probe
from tests.conftest import CAPACITY, VOCAB, make_program, rounds_of
from tests.mutants.surgery import aten, swap
from tests.mutants.surgery import reference as rotary
from tests.support.run import generate
from tests.support.targets import EAGER

IDS = st.integers(0, VOCAB - 1)


@cache
def drafted() -> Program:
    """The tiny program with four drafts a round, fused."""
    return run_passes(make_program(), pipeline(["ngram-draft"]), "eager", Instruments(check=False))[0]


@cache
def plain() -> Program:
    return make_program()


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_ids_are_those_of_the_plain_loop(data: st.DataObject) -> None:
    prompt = data.draw(st.lists(IDS, min_size=1, max_size=CAPACITY), "prompt")
    n = data.draw(st.integers(0, CAPACITY - len(prompt) + 1), "n")
    stop = data.draw(st.lists(IDS, max_size=2), "stop")
    assert generate(drafted(), [prompt], n, stop=stop) == generate(plain(), [prompt], n, stop=stop)


def test_rounds_are_fewer_where_the_text_repeats_itself() -> None:
    prompt = [1, 2, 3, 4]
    ids = generate(plain(), [prompt], 12)[0]
    assert len(set(ids[-6:])) <= 2, "the tiny model should repeat itself, or this test shows nothing"
    assert len(rounds_of(drafted(), [prompt], 12)) <= 8
    assert len(rounds_of(plain(), [prompt], 12)) == 12


def test_several_sequences_and_draws_run_as_before() -> None:
    for prompts, options in (([[1, 2], [3, 4]], {}), ([[1], [3, 4]], {}), ([[1, 2]], {"temperature": 1.0})):
        seen = rounds_of(drafted(), prompts, 6, **options)
        assert len(seen) == 6 and not any("window" in values for values in seen)
        assert generate(drafted(), prompts, 6, **options) == generate(plain(), prompts, 6, **options)


def naive(text: list[int], count: int) -> list[int]:
    """What follows the place most like the text's end: its last id counts most, then that before it, then one more."""
    best, start = -1, 1
    for at in range(1, len(text)):
        alike = sum(w for w, i in ((4, 1), (2, 2), (1, 3)) if at >= i and text[at - i] == text[len(text) - i])
        if alike >= best:
            best, start = alike, at
    return [text[start + i % (len(text) - start)] for i in range(count)]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=16), IDS)
def test_the_draft_is_what_followed_before(prompt: list[int], first: int) -> None:
    found = recalled(drafts=4, capacity=32)(prompt, first)
    assert found["drafted"][0].tolist() == [first, *naive([*prompt, first], 4)]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_only_the_latest_ids_are_kept(prompt: list[int]) -> None:
    found = recalled(drafts=2, capacity=8)(prompt, 3)
    newest = [*prompt, 3][::-1][:8]
    assert found["history"][0].tolist() == newest + [-1] * (8 - len(newest))
    assert found["drafted"].min() >= 0, "a draft is an id, also where there is nothing to draft from"


@cache
def recalled(drafts: int, capacity: int) -> Callable[[list[int], int], dict[str, Tensor]]:
    """The graph `recall` on a prompt and the first new id."""
    found = speculate.from_text(speculate.Draft(drafts, VOCAB, dense=False), capacity)
    graph = next(g for g in found if g.name == "recall")
    size = int(graph.inputs["history"].dims[1])
    module = graph.bind({})

    def call(prompt: list[int], first: int) -> dict[str, Tensor]:
        values = {
            "prompt": torch.tensor([prompt]), "feed": torch.tensor([[first]]), "finished": torch.tensor(False),
            "limit": torch.tensor(9), "count": torch.tensor(1), "history": torch.full((1, size), -1),
        }  # fmt: skip
        return dict(zip(graph.outputs, module(*[values[n] for n in graph.inputs]), strict=True))

    return call


def test_the_roofline_is_of_the_program_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many rounds there were is known of that one alone."""
    monkeypatch.setattr(bench, "bandwidth", lambda size, threads: 10.0)
    timings = {v: bench.Timing(v, runs=[ms] * 3) for v, ms in (("aropt", 1.0), ("no-draft", 4.0))}
    for program, variant, ms in ((drafted(), "no-draft", 4.0), (plain(), "aropt", 1.0)):
        found = roofline(timings, program, 8, 2, 1)
        assert found is not None and found.variant == variant
        assert found.share == pytest.approx(found.bytes_per_step / 10e9 / (ms / 8 / 1e3))
    slower = roofline(timings, plain(), 8, 2, 1, rates=[40.0, 20.0, 5.0])
    assert found is not None and slower is not None and slower.share == pytest.approx(found.share / 2)
    assert roofline({"aropt": timings["aropt"]}, drafted(), 8, 2, 1) is None


@pytest.mark.parametrize("contrib", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_whole_loop_in_one_call_and_in_chunks(contrib: bool, tmp_path: Path) -> None:
    export_program(drafted(), tmp_path / "model.onnx", contrib)
    assert run_loop.compare(tmp_path / "model.onnx", plain())["status"] == "pass"


@pytest.mark.exhaustive  # test_int8_draft has one that is quick
def test_onnxruntime_steps_with_drafts() -> None:
    reference = rotary("fused")
    reference = reference.replace(meta={**reference.meta, "name": "fused"})
    made = aropt.optimize(reference, "onnxruntime", pipeline(["ngram-draft:drafts=1"]), check=False,
                             instruments=Instruments(check=False))  # fmt: skip
    program = made.program
    assert any("cached_attention" in str(g.fx) for g in program.graphs.values()), "the model should fuse"
    assert loops(program.control, "speculate") and not multi_step.eligible(program)
    for prompt, n in (([1, 2, 3], 30), ([4], 1), ([4], 0), ([2] * 9, 12)):
        assert generate(made, [prompt], n) == generate(reference, [prompt], n)
    assert len(rounds_of(made, [[1, 2, 3]], 30)) < 30


def without_check(p: Program) -> Program:
    """Every draft counts."""
    return swap(p, aten.ne.Tensor, lambda a, b: torch.arange(5).expand(b.shape) == 4,
                lambda node: node.args[0].target is aten.cat.default, "verify_greedy")  # fmt: skip


def one_more(p: Program) -> Program:
    """The first draft that is wrong counts too."""
    return swap(p, aten.argmin.default, lambda x, axis: (x.argmin(axis) + 1).clamp(max=4), graph="verify_greedy")


def deaf(p: Program) -> Program:
    """Stop tokens within a round end nothing."""
    return swap(p, aten.any.dim, lambda x, axis: torch.zeros_like(x.any(axis)), graph="verify_greedy")


@pytest.mark.parametrize("change", [without_check, one_more, deaf])
def test_validation_catches(change: Callable[[Program], Program]) -> None:
    assert not validate(plain(), change(with_probe(drafted())), explain=False).passed


def test_validation_passes_whatever_is_drafted() -> None:
    poor = swap(with_probe(drafted()), aten.argmax.default, lambda x, *a: x.argmax(*a) * 0,
                lambda node: len(node.args) == 3, "verify_greedy")  # fmt: skip
    assert validate(plain(), poor).passed


def test_skips_what_it_is_not_for() -> None:
    cached = KvCache().run(plain())
    one = NgramDraft()
    assert isinstance(planned(one, plain(), EAGER), Skips), "without a cache there is no step"
    assert isinstance(planned(one, one.run(cached), EAGER), Skips), "drafts are there already"
    assert isinstance(planned(one, KvCache().run(make_program(1, ("repetition-penalty",))), EAGER), Skips)
    assert isinstance(planned(one, cached.replace(meta={**cached.meta, "unit": 4}), EAGER), Skips), (
        "rows of several ids"
    )
    with pytest.raises(UsageError, match="drafts=0"):
        NgramDraft(drafts=0).plan(cached, EAGER)
