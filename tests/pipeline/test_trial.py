"""A pass that pays for some texts is kept where it pays for the model's own prompts; nothing is timed here."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aropt
from aropt.errors import UsageError
from aropt.frontend.examples import prompts
from aropt.ir.control import loops
from aropt.ir.executor import Executor
from aropt.ir.program import Program
from aropt.passes.int8_draft import Int8Draft
from aropt.passes.ngram_draft import NgramDraft
from aropt.passes.tree_draft import TreeDraft
from aropt.pipeline import api
from aropt.pipeline import autotune as trial
from aropt.pipeline.checks import Instruments
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.registry import names, pipeline, untold
from aropt.targets import lower
from aropt.targets.ort.executor import OnnxRuntime
from tests.conftest import make_program
from tests.support import draft_models
from tests.support.run import generate

LATER = ["fuse-rules", "fuse-sampler", "prune"]  # passes that a trial is not about
REPEATING = [[3, 5, 7, 3, 5, 7, 3], [2, 2, 2]]


def texts(**meta: Any) -> Program:
    program = make_program()
    return program.replace(meta={**program.meta, "modality": "text", "prompts": REPEATING, **meta})


def told(monkeypatch: pytest.MonkeyPatch, without: float, with_it: float) -> list[dict[str, Compiled]]:
    """Puts milliseconds in the clock's place. Returns what will have been timed."""
    seen: list[dict[str, Compiled]] = []

    def timed(ways: dict[str, Compiled], prompts: list[list[int]], n: int, drawn: bool) -> dict[str, float]:
        seen.append(ways)
        options = {"temperature": 1.0} if drawn else {}
        want = generate(ways["without"], prompts[:1], n, **options)
        assert all(generate(program, prompts[:1], n, **options) == want for program in ways.values())
        # of several ways the last is the fastest
        return {way: without if way == "without" else with_it + len(ways) - i for i, way in enumerate(ways, 2)}

    monkeypatch.setattr(trial, "timed", timed)
    return seen


@pytest.mark.parametrize(("with_it", "kept"), [(50.0, True), (95.0, False), (130.0, False)])
@pytest.mark.exhaustive
def test_what_is_faster_is_kept_and_validated(monkeypatch: pytest.MonkeyPatch, with_it: float, kept: bool) -> None:
    seen = told(monkeypatch, 100.0, with_it)
    program = texts()
    made = api.optimize(program, "onnxruntime", pipeline(), measure=True, tries=untold(), threads=1)
    entry = next(p for p in made.report["passes"] if p["name"] == "ngram-draft")
    assert entry["status"] == ("applied" if kept else "skipped")
    assert bool(loops(made.program.control, "speculate")) == kept
    assert any(e.name == "ngram-draft" for e in made.program.ledger) == kept
    words = [entry["reason"], *made.report["notes"]]
    assert any(f"{100 / with_it:.2f} times as fast" in text and "--prompts" in text for text in words)
    assert list(seen[0]) == ["ngram-draft", "without"], "int8-draft is for large weights"
    assert [bool(loops(p.program.control, "speculate")) for p in seen[0].values()] == [True, False]
    assert made.report["verify"]["status"] == "pass"
    assert generate(made, REPEATING, 6) == generate(program, REPEATING, 6)


def test_ways_to_call_are_timed_of_what_is_not_validated_too(monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[Program] = []
    monkeypatch.setattr(Executor, "tuned", lambda self, program, say: (self, timed.append(program) or {}))
    monkeypatch.setattr(OnnxRuntime, "tuned", Executor.tuned)
    made = api.optimize(texts(), "onnxruntime", pipeline(), check=False, measure=True, threads=1)
    assert len(timed) == 1 and made.report["verify"]["status"] == "fail"


UNFIT = [
    ({"modality": "image"}, "onnxruntime", "an image"),
    ({"prompts": [[1], [2]]}, "onnxruntime", "two ids"),
    ({}, "eager", "target eager"),
    ({"loop": "unmask"}, "onnxruntime", "over positions"),
]


@pytest.mark.parametrize(("meta", "target", "why"), UNFIT)
def test_nothing_is_lowered_where_nothing_can_be_learned(
    monkeypatch: pytest.MonkeyPatch, meta: dict[str, Any], target: str, why: str
) -> None:
    monkeypatch.setattr(trial, "lowered", None)
    passes, found = trial.trial(texts(**meta), pipeline(), [NgramDraft()], target)
    assert passes == pipeline() and not found.kept and why in found.told()


def test_a_pass_that_does_not_apply_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "lowered", None)
    passes, found = trial.trial(texts(), pipeline(dropped=["kv-cache"]), [NgramDraft()], "onnxruntime")
    assert NgramDraft() not in passes and "no cached step" in found.told()


