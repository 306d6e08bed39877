"""fuse-canvas: rotary embedding, cache update and attention of chosen rows of a canvas become one op.

`aropt::canvas_attention` is what ONNX Runtime has kernels for (RotaryEmbedding, MultiHeadAttention). Attention is
recognised by what it computes (`aropt/rewriting/attention.py`); a graph with any other attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.ir import ops
from aropt.ir.control import calls, loops
from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.loops.scheme import scheme_of
from aropt.loops.unmask.cache_policy import CHOSEN_ROWS
from aropt.rewriting.attention import PLACES, matches
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.fused import changed, fuse, planned, table_weights, visible
from aropt.rewriting.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseCanvas:
    name: ClassVar[str] = "fuse-canvas"
    contract: ClassVar[Contract] = Contract("rounding", after=("block-cache", "merge-linears"), requires=(CHOSEN_ROWS,))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        if not target.has("multi-head-attention"):
            return Skips(f"the target {target} has no kernel for it")
        return planned(program, restricted(program), "canvas", "no forward over chosen rows of a canvas")

    def run(self, program: Program) -> Program:
        return changed(program, restricted(program), fused)


PASS = FuseCanvas


def restricted(program: Program) -> list[Graph]:
    """The forwards over chosen rows that unmasking loops run."""
    if not scheme_of(program).fills:
        return []
    names = dict.fromkeys(c.graph for loop in loops(program.control) for c in calls(loop.body))
    made = ops.load("canvas_attention").overload
    found = [program.graphs[n] for n in names if set(PLACES) <= set(program.graphs[n].inputs)]
    return [g for g in found if all(node.target is not made for node in g.fx.nodes)]


def fused(graph: Graph, weights: dict[str, Tensor], capacity: int) -> Graph:
    """The graph with one op for each attention."""
    copy = replace(graph, fx=copied(graph.fx))
    found = matches(copy, weights, capacity, "canvas")
    names = {f"rotary.{kind}_{i}": f"rotary.{graph.name}_{kind}_{i}" for kind in ("cos", "sin") for i in range(9)}
    made: dict[str, Tensor] = {}
    tables = {table: [names[n] for n in given] for table, given in table_weights(found, made).items()}
    weights |= {names[n]: value for n, value in made.items()}
    placed = {n.name: n for n in copy.fx.nodes if n.op == "placeholder"}
    for one in found:
        heads, _, scale, _, interleaved = one.numbers
        places = (placed["slots"], placed["positions"], visible(copy.fx, one))
        fuse(copy.fx, one, "canvas_attention", places, (heads, scale, interleaved), tables)
    return build(graph.name, copy.fx, graph.inputs, list(graph.outputs), weights)
