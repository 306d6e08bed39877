"""fuse-tree: rotary embedding and attention of the nodes of a tree of drafts become one op.

`aropt::tree_attention` is what ONNX Runtime has kernels for (RotaryEmbedding, and GroupQueryAttention with what a node
sees as a bias). The step for nodes (`aropt/rewriting/tree.py`) is recognised by what it computes
(`aropt/rewriting/attention.py`), in the model and in what drafts for it; one with any other attention stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.loops.speculate import DRAFTS
from aropt.rewriting.attention import PLACES, matches
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.fused import changed, fuse, planned, table_weights, visible
from aropt.rewriting.target import Target

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseTree:
    name: ClassVar[str] = "fuse-tree"
    contract: ClassVar[Contract] = Contract("rounding", after=("tree-draft",))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        if not target.has("grouped-query-attention"):
            return Skips(f"the target {target} has no kernel for it")
        return planned(program, beside_caches(program), "tree", "no step for the nodes of a tree")

    def run(self, program: Program) -> Program:
        return changed(program, beside_caches(program), fused)


PASS = FuseTree


def beside_caches(program: Program) -> list[Graph]:
    """The steps that write no slots, and read new rows behind those that are stored."""
    if DRAFTS.lacking(program):
        return []
    told = set(PLACES[1:])  # all but where rows go
    steps = (g for g in program.graphs.values() if set(PLACES) & set(g.inputs) == told)
    asked = aten.scaled_dot_product_attention.default
    return [g for g in steps if any(n.target is asked for n in g.fx.nodes)]


def fused(graph: Graph, weights: dict[str, Tensor], capacity: int) -> Graph:
    """The graph with one op for each attention."""
    copy = replace(graph, fx=copied(graph.fx))
    found = matches(copy, weights, capacity, "tree")
    made: dict[str, Tensor] = {}
    known_as = table_weights(found, made)
    names = {n: known(f"rotary.{graph.name}{n.removeprefix('rotary')}", value, weights) for n, value in made.items()}
    tables = {table: [names[n] for n in given] for table, given in known_as.items()}
    weights |= {names[n]: value for n, value in made.items()}
    positions = next(n for n in copy.fx.nodes if n.op == "placeholder" and n.name == "positions")
    for one in found:
        heads, kv_heads, scale, _, interleaved = one.numbers
        places, numbers = (visible(copy.fx, one), positions), (heads, kv_heads, scale, interleaved)
        fuse(copy.fx, one, "tree_attention", places, numbers, tables)
    return build(graph.name, copy.fx, graph.inputs, list(graph.outputs), weights, graph.role)


def known(name: str, table: Tensor, weights: dict[str, Tensor]) -> str:
    """The name of a table that is a weight already, or this one."""
    same = (
        n for n, w in weights.items() if n.startswith("rotary.") and w.shape == table.shape and torch.equal(w, table)
    )
    return next(same, name)
