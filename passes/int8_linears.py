"""int8-linears: linear layers read weights of eight bits, a quarter of the bytes, and round their rows to eight too.

A round of one sequence reads all weights once, so it takes about as long as that. Weights are rounded by groups of
neighbouring features, and so are the rows that they are multiplied with, when they are there: one large feature costs
the others of its group their accuracy, and no others (a group is what a static outlier split would keep apart). Nothing
is calibrated. Small layers stay as they are, and so do the ways in and out of a model of windows, which
token-shuffle-fusion folds. What this loses is measured and held against the budget.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from aropt.ir import ops
from aropt.ir.program import Graph, Program
from aropt.ir.units import window
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.facts import FORWARD, forward
from aropt.rewriting.int8 import EightBits, by_name
from aropt.rewriting.linears import product
from aropt.rewriting.patch_projections import NotThis, joint, source
from aropt.rewriting.target import Target

NO_LAYER = "no graph holds a layer of eight bits"
EIGHT_BITS = Fact("layers of eight bits", lambda p: "" if any(map(eight_bits, p.graphs.values())) else NO_LAYER)


@dataclass(frozen=True)
class Int8Linears:
    """Options: `group`, features that share a scale, or half or a quarter as many where that divides a layer's and it
    does not; `least`, weights from which a layer is worth it.
    """

    group: int = 64
    least: int = 2**16
    name: ClassVar[str] = "int8-linears"
    contract: ClassVar[Contract] = Contract(
        "lossy",
        when="asked",
        after=("canonicalize",),
        requires=(FORWARD,),
        establishes=(EIGHT_BITS,),
        budget=("kl", "kl_max", "top1", "agreement", "quality"),
    )

    def __post_init__(self) -> None:
        self.bits.check()

    @property
    def bits(self) -> EightBits:
        return EightBits(self.group, self.least, self.name)

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        graph = forward(program)
        assert graph is not None  # FORWARD
        found, rejected = self.layers(graph, program)
        if not found:
            reasons = list(dict.fromkeys(why for _, why in rejected)) or ["the forward has no linear layer"]
            return Skips("; ".join(reasons[:3]), tuple(rejected))
        size = sum(program.weights[str(product(n, program.weights).weight.target)].nbytes for n in found)
        return Applies((f"{graph.name}: {len(found)} linear layers of {size / 2**20:.1f} MiB",), tuple(rejected))

    def layers(self, graph: Graph, program: Program) -> tuple[list[Any], list[tuple[str, str]]]:
        """Linear nodes to change, and why others are none."""
        found, rejected = self.bits.layers(graph, program.weights)
        apart = ends(graph) if window(program.meta) else set()
        rejected += [(n, "token-shuffle-fusion folds it") for n in found if n in apart]
        return [n for n in found if n not in apart], by_name(rejected, program.weights)

    def run(self, program: Program) -> Program:
        graph = forward(program)
        assert graph is not None
        weights = dict(program.weights)
        made = self.bits.changed(graph, self.layers(graph, program)[0], weights)
        graphs = {**program.graphs, graph.name: made}
        used = {w for g in graphs.values() for w in g.weights()}
        return program.replace(graphs=graphs, weights={w: v for w, v in weights.items() if w in used})


PASS = Int8Linears


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


def eight_bits(graph: Graph) -> bool:
    """Whether some linear layer takes weights of eight bits."""
    return any(node.target is ops.load("linear_int8").overload for node in graph.fx.nodes)
