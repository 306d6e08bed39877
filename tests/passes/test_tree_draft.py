"""tree-draft: whatever is drafted, on whatever state, the ids are those of the plain loop."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aropt
from aropt.cli.asked import check as asked
from aropt.cli.drafts import with_draft
from aropt.cli.optimize import inputs
from aropt.cli.options import Doing, Reading, Writing
from aropt.errors import AroptError, Unsupported, UsageError
from aropt.ir.program import Program, StateSpec
from aropt.loops.draft_model import check
from aropt.loops.trees import Shape
from aropt.models import REFERENCES
from aropt.pipeline.registry import make, pipeline
from aropt.rewriting.tree import forms
from aropt.validate.compare import validate, with_probe
from tests.support import draft_models
from tests.support.draft_models import CAPACITY, VOCAB

pytest.importorskip("transformers", reason="needs aropt[hf]")
FILE = Path(draft_models.__file__)
PROMPTS = [[5, 6, 7, 5, 6, 7], [9], [3, 3, 3, 3, 8, 11, 30]]
NEW = 17


def named(factory: str) -> str:
    return f"{FILE}:{factory}"


@cache
def captured(model: str) -> Program:
    return aropt.capture(getattr(draft_models, model)(), capacity=CAPACITY)


@cache
def drafted(model: str, draft: str, shape: str, after: tuple[str, ...] = ()) -> Program:
    """The model's program with a tree of drafts; nothing is lowered."""
    program = captured(model)
    options = {"draft": named(draft) if hasattr(draft_models, draft) else draft, "shape": shape}
    for one in (make("canonicalize"), make("kv-cache"), make("tree-draft", options), *map(make, after)):
        program = one.run(program)
    return program


def rounds(program: Program, prompt: list[int], n: int, **params: Any) -> tuple[list[list[int]], int]:
    """The ids, and how many rounds gave them."""
    count = [0]

    def seen(_: Any) -> None:
        count[0] += 1

    return aropt.generate(program, [prompt], n, on_round=seen, plain=True, **params), count[0]


WAYS = [
    ("llama", "text", "chain:3"),
    ("llama", "nearly", "2x2x1"),
    ("llama", "mamba2", "3x1"),
    ("mamba2", "text", "chain:4"),
    ("hybrid", "self", "2x2"),
    ("hybrid", "llama", "0-0-1-1-2"),
    ("mamba2", "hybrid", "chain:2"),
    ("mamba2", "jacobi", "chain:3"),
    ("llama", "nearly", "grown:3x2:4"),
    ("hybrid", "self", "grown:3x3:5"),
    ("mamba2", "llama", "grown:4x2:5"),
]


SLOW = pytest.mark.exhaustive
QUICK = (WAYS[1], WAYS[8])


@pytest.mark.parametrize(
    ("model", "draft", "shape"), [pytest.param(*way, marks=() if way in QUICK else SLOW) for way in WAYS]
)
def test_ids_are_those_of_the_plain_loop(model: str, draft: str, shape: str) -> None:
    """Alone and in a ragged batch, greedy and drawn, up to a stop id and up to the capacity."""
    plain, fast = captured(model), drafted(model, draft, shape)
    for prompts in ([PROMPTS[0]], PROMPTS):
        for params in ({}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "top_k": 9, "stop": [7, 20, 33]}):
            want = aropt.generate(plain, prompts, NEW, plain=True, **params)
            assert aropt.generate(fast, prompts, NEW, plain=True, **params) == want
    full = [[4] * (CAPACITY - 5)]
    assert aropt.generate(fast, full, 6, plain=True) == aropt.generate(plain, full, 6, plain=True)


def test_drafts_beyond_the_capacity_are_seen_by_nothing() -> None:
    """Where the newest id stands at the last position, its row is that of the plain loop: no draft after it counts."""
    assert validate(captured("llama"), with_probe(drafted("llama", "text", "chain:3")), explain=False).passed


ALIKE = [
    ("llama", "2x1x1"),
    pytest.param("hybrid", "chain:2", marks=SLOW),
    pytest.param("llama", "chain:3", marks=SLOW),
]


@pytest.mark.parametrize(("model", "shape"), ALIKE)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}])
def test_a_drafter_that_is_always_right(model: str, shape: str, params: dict[str, Any]) -> None:
    """The prompt's round gives an id, each other one a path of the tree and the id after it."""
    fast, deepest = drafted(model, model, shape), Shape.parse(shape).deepest
    for n in (1, 2, 9, NEW):
        ids, count = rounds(fast, PROMPTS[2], n, **params)
        assert len(ids[0]) == n and count == 1 + math.ceil((n - 1) / (deepest + 1))


