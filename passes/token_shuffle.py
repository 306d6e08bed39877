"""token-shuffle: a raster image model becomes one of windows, s x s ids a row: s^2 fewer rounds and rows in the cache.

Between embedding and backbone comes a shuffle, between backbone and head an unshuffle (Token-Shuffle, 2504.17789,
section 3.2): each id's embedding is narrowed, those of a window are concatenated, residual MLPs mix them; after the
backbone MLPs, an expansion and the model's own head give each id's logits. Positions are those of a window's first id.
The new weights are random and the backbone has never seen such rows: the program is marked `needs_finetune`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported, UsageError
from aropt.frontend.trace import capture_module
from aropt.ir.calls import op_name
from aropt.ir.edit import inline
from aropt.ir.program import Graph, Meta, Program, Spec
from aropt.ir.torch_compat import build
from aropt.loops.positions import autoregressive
from aropt.loops.scheme import scheme_of
from aropt.models.shuffle import Shuffle, Unshuffle
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.facts import WINDOWS
from aropt.rewriting.target import Target

aten = torch.ops.aten
I64, F32 = torch.int64, torch.float32
PLACES = "shuffle.places"


@dataclass(frozen=True)
class TokenShuffle:
    """Options: `window` (s), `blocks` (residual MLPs on each side), `seed` of the new weights."""

    window: int = 2
    blocks: int = 1
    seed: int = 0

    name: ClassVar[str] = "token-shuffle"
    contract: ClassVar[Contract] = Contract("retrained", when="asked", establishes=(WINDOWS,))

    def __post_init__(self) -> None:
        for option, least in (("window", 1), ("blocks", 0), ("seed", 0)):
            if getattr(self, option) < least:
                raise UsageError(
                    what=f"token-shuffle:{option}={getattr(self, option)}",
                    why=f"it is {least} or more",
                    hint="leave it out",
                )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        """Raises UsageError, Unsupported: skipping would hide from whoever asked for it that nothing was done."""
        side, vocab = program.meta.get("side"), program.meta["vocab"]
        if program.meta.get("unit"):
            return Skips(f"rows are windows of {program.meta['unit']} ids already")
        if not side or not scheme_of(program).forced:
            raise Unsupported(
                what="token-shuffle takes the ids of images, written one after the other",
                where=str(program.meta.get("name")),
                why="the model does not say that it writes an image" if not side else "this loop unmasks a canvas",
                hint="a model says so by an attribute `side`: ids along the edge of its image",
            )
        if vocab > int(program.meta.get("single", vocab)):
            raise Unsupported(
                what="the model writes text between images",
                where=f"ids {program.meta['single']} to {vocab - 1}",
                why="a round would write a window, and text has none",
                hint="give a model that writes images only; its prompts may hold text",
            )
        if self.window < 2 or int(side) % self.window:
            raise UsageError(
                what=f"windows of {self.window} don't divide an image of side {side}", where="token-shuffle:window",
                hint="take one of " + ", ".join(str(s) for s in range(2, int(side) + 1) if int(side) % s == 0),
            )  # fmt: skip
        table, head, ranges = ends(*program.of_role("forward"))
        return Applies((f"{table.args[0]} -> shuffle", f"unshuffle -> {head.args[1]}", f"{len(ranges)} ranges"))

    def run(self, program: Program) -> Program:
        meta, unit = program.meta, self.window**2
        side, single = int(meta["side"]), int(meta.get("single", meta["vocab"]))
        across = side // self.window
        (model,) = program.of_role("forward")
        width = int(ends(model)[1].args[0].meta["val"].shape[-1])
        known = int(ends(model)[0].meta["val"].shape[-1])
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            sides = Shuffle(known, unit, single, self.blocks), Unshuffle(width, unit, self.blocks)
        made = {
            "shuffle": capture_module("shuffle", sides[0], {"known": Spec(F32, ("B", "T", unit, known)),
                                      "ids": Spec(I64, ("B", "T", unit))}, ["fused"]),
            "unshuffle": capture_module("unshuffle", sides[1], {"x": Spec(F32, ("B", "T", width))}, ["parts"]),
        }  # fmt: skip
        first = torch.arange(across**2)
        first = (first // across * side + first % across) * self.window
        weights = dict(program.weights)
        weights |= {PLACES: first} | {k: v for _, found in made.values() for k, v in found.items()}
        graph = rewritten(model, {n: g for n, (g, _) in made.items()}, weights, unit)
        new: Meta = {
            **meta, "unit": unit, "single": single, "window": self.window, "capacity": across**2,
            "needs_finetune": f"python -m aropt.models.train --from {meta['name']} --shuffle {self.window}",
        }  # fmt: skip
        return autoregressive(graph, weights, new, tuple(meta["rules"]))


PASS = TokenShuffle


def ends(graph: Graph) -> tuple[Any, Any, list[fx.Node]]:
    """The lookup of the ids, the head, and ranges over the sequence. Raises Unsupported where there is not one each."""
    lookups: list[Any] = [n for n in graph.fx.nodes if op_name(n) == "aten::embedding" and n.args[1].name == "ids"]
    head: Any = graph.results()[0]
    while op_name(head) != "aten::linear" and len(head.all_input_nodes) == 1:
        head = head.all_input_nodes[0]
    if len(lookups) != 1 or op_name(head) != "aten::linear":
        what = f"{len(lookups)} tables" if len(lookups) != 1 else f"logits from {op_name(head)}"
        raise Unsupported(
            what="token-shuffle needs one table that the ids are looked up in, and a linear head", where="model",
            why=f"it has {what}", hint="write the model with aropt.models.shuffle.ShuffleAR",
        )  # fmt: skip
    return lookups[0], head, [n for n in graph.fx.nodes if op_name(n) == "aten::arange"]


def rewritten(model: Graph, parts: dict[str, Graph], weights: dict[str, Tensor], unit: int) -> Graph:
    """The forward with shuffle and unshuffle, over ids [B, T, W]."""
    lookup, head, ranges = ends(model)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in model.fx.nodes:
        if node is head:
            new[head.args[0]] = inline(graph, parts["unshuffle"], {"x": new[head.args[0]]})["parts"]
        if node.op == "get_attr":
            new[node] = graph.get_attr(str(node.target))
            continue
        new[node] = graph.node_copy(node, lambda n: new[n])
        if node is lookup:
            given = {"known": new[node], "ids": new[node.args[1]]}
            new[node] = inline(graph, parts["shuffle"], given)["fused"]
        elif node in ranges:
            new[node] = graph.call_function(aten.index.Tensor, (graph.get_attr(PLACES), [new[node]]))
    for node in graph.nodes:
        node.meta["origin"] = node.name
    return build("model", graph, {"ids": Spec(I64, ("B", "T", unit))}, ["logits"], weights)
