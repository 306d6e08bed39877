"""fuse-tree: one op for an attention of a tree's nodes over a cache; where it does not fire; what validation says."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

import aropt
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


@pytest.mark.parametrize(("program", "why"), [(plain, "no step for the nodes"), (stepping, "no kernel")])
def test_it_skips(program: Any, why: str) -> None:
    plan = FuseTree().plan(program(), EAGER if why == "no kernel" else ORT)
    assert isinstance(plan, Skips) and why in plan.reason


def test_what_is_no_row_behind_a_cache_is_refused() -> None:
    """A step that writes its rows is none of a tree's, nor is a mask that differs between heads."""
    step = stepping()
    with pytest.raises(NotThis, match="not a cache and the rows"):
        matches(step.graphs["step"], step.weights, 64, "tree")
    tree = step.graphs["tree"]
    node = next(n for n in tree.fx.nodes if str(n.target) == SDPA)
    held = node.args[3].meta["val"]
    node.args[3].meta["val"] = held.expand(-1, 6, -1, -1)
    try:
        with pytest.raises(NotThis, match="mask"):
            matches(tree, step.weights, 64, "tree")
    finally:
        node.args[3].meta["val"] = held