def test_a_drafter_that_is_always_wrong_costs_no_id() -> None:
    """Each round gives the id that it would give without drafts, and nothing else."""
    ids, count = rounds(drafted("llama", "opposite", "chain:2"), PROMPTS[0], NEW)
    assert ids == aropt.generate(captured("llama"), [PROMPTS[0]], NEW, plain=True) and count == NEW


@pytest.mark.parametrize(
    ("model", "draft", "shape"), [WAYS[4], pytest.param(*WAYS[1], marks=SLOW), pytest.param(*WAYS[10], marks=SLOW)]
)
def test_it_is_validated_after_fusion(model: str, draft: str, shape: str) -> None:
    """One graph a round, and its rows are compared with the reference's."""
    fast = with_probe(drafted(model, draft, shape, ("fuse-sampler", "prune")))
    verdict = validate(captured(model), fast)
    assert verdict.passed and len(verdict.outcomes) > 20


@SLOW
@pytest.mark.parametrize("target", ["onnxruntime"])
@pytest.mark.parametrize(("model", "draft", "shape"), WAYS)
def test_targets(model: str, draft: str, shape: str, target: str) -> None:
    options = {"draft": named(draft) if hasattr(draft_models, draft) else draft, "shape": shape}
    passes = [make("canonicalize"), make("kv-cache"), make("tree-draft", options), make("fuse-sampler"), make("prune")]
    made = aropt.optimize(captured(model), target=target, passes=passes, threads=1)
    assert made.report["verify"]["status"] == "pass"
    want = aropt.generate(captured(model), PROMPTS, NEW, plain=True)
    assert made.generate(PROMPTS, NEW, plain=True) == want


@SLOW
@pytest.mark.parametrize("way", [WAYS[i] for i in (0, 3, 5, 7, 9)])
def test_the_whole_loop_is_one_onnx_file(way: tuple[str, str, str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    fast = drafted(*way, ("fuse-sampler", "prune"))
    export_program(fast, tmp_path / "loop.onnx")
    assert run_loop.compare(tmp_path / "loop.onnx", fast)["status"] == "pass"


def test_eight_ragged_sequences_are_each_alone() -> None:
    """Sequences that accept different lengths do not disturb each other, nor does one that ends early."""
    fast, prompts = drafted("hybrid", "llama", "0-0-1-1-2"), [[3 + i] * (1 + i % 5) for i in range(8)]
    stop = [aropt.generate(fast, prompts[:1], NEW, plain=True)[0][4]]
    together = aropt.generate(fast, prompts, NEW, plain=True, stop=stop)
    assert together == [aropt.generate(fast, [p], NEW, plain=True, stop=stop)[0] for p in prompts]
    assert len({len(ids) for ids in together}) > 1


def test_what_is_kept_aside_is_a_fiftieth_of_states() -> None:
    """Of heads 128 of 64 on states of 128 (Nemotron-H's), for each node of a tree."""
    config = {"num_heads": 128, "head_dim": 64, "state_size": 128, "n_groups": 8, "expand": 256, "chunk_size": 16}
    program = aropt.capture(draft_models.made("Mamba2", 0, **config), capacity=8)
    program = make("kv-cache").run(program)
    (step,) = [g for g in program.graphs.values() if g.role == "forward"]
    both = forms(step, dict(program.weights))
    sizes = {"B": 1, "R": 1}
    aside = sum(StateSpec("", s).nbytes(sizes) for n, s in both.tree.outputs.items() if n != "logits")
    states = sum(s.nbytes(sizes) for s in program.state.values() if s.kind == "recurrent")
    assert states >= 50 * aside > 0


def changed(program: Program, name: str, weight: str, value: torch.Tensor) -> Program:
    key = f"tree.{weight}" if name == "tree" else f"trees.{name}.{weight}"
    return program.replace(weights={**program.weights, key: value})


EVERY = torch.ones(7, 7, dtype=torch.bool).tril()
SLIPS = [
    ("tree", "pairs", EVERY[None]),
    pytest.param("spread", "depth", torch.tensor([0, 1, 1, 1, 2, 2, 2]), marks=SLOW),
    pytest.param("accept", "parents", torch.tensor([-1, 0, 0, 2, 2, 1, 1]), marks=SLOW),
]


@pytest.mark.parametrize(("name", "weight", "value"), SLIPS)
def test_slips_are_caught(name: str, weight: str, value: torch.Tensor) -> None:
    """Nodes that see their siblings; a depth that is off; a parent that is another one."""
    wrong = changed(drafted("hybrid", "hybrid", "2x2"), name, weight, value)
    assert not validate(captured("hybrid"), with_probe(wrong), explain=False).passed


@given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.randoms())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_shapes(numbers: list[int], random: Any) -> None:
    """Parents, pairs, depth and the order of drafts agree."""
    parents = [-1]
    for number in sorted(min(n, i) for i, n in enumerate(numbers)):
        parents.append(number)
    try:
        shape = Shape(tuple(parents))
    except UsageError:  # not level by level
        depth = [0]
        for parent in parents[1:]:
            depth.append(depth[parent] + 1)
        assert depth != sorted(depth)
        return
    above = {node: {node} for node in range(shape.nodes)}
    for node, parent in enumerate(parents[1:], 1):
        above[node] |= above[parent]
    assert all(set(shape.pairs[n].nonzero().flatten().tolist()) == above[n] for n in range(shape.nodes))
    assert all(len(above[n]) == shape.depth[n] + 1 for n in range(shape.nodes))
    for depth in range(shape.deepest):
        most, places = shape.drafted(depth)
        level = shape.level(depth)
        for node, place in zip(shape.level(depth + 1), places, strict=True):
            assert level[place // most] == parents[node]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("chain:0", "drafts"), ("chain:64", "64 drafts"), ("1-0", "does not come before it"), ("0-1-0", "less deep"),
        ("9x9", "more than"), ("0", "no drafts"), ("tree", "is no tree"), ("-1-0", "is no tree"),
    ],
)  # fmt: skip
def test_trees_that_are_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        make("tree-draft", {"shape": text})
    assert "chain:4" in str(caught.value.hint)


