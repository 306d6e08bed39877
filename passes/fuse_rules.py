"""fuse-rules: the rules and the draw of a round, for all ids of a window, become one op.

`aropt::fused_sample` has a kernel for GPUs, which reads the logits once and sorts nothing; other targets run its
definition, so that the pass gains nothing there and has to be asked for. A rule's graph is replaced where it is node by
node what `aropt.loops.rules` as shipped makes of the program's rules: one that is redefined, registered or moved to
another place in their order is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.program import Graph, Program
from aropt.ir.units import window
from aropt.kernels.fused_sample import NAMES
from aropt.loops.rules import SHIPPED, draws, rule
from aropt.loops.scheme import scheme_of
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target

KNOWN = {"guidance", "repetition-penalty", "bias", "temperature", "top-k", "top-p", "min-p"}


@dataclass(frozen=True)
class FuseRules:
    name: ClassVar[str] = "fuse-rules"
    contract: ClassVar[Contract] = Contract("rounding", when="asked", after=("int8-draft", "ngram-draft", "tree-draft"))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        rules = program.of_role("rule")
        if not rules or not scheme_of(program).forced:
            return Skips("no rule picks the next token by itself")
        reasons = [(graph, reason(program, graph)) for graph in rules]
        rejected = tuple((graph.name, why) for graph, why in reasons if why)
        found = tuple(f"{graph.name}: {', '.join(graph.inputs)}" for graph, why in reasons if not why)
        return Applies(found, rejected) if found else Skips("; ".join(dict.fromkeys(why for _, why in reasons)))

    def run(self, program: Program) -> Program:
        windows = bool(window(program.meta))
        made = {g.name: fused(g, windows) for g in program.of_role("rule") if not reason(program, g)}
        return program.replace(graphs={**program.graphs, **made})


PASS = FuseRules


def reason(program: Program, graph: Graph) -> str:
    """Why a rule stays as it is, or nothing."""
    names: list[str] = program.meta["rules"]
    foreign = [n for n in names if n not in KNOWN]
    if foreign:
        return f"fused_sample has no place for the rule {foreign[0]}"
    processors = {n: p for n, p in SHIPPED.items() if n in names}
    moved = [pair for pair in zip(processors, names, strict=True) if pair[0] != pair[1]]
    if moved:
        return f"fused_sample applies {moved[0][0]} before {moved[0][1]}"
    function, inputs = rule(processors, program.meta["vocab"], draws(graph), window(program.meta))
    own = capture_function(graph.name, function, inputs, list(graph.outputs))
    same = own.inputs == graph.inputs and written(own.fx) == written(graph.fx)
    return "" if same else "it computes something else than aropt's own rules"


def written(graph: fx.Graph) -> list[tuple[str, str, str, str]]:
    """Node by node: what is called, on which earlier nodes and constants."""
    number = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    return [
        (n.op, str(n.target), *(str(fx.node.map_arg(a, lambda x: number[x])) for a in (n.args, n.kwargs)))
        for n in graph.nodes
    ]


def fused(graph: Graph, windows: bool) -> Graph:
    """The graph as one op."""
    sample = ops.load("fused_sample").overload

    def function(logits: Tensor, **values: Tensor) -> Tensor:
        wide = logits if windows else logits.unsqueeze(1)
        token: Tensor = sample(wide, *(values.get(n) for n in NAMES[1:]))
        return token if windows else token.squeeze(1)

    return capture_function(graph.name, function, graph.inputs, list(graph.outputs), graph.role)
