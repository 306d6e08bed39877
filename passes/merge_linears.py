"""merge-linears: linear layers that read the same value become one (query, key and value; gate and up).

One product with the stacked weight reads its input once and is one node where there were two or three; its result is
split. Linear layers merge if all or none of them have a bias, those of eight bits if their groups are of one size. Sums
may be taken in another order: level `rounding`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target

aten = torch.ops.aten
LINEAR = (aten.linear.default, ops.load("linear_int8").overload)  # each stacks its weights along the first axis


@dataclass(frozen=True)
class MergeLinears:
    """Option: `limit`, the largest merged weight in MiB."""

    limit: int = 512
    name: ClassVar[str] = "merge-linears"
    contract: ClassVar[Contract] = Contract(
        "rounding", after=("block-cache", "guide-cache", "int8-linears", "kv-cache", "token-shuffle-fusion")
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        found = tuple(
            f"{name}: {' + '.join(short(n) for n in group)}"
            for name, graph in program.graphs.items()
            for group in self.groups(graph, program.weights)
        )
        return Applies(found) if found else Skips("no two linear layers read the same value")

    def groups(self, graph: Graph, weights: dict[str, Tensor]) -> list[list[Any]]:
        """Linear nodes by what they read, those with a bias apart, where there are at least two."""
        found: dict[tuple[Any, ...], list[Any]] = {}
        nodes: Any = graph.fx.nodes
        for node in nodes:
            if node.target in LINEAR and all(n.op == "get_attr" for n in node.args[1:]):
                weight = weights[str(node.args[1].target)]
                key = node.target, node.args[0], len(node.args) > 2, weight.dtype, weight.shape[1:]
                found.setdefault(key, []).append(node)
        size = {n: weights[str(n.args[1].target)].nbytes for group in found.values() for n in group}
        return [g for g in found.values() if len(g) > 1 and sum(size[n] for n in g) <= self.limit * 2**20]

    def run(self, program: Program) -> Program:
        weights, graphs = dict(program.weights), {}
        for name, graph in program.graphs.items():
            changed = replace(graph, fx=copied(graph.fx))
            groups = self.groups(changed, weights)
            for group in groups:
                merge(changed.fx, group, weights)
            graphs[name] = graph
            if groups:
                graphs[name] = build(name, changed.fx, graph.inputs, list(graph.outputs), weights, graph.role)
        used = {w for g in graphs.values() for w in g.weights()}
        return program.replace(graphs=graphs, weights={w: v for w, v in weights.items() if w in used})


PASS = MergeLinears


def short(node: Any) -> str:
    """A linear layer's name for people: that of its weight."""
    return str(node.args[1].target).removesuffix(".weight")


def merge(graph: fx.Graph, group: list[Any], weights: dict[str, Tensor]) -> None:
    """One linear and a split in the place of the group; the stacked weights are added to `weights`."""
    first, stacked = group[0], []
    for position in range(1, len(first.args)):
        names = [str(n.args[position].target) for n in group]
        name = "merged." + "__".join(n.replace(".", "_") for n in names)
        if name not in weights:
            weights[name] = torch.cat([weights[n] for n in names])
        stacked.append(name)
    sizes = [n.meta["val"].shape[-1] for n in group]
    with graph.inserting_before(first):
        one = graph.call_function(first.target, (first.args[0], *(graph.get_attr(n) for n in stacked)))
        one.meta = {"where": first.meta.get("where", "")}
        parts = graph.call_function(aten.split_with_sizes.default, (one, sizes, -1))
        for i, node in enumerate(group):
            new = graph.call_function(operator.getitem, (parts, i))
            new.meta = {k: v for k, v in node.meta.items() if k != "val"}
            node.replace_all_uses_with(new)
    for node in group:
        graph.erase_node(node)