def test_with_a_lossy_pass_nothing_is_measured_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = told(monkeypatch, 100.0, 50.0)
    monkeypatch.setattr("aropt.validate.drift.measure", None)
    lossy = ["int8-linears:least=1"]
    budget = Instruments(budget={"kl": 1.0})
    passes, found = trial.trial(wide(), pipeline(lossy, LATER), [NgramDraft()], "onnxruntime", 1, budget)
    assert found.kept and NgramDraft() in passes
    assert all(any("int8" in n for n in p.program.weights) for p in seen[0].values())


def test_a_budget_is_missed_before_anything_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "lowered", None)
    with pytest.raises(UsageError, match="lossy") as caught:
        trial.trial(wide(), pipeline(["int8-linears:least=1"]), [NgramDraft()], "onnxruntime")
    assert "weights of eight bits" in str(caught.value) and "--budget" in str(caught.value)


@cache
def wide() -> Program:
    """A model with features enough for groups."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(9, 32), Attention(), nn.Linear(32, 9)).eval()
    return aropt.capture(module, capacity=16, vocab=9, prompts=REPEATING, modality="text", name="wide")


class Attention(nn.Module):
    """Causal, of one head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1)


def large(**meta: Any) -> Program:
    """A program that is said to be large."""
    program = wide()
    return program.replace(meta={**program.meta, **meta})


@pytest.mark.parametrize("modality", ["text", pytest.param("image", marks=pytest.mark.exhaustive)])
def test_the_best_of_several_ways_is_kept(monkeypatch: pytest.MonkeyPatch, modality: str) -> None:
    """Images are drawn, and only the half of the program that draws is lowered."""
    seen = told(monkeypatch, 100.0, 50.0)
    monkeypatch.setattr(trial, "LARGE", 0)
    ways = [Int8Draft(drafts=2, least=1), Int8Draft(drafts=3, least=1)]
    passes, found = trial.trial(large(modality=modality), pipeline(dropped=LATER), ways, "onnxruntime", 1)
    assert list(seen[0]) == ["int8-draft:drafts=2,least=1", "int8-draft:drafts=3,least=1", "without"]
    assert ways[1] in passes and ways[0] not in passes and found.kept == "int8-draft:drafts=3,least=1"
    assert "int8-draft:drafts=3,least=1 was kept: a round gives " in found.told()
    assert found.ids["without"] == 1 < found.ids["int8-draft:drafts=3,least=1"] <= 4
    rules = {n for p in seen[0].values() for g in p.program.graphs for n in ("greedy", "sample") if n in g}
    assert rules == {"sample" if modality == "image" else "greedy"}


