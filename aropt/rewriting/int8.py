"""Which linear layers of a graph take weights of eight bits, and the graph with these (`aropt::linear_int8`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import UsageError
from aropt.ir import ops
from aropt.ir.edit import copied
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build
from aropt.kernels.linear_int8 import SIZES, packed
from aropt.rewriting.linears import product

aten = torch.ops.aten


@dataclass(frozen=True)
class EightBits:
    """`group`: features that share a scale, or half or a quarter as many where that divides a layer's and it does not;
    `least`: weights from which a layer is worth it. `owner`: who chose them, for errors.
    """

    group: int
    least: int
    owner: str

    def check(self) -> None:
        """Raises UsageError for a size that no kernel takes."""
        if self.group not in SIZES:
            hint = "choose from " + ", ".join(map(str, SIZES))
            raise UsageError(what=f"{self.owner}:group={self.group} is no size of a group", hint=hint)

    def layers(self, graph: Graph, weights: Mapping[str, Tensor]) -> tuple[list[Any], list[tuple[Any, str]]]:
        """Linear nodes that take such weights, and those that don't, with the reason."""
        found, rejected = [], []
        nodes: Any = graph.fx.nodes
        for node in nodes:
            layer = product(node, weights)
            why = "" if layer is None else self.unfit(layer.of(weights))
            if why:
                rejected.append((node, why))
            elif layer is not None:
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

    def changed(self, graph: Graph, nodes: Collection[Any], weights: dict[str, Tensor], name: str = "") -> Graph:
        """The graph with those of its nodes changed, under another `name`; their weights are added to `weights`."""
        copy, names = copied(graph.fx), {n.name for n in nodes}
        for node in [n for n in copy.nodes if n.name in names]:
            quantized(copy, node, weights, self.size(product(node, weights).of(weights)))
        return build(name or graph.name, copy, graph.inputs, list(graph.outputs), weights, graph.role)


def by_name(nodes: Collection[tuple[Any, str]], weights: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(weight, reason) for (linear node, reason)."""
    return [(str(product(node, weights).weight.target), why) for node, why in nodes]


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
