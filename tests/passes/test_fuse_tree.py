"""fuse-tree: one op for an attention of a tree's nodes over a cache; where it does not fire; what validation says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import aropt
from aropt.ir.edit import copied
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.passes.fuse_tree import FuseTree
from aropt.pipeline.registry import make
from aropt.rewriting.attention import NotThis, matches
from aropt.rewriting.contract import Applies, Skips
from aropt.targets import lower
from aropt.validate.compare import cases, validate, with_probe
from tests.support.targets import EAGER, ORT

SDPA, OURS = "aten.scaled_dot_product_attention.default", "aropt.tree_attention.default"


@cache
def plain() -> Program:
    return aropt.capture("text-ar", capacity=64)


@cache
def stepping(draft: str = "self", shape: str = "2x1") -> Program:
    """The model with keys and values, and a tree of drafts."""
    program = plain()
    for one in (make("canonicalize"), make("kv-cache"), make("merge-linears")):
        program = one.run(program)
    return make("tree-draft", {"draft": draft, "shape": shape}).run(program)


def targets(program: Program, graph: str) -> list[str]:
    return [str(n.target) for n in program.graphs[graph].fx.nodes if n.op == "call_function"]


def test_it_is_one_op_and_computes_the_same() -> None:
    """In the tree's step and in the sketches that draft for it; the step of prompts stays."""
    step = stepping()
    plan = FuseTree().plan(step, ORT)
    assert isinstance(plan, Applies)
    assert plan.matches == ("tree: 4 attentions", "sketch_0: 4 attentions", "sketch_1: 4 attentions")
    fast = FuseTree().run(step)
    verify(fast)
    for graph in ("tree", "sketch_0", "sketch_1"):
        assert targets(fast, graph).count(OURS) == 4 and SDPA not in targets(fast, graph)
        assert "aten.neg.default" not in targets(fast, graph), "it rotates"
    assert targets(fast, "step") == targets(step, "step")
    assert fast.graphs["tree"].outputs == step.graphs["tree"].outputs
    assert len([w for w in fast.weights if w.startswith("rotary.")]) == 2, "graphs share their tables"
    assert validate(plain(), with_probe(fast), chosen=cases(plain(), quick=True), explain=False).passed
    again = FuseTree().plan(fast, ORT)
    assert isinstance(again, Skips) and "no step" in again.reason


def test_it_is_lowered_to_ort_operators() -> None:
    """For one sequence in GroupQueryAttention, for several in standard operators: ids are those of the plain loop."""
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    fast = FuseTree().run(stepping())
    built = lower(fast, "onnxruntime")
    prompts = [[72, 105], [33, 44, 55, 66], [9]]
    for asked in ([prompts[0]], prompts):
        assert aropt.generate(fast, asked, 12, executor=built) == aropt.generate(plain(), asked, 12, plain=True)


@pytest.mark.exhaustive
@pytest.mark.parametrize("contrib", [False, True])
def test_the_whole_loop_is_one_onnx_file(contrib: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    fast = FuseTree().run(stepping())
    for name in ("fuse-sampler", "prune"):
        fast = make(name).run(fast)
    export_program(fast, tmp_path / "loop.onnx", contrib=contrib)
    assert run_loop.compare(tmp_path / "loop.onnx", fast)["status"] == "pass"


@pytest.mark.parametrize(("program", "why"), [(plain, "no step for the nodes"), (stepping, "no kernel")])
def test_it_skips(program: Any, why: str) -> None:
    plan = FuseTree().plan(program(), EAGER if why == "no kernel" else ORT)
    assert isinstance(plan, Skips) and why in plan.reason


def test_what_is_no_row_behind_a_cache_is_refused() -> None:
    """A step that writes its rows, two caches before the rows, and a mask that differs between heads."""
    step = stepping()
    with pytest.raises(NotThis, match="not a cache and the rows"):
        matches(step.graphs["step"], step.weights, 64, "tree")
    tree = replace(step.graphs["tree"], fx=copied(step.graphs["tree"].fx))
    _, both, _, mask = next(n for n in tree.fx.nodes if str(n.target) == SDPA).args
    held, (cache, rows) = mask.meta["val"], both.args[0]
    mask.meta["val"] = held.expand(-1, 6, -1, -1)
    with pytest.raises(NotThis, match="the mask is not bool"):
        matches(tree, step.weights, 64, "tree")
    mask.meta["val"] = held
    assert len(matches(tree, step.weights, 64, "tree")) == 4
    both.args = ([cache, cache, rows], 2)
    with pytest.raises(NotThis, match="not a cache and the rows"):
        matches(tree, step.weights, 64, "tree")
