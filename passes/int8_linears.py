"""int8-linears: linear layers read weights of eight bits, a quarter of the bytes, and round their rows to eight too.

A round of one sequence reads all weights once, so it takes about as long as that. Weights are rounded by groups of
neighbouring features, and so are the rows that they are multiplied with, when they are there: one large feature costs
the others of its group their accuracy, and no others (a group is what a static outlier split would keep apart). Nothing
is calibrated. Small layers stay as they are, and so do the ways in and out of a model of windows, which
token-shuffle-fusion folds. What this loses is measured and held against the budget.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from aropt import ops
from aropt.errors import UsageError
from aropt.kernels.linear_int8 import SIZES, packed
from aropt.layers import product
from aropt.passbase import Applies, Contract, Skips, loops
from aropt.passes.canonicalize import copied
from aropt.program import Graph, Program, calls
from aropt.sides import NotThis, joint, source
from aropt.torch_compat import build
from aropt.units import window

aten = torch.ops.aten


@dataclass(frozen=True)
class Int8Linears:
    """Options: `group`, features that share a scale, or half or a quarter as many where that divides a layer's and it
    does not; `least`, weights from which a layer is worth it.
    """

    group: int = 64
    least: int = 2**16
    name: ClassVar[str] = "int8-linears"
    contract: ClassVar[Contract] = Contract("lossy", ("full forward",), ("int8 weights",), ("kl", "top1"))

    def __post_init__(self) -> None:
        if self.group not in SIZES:
            hint = "choose from " + ", ".join(map(str, SIZES))
            raise UsageError(what=f"int8-linears:group={self.group} is no size of a group", hint=hint)

    def plan(self, program: Program, target: str) -> Applies | Skips:
        graph = forward(program)
        if graph is None:
            return Skips("no loop runs a full forward")
        found, rejected = self.layers(graph, program)
        if not found:
            reasons = list(dict.fromkeys(why for _, why in rejected)) or ["the forward has no linear layer"]
            return Skips("; ".join(reasons[:3]), tuple(rejected))
        size = sum(program.weights[str(product(n, program.weights).weight.target)].nbytes for n in found)
        return Applies((f"{graph.name}: {len(found)} linear layers of {size / 2**20:.1f} MiB",), tuple(rejected))

    def layers(self, graph: Graph, program: Program) -> tuple[list[Any], list[tuple[str, str]]]:
        """Linear nodes to change, and why others are none."""
        found, rejected = [], []
        apart = ends(graph) if window(program.meta) else set()
        nodes: Any = graph.fx.nodes
        for node in nodes:
            layer = product(node, program.weights)
            if layer is None:
                continue
            name = str(layer.weight.target)
            why = self.unfit(layer.of(program.weights))
            why = why or ("token-shuffle-fusion folds it" if node in apart else "")
            if why:
                rejected.append((name, why))
            else:
                found.append(node)
        return found, rejected

    def unfit(self, weight: Tensor) -> str:
        """Why a weight stays as it is; empty if it does not."""
        if weight.dtype != torch.float32:
            return f"it is {str(weight.dtype).removeprefix('torch.')}"
        if weight.numel() < self.least:
            return f"{weight.numel()} weights are less than least={self.least}"
        if not self.size(weight):
            return f"{weight.shape[1]} features are in no groups of {self.group} or less"
        return "" if bool(torch.isfinite(weight).all()) else "it has weights that are not finite"

    def size(self, weight: Tensor) -> int:
        """Features of a group: the most that divide the layer's; 0 if none do."""
        return max((s for s in SIZES if s <= self.group and weight.shape[1] % s == 0), default=0)

    def run(self, program: Program) -> Program:
        graph = forward(program)
        assert graph is not None
        changed, weights = replace(graph, fx=copied(graph.fx)), dict(program.weights)
        apart = {n.name for n in self.layers(graph, program)[0]}
        for node in [n for n in changed.fx.nodes if n.name in apart]:
            quantized(changed.fx, node, weights, self.size(product(node, weights).of(weights)))
        made = build(graph.name, changed.fx, graph.inputs, list(graph.outputs), weights)
        graphs = {**program.graphs, graph.name: made}
        used = {w for g in graphs.values() for w in g.weights()}
        return program.replace(graphs=graphs, weights={w: v for w, v in weights.items() if w in used})


PASS = Int8Linears


def forward(program: Program) -> Graph | None:
    """The graph of the model's full forward, where a loop runs it."""
    found = (c for loop in loops(program.control) for c in calls(loop.body) if "ids" in c.reads)
    return next((program.graphs[c.graph] for c in found if "slots" not in c.reads), None)


def ends(graph: Graph) -> set[Any]:
    """Nodes on the ways in and out of a model of windows: up to its rows, and from its last row on."""
    output: Any = next(n for n in reversed(graph.fx.nodes) if n.op == "output")
    logits = output.args[0][list(graph.outputs).index("logits")]
    found: set[Any] = set()
    with suppress(NotThis):  # a way that is not folded is as good as any other layers
        found |= reached(joint(graph.fx), backwards=True)
    with suppress(NotThis):
        found |= reached(source(logits), backwards=False)
    return found


def reached(node: fx.Node, backwards: bool) -> set[Any]:
    """The nodes that a node reads, with it, or those that read it, without."""
    found, todo = {node} if backwards else set(), [node]
    while todo:
        at = todo.pop()
        fresh = [n for n in (at.all_input_nodes if backwards else at.users) if n not in found]
        found |= set(fresh)
        todo += fresh
    return found


def quantized(graph: fx.Graph, node: Any, weights: dict[str, Tensor], group: int) -> None:
    """The op in the place of a linear layer; its weights are added to `weights`."""
    layer = product(node, weights)
    name = f"{layer.weight.target}{'_turned' if layer.turned else ''}"
    names = f"{name}_int8", f"{name}_scales"  # beside a tied table of that name
    if names[0] not in weights:
        weights |= dict(zip(names, packed(layer.of(weights), group), strict=True))
    with graph.inserting_before(node):
        new = graph.call_function(ops.load("linear_int8").overload, (layer.x, *(graph.get_attr(n) for n in names)))
        made = new if layer.bias is None else graph.call_function(aten.add.Tensor, (new, layer.bias))
    for one in (new, made):  # nodes of the new reference, not of the model
        one.meta = {k: v for k, v in node.meta.items() if k != "val"} | {"origin": one.name}
    node.replace_all_uses_with(made)
    graph.erase_node(node)