def test_each_way_is_lowered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nothing was added to is the same program in both trials."""
    seen, made = told(monkeypatch, 100.0, 95.0), list[Program]()

    def counted(program: Program, *given: Any, **options: Any) -> Any:
        made.append(program)
        return lower(program, *given, **options)

    monkeypatch.setattr(trial, "lower", counted)
    monkeypatch.setattr(trial, "LARGE", 0)
    tries = [[Int8Draft(drafts=2, least=1), Int8Draft(drafts=3, least=1)], [NgramDraft()]]
    few = pipeline(dropped=LATER)
    passes, found = trial.tried(large(), few, tries, "onnxruntime", 1)
    assert passes == few and [t.kept for t in found] == ["", ""] and len(seen) == 2
    assert seen[0]["without"] is seen[1]["without"]
    assert len(made) == 4 == len({id(p) for ways in seen for p in ways.values()})


@pytest.mark.parametrize(("there", "one"), [(Int8Draft(), NgramDraft()), (NgramDraft(), Int8Draft())])
def test_drafts_that_are_there_or_asked_for_stay(monkeypatch: pytest.MonkeyPatch, there: Any, one: Any) -> None:
    monkeypatch.setattr(trial, "lowered", None)
    monkeypatch.setattr(trial, "LARGE", 0)
    passes, found = trial.trial(large(), [*pipeline(), there], [one], "onnxruntime")
    assert passes == [*pipeline(), there] and f"{there.name} makes drafts already" in found.told()


def test_one_way_drafts_from_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first that applies: on recurrent state that is a chain of tree-draft's, elsewhere ngram-draft."""
    text = [NgramDraft(), TreeDraft(draft="text")]
    for program, kept in ((texts(), "ngram-draft"), (recurrent(), "tree-draft:draft=text")):
        seen = told(monkeypatch, 100.0, 50.0)
        passes, found = trial.trial(program, pipeline(), text, "onnxruntime", 1)
        assert list(seen[0]) == [kept, "without"] and found.kept == kept and found.name == kept.partition(":")[0]
        assert found.name in [p.name for p in passes]


def recurrent() -> Program:
    """A model with recurrent state."""
    return aropt.capture(draft_models.mamba2(), capacity=24, prompts=REPEATING, modality="text", name="mamba2")


def test_small_weights_need_no_drafts_of_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "lowered", None)
    passes, found = trial.trial(large(), pipeline(), [Int8Draft()], "onnxruntime")
    assert passes == pipeline() and "0 MiB, which takes next to no time to read" in found.told()


def test_what_the_caller_decides_is_not_tried() -> None:
    """Drafts come from one of them, so they are ways of one trial."""
    (ways,) = untold()
    assert (
        list(dict.fromkeys(one.name for one in ways)) == names("tried") == ["int8-draft", "ngram-draft", "tree-draft"]
    )
    assert not untold(chosen=["ngram-draft:drafts=2"], dropped=["int8-draft", "tree-draft"])
    (more,) = untold(dropped=["int8-draft", "tree-draft"], more=[TreeDraft(draft="text-ar-draft")])
    assert [one.name for one in more] == ["tree-draft", "ngram-draft"]
    assert not {p.name for p in pipeline()} & set(names("tried"))


def test_turns_alternate_and_the_first_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name, self.program = name, texts()

        def generate(self, prompts: list[list[int]], n: int, **options: float) -> None:
            order.append(self.name)
            assert options == {"temperature": 1.0, "plain": True}

    clock = iter(range(10_000))
    monkeypatch.setattr(trial.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(trial.time, "sleep", lambda _: None)
    ways: Any = {"with": Fake("with"), "without": Fake("without")}
    assert trial.timed(ways, REPEATING, 3, True) == {"with": 1000.0, "without": 1000.0}
    assert order[:4] == ["with", "with", "without", "without"] and order.count("with") == order.count("without") >= 4


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"ab"\n\n[1, 2]\n')
    assert prompts(path, lambda text: [ord(c) for c in text]) == [[97, 98], [1, 2]]
    for line, why in (("ab", "no JSON"), ("[]", "empty"), ("[1.5]", "list of ids"), ('{"a": 1}', "list of ids")):
        path.write_text(line)
        with pytest.raises(UsageError, match="can't be used") as caught:
            prompts(path, None)
        assert why in str(caught.value) and "line 1" in str(caught.value)
    path.write_text('"ab"')
    with pytest.raises(UsageError, match="no tokenizer"):
        prompts(path, None)
    path.write_text("\n")
    with pytest.raises(UsageError, match="there are no prompts"):
        prompts(path, None)
    with pytest.raises(UsageError, match="can't be read"):
        prompts(tmp_path / "missing", None)