def test_drafts_that_can_not_be() -> None:
    with pytest.raises(UsageError, match="drafts chains"):
        make("tree-draft", {"draft": "text", "shape": "2x2"})
    with pytest.raises(UsageError, match="63 ids"):
        drafted("llama", "other", "chain:2")
    repeated = aropt.capture(draft_models.llama(), capacity=CAPACITY, rules=["repetition-penalty"])
    made = aropt.optimize(repeated, "eager", [make("kv-cache"), make("tree-draft")], check=False)
    assert [(p["name"], p["status"]) for p in made.report["passes"]][-1] == ("tree-draft", "skipped")


def test_errors_name_the_draft_model() -> None:
    with pytest.raises(UsageError, match=r"the draft model .*short: .*48") as caught:
        drafted("llama", "short", "chain:2")
    assert "--capacity 20" in caught.value.hint
    with pytest.raises(Unsupported, match=r"the draft model .*sees_all: .*bidirectional") as refused:
        drafted("llama", "sees_all", "chain:2")
    assert "--loop" not in refused.value.hint


def test_a_draft_model_reads_all_ids_of_the_model_and_one_a_row() -> None:
    """Class ids that a prompt holds are ids of no smaller embedding; windows are no ids."""
    wide: Any = {"vocab": VOCAB, "input_vocab": VOCAB + 9, "capacity": CAPACITY}
    with pytest.raises(UsageError, match="it reads ids up to 60, and the model up to 69"):
        check(named("llama"), wide)
    images: Any = {"vocab": REFERENCES["digits-ar"].vocab, "capacity": 16}
    with pytest.raises(UsageError, match="several ids"):
        check("digits-shuffle2", images)


def test_no_result_is_written_over_the_draft_model(tmp_path: Path) -> None:
    (tmp_path / "drafts").mkdir()
    named = str(tmp_path / "drafts")
    for do in (Doing(draft=named), Doing(passes=[f"tree-draft:accept=rejection,draft={named}"])):
        assert tmp_path / "drafts" in inputs(Reading("text-ar"), do, Writing(tmp_path))


def test_a_draft_model_of_the_pass_is_looked_for_before_any_work(tmp_path: Path) -> None:
    """The command's draft is that of the pass that has its other options."""
    for text in ("tree-draft:draft=nonesuch", "tree-draft:draft=model.gguf"):
        with pytest.raises(AroptError, match=text.partition("=")[2]):
            asked(Reading("text-ar"), Doing(passes=[text]), Writing(tmp_path))
    asked(Reading("text-ar"), Doing(passes=["tree-draft:draft=text"]), Writing(tmp_path))
    told = with_draft(pipeline(["tree-draft:accept=rejection,shape=2x1"]), "text-ar-draft", False)
    assert make("tree-draft", {"draft": "text-ar-draft", "shape": "2x1", "accept": "rejection"}) in told
    with pytest.raises(UsageError, match="two draft models"):
        with_draft(pipeline(["tree-draft:draft=text"]), "text-ar-draft", False)
    with pytest.raises(UsageError, match="is left out"):
        asked(Reading("text-ar"), Doing(draft="text-ar-draft", no_pass=["tree-draft"]), Writing(tmp_path))
