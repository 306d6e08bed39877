"""fuse-canvas: rotary embedding, cache update and attention of chosen rows of a canvas become one op.

`aropt::canvas_attention` is what ONNX Runtime has kernels for (RotaryEmbedding, MultiHeadAttention). Attention is
recognised by what it computes (`aropt/rewriting/attention.py`); a graph with any other attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.control import calls, loops
from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.loops.scheme import scheme_of
from aropt.loops.unmask.cache_policy import CHOSEN_ROWS
from aropt.rewriting.attention import PLACES, Match, NotThis, matches
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.fused import fuse, table_weights
from aropt.rewriting.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseCanvas:
    name: ClassVar[str] = "fuse-canvas"
    contract: ClassVar[Contract] = Contract("rounding", after=("block-cache", "merge-linears"), requires=(CHOSEN_ROWS,))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        if not target.has("multi-head-attention"):
            return Skips(f"the target {target} has no kernel for it")
        found, rejected = [], []
        for graph in restricted(program):
            try:
                count = len(matches(graph, program.weights, program.meta["capacity"], "canvas"))
                found += [f"{graph.name}: {count} attentions"] if count else []
            except NotThis as reason:
                rejected.append((reason.where or graph.name, reason.what))
        if not found:
            return Skips(rejected[0][1] if rejected else "no forward over chosen rows of a canvas", tuple(rejected))
        return Applies(tuple(found), tuple(rejected))

    def run(self, program: Program) -> Program:
        weights, graphs = dict(program.weights), dict(program.graphs)
        for graph in restricted(program):
            try:
                graphs[graph.name] = fused(graph, weights, program.meta["capacity"])
            except NotThis:
                continue  # `plan` says why
        used = {w for g in graphs.values() for w in g.weights()}
        return program.replace(graphs=graphs, weights={w: v for w, v in weights.items() if w in used})


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


def visible(graph: fx.Graph, one: Match) -> fx.Node:
    """The mask bool [B, R, S] that is the same for all heads."""
    mask: Any = one.node.args[3]
    if mask.target is aten.unsqueeze.default and mask.args[1] == 1:
        return mask.args[0]  # type: ignore[no-any-return]
    with graph.inserting_before(one.result):
        return graph.call_function(aten.select.int, (mask, 1, 0))
