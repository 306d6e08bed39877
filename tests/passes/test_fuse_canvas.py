"""fuse-canvas: one op for an attention over chosen rows of a canvas; where it does not fire; what validation says."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import fx

import aropt
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.models.canvas import MASK, CanvasLM
from aropt.passes.fuse_canvas import FuseCanvas
from aropt.pipeline.registry import make
from aropt.rewriting.contract import Applies, Skips
from aropt.validate.compare import cases, validate, with_probe
from tests.support.targets import EAGER, ORT


def model(block: int, heads: int = 2, width: int = 64, layers: int = 2) -> CanvasLM:
    torch.manual_seed(1)
    made = CanvasLM(block, width=width, layers=layers, heads=heads, hidden=48)
    for parameter in made.parameters():
        parameter.data *= 3
    made.capacity = 64  # type: ignore[assignment]
    return made.eval()


def capture(made: CanvasLM) -> Program:
    return aropt.capture(made, mask=MASK, block=made.block, rules=("threshold",))


OWN = ("block-cache", 4)  # a model with blocks of its own


@cache
def plain(block: int) -> Program:
    return capture(model(block))


@cache
def stepping(cache: str, block: int) -> Program:
    return make(cache).run(plain(block))


@cache
def fused(cache: str, block: int) -> Program:
    return FuseCanvas().run(stepping(cache, block))


def ops(program: Program) -> list[str]:
    return [str(n.target) for n in program.graphs["step"].fx.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("block", "cache"),
    [(4, "block-cache"), *(pytest.param(0, n, marks=pytest.mark.exhaustive) for n in ("dual-cache", "free-cache"))],
)
def test_it_is_one_op_and_computes_the_same(block: int, cache: str) -> None:
    step = stepping(cache, block)
    plan = FuseCanvas().plan(step, ORT)
    assert isinstance(plan, Applies) and plan.matches == ("step: 2 attentions",)
    fast = fused(cache, block)
    verify(fast)
    assert ops(fast).count("aropt.canvas_attention.default") == 2
    assert not {"aten.scaled_dot_product_attention.default", "aten.cat.default"} & set(ops(fast))
    assert fast.graphs["step"].aliases == step.graphs["step"].aliases, "caches are still updated in place"
    assert validate(step, with_probe(fast), chosen=cases(plain(block), quick=True)).passed


@pytest.mark.exhaustive
def test_it_is_lowered_to_ort_operators() -> None:
    done = aropt.optimize(plain(4), target="onnxruntime")
    assert done.report["verify"]["status"] == "pass"
    nodes = done.report["nodes"]["step_greedy"]
    assert nodes["MultiHeadAttention"] == 2 and nodes["RotaryEmbedding"] == 4 and "Softmax" not in nodes


def test_where_it_does_not_fire() -> None:
    assert "no kernel" in FuseCanvas().plan(stepping(*OWN), EAGER).reason  # type: ignore[union-attr]
    assert isinstance(FuseCanvas().plan(fused(*OWN), ORT), Skips), "it does not fire twice"
    assert isinstance(FuseCanvas().plan(plain(4), ORT), Skips), "no rows are chosen"
    odd = make("block-cache").run(capture(model(4, heads=4, width=32, layers=1)))  # heads of 8 features
    plan = FuseCanvas().plan(odd, ORT)
    assert isinstance(plan, Skips) and "multiples of 16" in plan.reason


@pytest.mark.parametrize("wrong", ["scale", "positions", "mask"])
def test_validation_catches_a_wrong_op(wrong: str) -> None:
    step, fast = stepping(*OWN), fused(*OWN)
    graph = fast.graphs["step"]
    new, nodes = fx.Graph(), {}  # type: ignore[var-annotated]
    new.output(new.graph_copy(graph.fx, nodes))
    for node in list(new.nodes):
        if node.target is torch.ops.aropt.canvas_attention.default:
            args: list[Any] = list(node.args)
            if wrong == "scale":
                args[11] = args[11] * 1.01
            with new.inserting_before(node):
                if wrong == "positions":  # a shift of all of them would change nothing
                    args[6] = new.call_function(torch.ops.aten.mul.Tensor, (args[6], 2))
                if wrong == "mask":
                    args[7] = new.call_function(torch.ops.aten.ones_like.default, (args[7],))
            node.args = tuple(args)
    off = fast.replace(graphs={**fast.graphs, "step": replace(graph, fx=new)})
    assert not validate(step, with_probe(off), chosen=cases(step, quick=True)).passed
