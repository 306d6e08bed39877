"""tree-draft:draft=masks: rows of masks in the call that checks the drafts before them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.loops.own_masks import pairs, places
from aropt.models.canvas import CanvasLM
from aropt.pipeline.registry import make
from aropt.recipes.tidar import TiDAR, plain_loop
from aropt.rewriting.tree import Nodes, NoTree, forms
from aropt.validate.compare import validate, with_probe
from tests.support import draft_models
from tests.support.sweep import build

CAPACITY, NEW, NODES = 48, 17, 3
PROMPTS = [[5, 6, 7, 5, 6, 7], [9], [3, 3, 3, 3, 8, 11, 30]]
SLOW = pytest.mark.exhaustive


class Small(TiDAR):
    """Random weights, large enough that what a mask sees changes what it predicts.

    Ids repeat after a while, so that some drafts are right: a row is nearly a function of its position.
    """

    capacity = CAPACITY

    def __init__(self) -> None:
        CanvasLM.__init__(self, width=32, layers=2, heads=2, hidden=32)


@cache
def model() -> Small:
    torch.manual_seed(0)
    made = Small().eval().requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            parameter.mul_(6)
    made.head.weight[8:] = 0  # few ids, so that a guess is right by chance
    return made


@cache
def captured() -> Program:
    return aropt.capture(model(), capacity=CAPACITY)


@cache
def drafted(nodes: int = NODES, after: tuple[str, ...] = ()) -> Program:
    program, options = captured(), {"draft": "masks", "shape": f"chain:{nodes - 1}"}
    for one in (make("canonicalize"), make("kv-cache"), make("tree-draft", options), *map(make, after)):
        program = one.run(program)
    return program


def rounds(program: Program, prompt: list[int], n: int) -> tuple[list[int], int]:
    seen: list[int] = []
    ids = aropt.generate(program, [prompt], n, plain=True, on_round=lambda _: seen.append(1))[0]
    return ids, len(seen)


@pytest.mark.parametrize("prompts", [[PROMPTS[0]], PROMPTS])
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.8, "stop": [2, 5]}])
def test_ids_are_those_of_the_plain_loop(prompts: list[list[int]], params: dict[str, Any]) -> None:
    want = aropt.generate(captured(), prompts, NEW, plain=True, **params)
    assert aropt.generate(drafted(), prompts, NEW, plain=True, **params) == want


def test_up_to_the_capacity() -> None:
    full = [[4] * (CAPACITY - 5)]
    assert aropt.generate(drafted(), full, 6, plain=True) == aropt.generate(captured(), full, 6, plain=True)


@pytest.mark.parametrize("nodes", [pytest.param(2, marks=SLOW), 3, pytest.param(6, marks=SLOW)])
def test_rounds_are_those_of_the_loop_without_a_cache(nodes: int) -> None:
    """Drafts never change an id: that masks see what they should shows in how many rounds the ids take."""
    found = [(rounds(drafted(nodes), p, 30), plain_loop(model(), p, 30, nodes)) for p in PROMPTS]
    assert all(mine == theirs for mine, theirs in found)
    assert any(count < 30 for (_, count), _ in found), "no draft was right, so that nothing is compared"


@given(st.integers(2, 9))
@settings(max_examples=8, deadline=None, derandomize=True)
def test_what_a_row_sees(nodes: int) -> None:
    """A node sees those before it; a mask its group, and the nodes that the group follows."""
    seen, at = pairs(nodes), torch.cat([torch.arange(nodes), places(nodes)]).tolist()
    for row in range(nodes * (nodes + 1)):
        group = row // nodes - 1
        last = row if group < 0 else group
        own = [] if group < 0 else list(range((group + 1) * nodes, (group + 2) * nodes))
        assert seen[row].nonzero().flatten().tolist() == [*range(last + 1), *own]
        assert group < 0 or [at[i] for i in own] == [group + 1 + i for i in range(nodes)]


def changed(program: Program, name: str, value: Tensor) -> Program:
    return program.replace(weights={**program.weights, name: value})


def test_slips_are_seen() -> None:
    """Nodes that see masks give other ids; masks that don't see ahead, other rounds."""
    every = torch.ones_like(pairs(NODES))
    wrong = changed(drafted(), "tree.pairs", every[None])
    assert not validate(captured(), with_probe(wrong), explain=False).passed
    blind = pairs(NODES) & (every.tril() | (torch.arange(len(every)) < NODES))
    counts = [[rounds(p, prompt, 40)[1] for prompt in PROMPTS] for p in
              (drafted(), changed(drafted(), "tree.pairs", blind[None]))]  # fmt: skip
    assert counts[0] != counts[1]


def test_it_is_validated_after_fusion() -> None:
    verdict = validate(captured(), with_probe(drafted(after=("fuse-sampler", "prune"))))
    assert verdict.passed and len(verdict.outcomes) > 20


@SLOW
def test_targets_and_the_whole_loop(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    options = {"draft": "masks", "shape": "chain:2"}
    passes = [make("canonicalize"), make("kv-cache"), make("tree-draft", options), make("fuse-sampler"), make("prune")]
    made = aropt.optimize(captured(), target="onnxruntime", passes=passes, threads=1)
    assert made.report["verify"]["status"] == "pass"
    assert made.generate(PROMPTS, NEW, plain=True) == aropt.generate(captured(), PROMPTS, NEW, plain=True)
    export_program(drafted(after=("fuse-sampler", "prune")), tmp_path / "loop.onnx")
    assert run_loop.compare(tmp_path / "loop.onnx", drafted(after=("fuse-sampler", "prune")))["status"] == "pass"


def test_who_can_not_draft_so() -> None:
    with pytest.raises(UsageError, match="masks drafts chains"):
        make("tree-draft", {"draft": "masks", "shape": "2x1"})
    plain = aropt.capture(draft_models.llama(), capacity=24)
    made = aropt.optimize(plain, "eager", [make("kv-cache"), make("tree-draft", {"draft": "masks"})], check=False)
    (*_, last) = made.report["passes"]
    assert last["status"] == "skipped" and "draft_mask" in last["reason"]
    recurrent = make("kv-cache").run(aropt.capture(build("lfm2"), capacity=24))
    (step,) = recurrent.of_role("forward")
    with pytest.raises(NoTree, match="see later ones"):
        forms(step, dict(recurrent.weights), Nodes(ahead=True))
