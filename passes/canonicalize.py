"""canonicalize: written-out forms become the ops that targets have fast kernels for.

1. x * rsqrt(mean(x^2) + eps) [* weight]         ->  rms_norm           (the last axis)
2. attention over heads repeated for each group  ->  grouped attention  (SDPA with enable_gqa; a smaller cache)
3. attention written out as products and softmax  ->  SDPA  (`restrict/normalize.py`; or `aropt::attention`)

Does not fire when the squared value and the scaled one differ, when the mean is over another axis, or when only one of
keys and values is repeated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.restrict.normalize import normalize_attention
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target

aten = torch.ops.aten
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default)


@dataclass(frozen=True)
class Canonicalize:
    """Options: `norms`, `heads` and `attention`, which of the rewrites run."""

    norms: bool = True
    heads: bool = True
    attention: bool = True
    name: ClassVar[str] = "canonicalize"
    contract: ClassVar[Contract] = Contract("rounding", after=("token-shuffle",))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        both = {name: self.matches(graph) for name, graph in program.graphs.items()}
        found = [
            f"{len(rms)} norms, {len(heads)} attentions of {n}" for n, (rms, heads) in both.items() if rms or heads
        ]
        normal = self.normalized(program)
        found += [f"{count} written-out attentions of {name}" for name, (_, count) in normal.items() if count]
        if not found:
            return Skips("no written-out norm or attention, and no repeated heads")
        return Applies(tuple(found), make=lambda: self.rewritten(program, {n: g for n, (g, _) in normal.items()}))

    def normalized(self, program: Program) -> dict[str, tuple[Graph, int]]:
        """Each graph with written-out attention as one op, and how many; only forwards hold attention."""
        capacity, never = program.meta["capacity"], program.meta.get("never", ())
        found = {name: (graph, 0) for name, graph in program.graphs.items()}
        for one in program.of_role("forward") if self.attention else ():
            found[one.name] = normalize_attention(one, program.weights, capacity, never)
        return found

    def matches(self, graph: Graph) -> tuple[list[Any], list[Any]]:
        nodes = list(graph.fx.nodes)
        rms = [found for n in nodes if self.norms and (found := match_rms(n))]
        return rms, [group for n in nodes if self.heads and (group := match_heads(n))]

    def run(self, program: Program) -> Program:
        return self.rewritten(program, {name: graph for name, (graph, _) in self.normalized(program).items()})

    def rewritten(self, program: Program, normal: dict[str, Graph]) -> Program:
        """The program, its attention written as SDPA already, with norms as ops and heads in groups."""
        graphs = {}
        for name, graph in normal.items():
            copy = replace(graph, fx=copied(graph.fx))
            rms, heads = self.matches(copy)
            for match in rms:
                rewrite_rms(copy.fx, *match)
            for node, key, value in heads:
                node.args = (node.args[0], key, value, *node.args[3:])
                node.kwargs = {**node.kwargs, "enable_gqa": True}
            graphs[name] = graph
            if rms or heads:
                graphs[name] = build(name, copy.fx, graph.inputs, list(graph.outputs), program.weights)
        return program.replace(graphs=graphs)


PASS = Canonicalize


def match_rms(node: fx.Node) -> tuple[fx.Node, fx.Node, float, fx.Node | None] | None:
    """(node to replace, x, eps, weight or None), if `node` is x * rsqrt(mean(x^2, -1) + eps)."""
    if node.target is not aten.mul.Tensor or len(node.args) != 2:
        return None
    for x, inverse in (node.args, node.args[::-1]):
        match inverse:
            case fx.Node(
                target=aten.rsqrt.default, args=(fx.Node(target=aten.add.Tensor, args=(fx.Node() as mean, float(eps))),)
            ) if mean.target is aten.mean.dim and str(mean.args[1]) == "[-1]" and mean.args[2:] == (True,):
                square = mean.args[0]
                if isinstance(square, fx.Node) and square.target is aten.pow.Tensor_Scalar and square.args == (x, 2):
                    scaled, weight = scaled_by(node)
                    return scaled, x, eps, weight  # type: ignore[return-value]
    return None


def scaled_by(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The product with a weight of the last axis's size that is the node's only use, and that weight."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is aten.mul.Tensor and len(users[0].args) == 2:
        other = users[0].args[1] if users[0].args[0] is node else users[0].args[0]
        size = node.meta["val"].shape[-1]
        if isinstance(other, fx.Node) and other is not node and tuple(other.meta["val"].shape) == (size,):
            return users[0], other
    return node, None


def rewrite_rms(graph: fx.Graph, scaled: fx.Node, x: fx.Node, eps: float, weight: fx.Node | None) -> None:
    """One rms_norm in the place of the written-out one."""
    with graph.inserting_before(scaled):
        new = graph.call_function(aten.rms_norm.default, (x, [x.meta["val"].shape[-1]], weight, eps))
    new.meta = {k: v for k, v in scaled.meta.items() if k != "val"}
    scaled.replace_all_uses_with(new)


def match_heads(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(attention, key, value) with the heads as they were before both were repeated."""
    if node.target is not aten.scaled_dot_product_attention.default or node.kwargs.get("enable_gqa"):
        return None
    key, value = (unrepeated(n) for n in node.args[1:3])
    return (node, key, value) if key is not None and value is not None else None


def unrepeated(node: Any) -> fx.Node | None:
    """[B, H, T, D] of which `node` is each head repeated: by repeat_interleave, or unsqueeze(2), expand, reshape."""
    if isinstance(node, fx.Node) and node.target is aten.repeat_interleave.self_int and node.args[2:] == (1,):
        return node.args[0] if len(node.meta["val"].shape) == 4 else None  # type: ignore[return-value]
    final = node
    while isinstance(node, fx.Node) and node.target in VIEWS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.expand.default:
        return None
    expanded, inner = node, node.args[0]
    if not isinstance(inner, fx.Node) or inner.target is not aten.unsqueeze.default or inner.args[1] != 2:
        return None
    source = inner.args[0]
    assert isinstance(source, fx.Node)
    before, between, after = (n.meta["val"].shape for n in (source, expanded, final))
    heads_first = len(before) == 4 and len(between) == 5 and len(after) == 4 and after[1] == between[1] * between[2]
    same = heads_first and between[1] == before[1] and between[3] is not None and after[3] == before[3] == between[4]
    return source if same else None
