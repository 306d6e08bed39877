"""fuse-canvas: rotary embedding, cache update and attention of chosen rows of a canvas become one op.

`aropt::canvas_attention` is what ONNX Runtime has kernels for (RotaryEmbedding, MultiHeadAttention). Attention is
recognised by what it computes (`aropt/rewriting/attention.py`); a graph with any other attention stays as it is.
"""

from __future__ import annotations

import operator
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
from aropt.passes.fuse_attention import features, table_weights
from aropt.rewriting.attention import PLACES, Match, NotThis, matches
from aropt.rewriting.contract import Applies, Contract, Skips
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
                count = len(matches(graph, program.weights, int(program.meta["capacity"])))
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
                graphs[graph.name] = fused(graph, weights, int(program.meta["capacity"]))
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
    found = matches(copy, weights, capacity)
    names = {f"rotary.{kind}_{i}": f"rotary.{graph.name}_{kind}_{i}" for kind in ("cos", "sin") for i in range(9)}
    made: dict[str, Tensor] = {}
    tables = {table: [names[n] for n in given] for table, given in table_weights(found, made).items()}
    weights |= {names[n]: value for n, value in made.items()}
    placed = {n.name: n for n in copy.fx.nodes if n.op == "placeholder"}
    for one in found:
        replace_attention(copy.fx, one, placed, tables)
    return build(graph.name, copy.fx, graph.inputs, list(graph.outputs), weights)


def replace_attention(graph: fx.Graph, one: Match, placed: dict[str, fx.Node], tables: dict[Any, list[str]]) -> None:
    """One op for a match; what nobody reads any more is removed by `build`."""
    with graph.inserting_before(one.result):
        angles = [graph.get_attr(n) for n in tables[one.rotary]] if one.rotary else [None, None]
        heads, _, scale, _, interleaved = one.numbers
        width = heads * int(one.stored[0].meta["val"].shape[3])
        batch = graph.call_function(aten.sym_size.int, (placed["ids"], 0))
        packed = len(one.rows) == 1
        rows: list[Any] = [one.rows[0].node, None, None] if packed else [
            features(graph, source, width, batch) for source in one.rows
        ]  # fmt: skip
        caches = [n.args[0] for n in one.stored]
        mask: Any = one.node.args[3]
        flat = mask.args[0] if mask.target is aten.unsqueeze.default and mask.args[1] == 1 else None
        mask = flat or graph.call_function(aten.select.int, (mask, 1, 0))
        places = (placed["slots"], placed["positions"], mask)
        op = ops.load("canvas_attention").overload
        call = graph.call_function(op, (*rows, *caches, *places, *angles, heads, scale, interleaved))
        call.meta = {"where": one.node.meta.get("where", "")}
        out, *new = (graph.call_function(operator.getitem, (call, i)) for i in range(3))
    out.meta = {k: v for k, v in one.result.meta.items() if k != "val"}
    one.result.replace_all_uses_with(out)
    for old, updated in zip(one.stored, new, strict=True):
        for user in [u for u in old.users if u.op == "output"]:
            user.replace_input_with(old, updated)
