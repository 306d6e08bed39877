"""token-shuffle-fusion: the way in and the way out of rows of several ids become one gather and one product or two.

In: whatever is a sum over a window's places of something that its id alone decides (an embedding, narrowed and
concatenated, or concatenated and reduced; a class's own full-width row) is one table a place, `aropt::token_shuffle`.
Out: whatever is affine from a row to its ids' logits (an expansion, a lift, the head) is `aropt::token_unshuffle`, with
its expansion folded into the head where that multiplies less. Both are found by what they compute, on a basis, not by
how they are written or called. Sums are taken in another order: level `rounding`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.ir.units import window
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.facts import WINDOWS
from aropt.rewriting.patch_projections import (
    NotThis,
    joint,
    multiplied,
    place,
    source,
    spent,
    tables,
    unshuffle,
    ways,
    written,
)
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class TokenShuffleFusion:
    """Option: `limit`, the largest table in MiB."""

    limit: int = 256

    name: ClassVar[str] = "token-shuffle-fusion"
    contract: ClassVar[Contract] = Contract("rounding", after=("kv-cache",), requires=(WINDOWS,))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        changed, matches, rejected = self.fused(program)
        if not matches:
            return Skips("; ".join(dict.fromkeys(why for _, why in rejected)) or "no forward reads ids", rejected)
        return Applies(matches, rejected, make=lambda: changed)

    def run(self, program: Program) -> Program:
        return self.fused(program)[0]

    def fused(self, program: Program) -> tuple[Program, tuple[str, ...], tuple[tuple[str, str], ...]]:
        """The program with both ops; which sides of which graphs matched, and why others did not."""
        weights, graphs = dict(program.weights), dict(program.graphs)
        matches, rejected = [], []
        for graph in program.of_role("forward"):
            name = graph.name
            changed = copied(graph.fx)
            for node, before in zip(changed.nodes, graph.fx.nodes, strict=True):
                node.meta.setdefault("val", before.meta.get("val"))
            for side, fuse in (("in", self.way_in), ("out", self.way_out)):
                try:
                    matches.append(f"{name}, {side}: {fuse(changed, graph, program, weights)}")
                except NotThis as reason:
                    rejected.append((f"{name}, {side}", str(reason)))
            graphs[name] = build(name, changed, graph.inputs, list(graph.outputs), weights, graph.role)
        used = {w for g in graphs.values() for w in g.weights()}
        kept = {w: v for w, v in weights.items() if w in used}
        return program.replace(graphs=graphs, weights=kept), tuple(matches), tuple(rejected)

    def way_in(self, changed: fx.Graph, graph: Graph, program: Program, weights: dict[str, Tensor]) -> str:
        """Replaces what a row's ids become by one gather; says what it was. Raises NotThis."""
        joined, (places,) = joint(changed), window(program.meta)
        width, known = int(joined.meta["val"].shape[2]), int(program.meta.get("input_vocab", program.meta["vocab"]))
        if known * width * 4 > self.limit * 2**20:
            raise NotThis(f"a table of {known} ids of {width} features takes more than limit={self.limit} MiB")
        table, add = tables(joined, weights, places, known, int(program.meta.get("single", known)))
        if table.nbytes > self.limit * 2**20:
            raise NotThis(f"tables of {known} ids of {width} features take more than limit={self.limit} MiB")
        name = f"{graph.name}.shuffle"
        weights[name] = table
        ids = next(n for n in changed.nodes if n.name == "ids")
        replaced(changed, joined, "token_shuffle", (ids, name, add))
        form = f"sums {places} of" if add else f"concatenates {places} of"
        return f"one gather {form} {table.shape[-1]} features for each of {known} ids ({place(joined)})"

    def way_out(self, changed: fx.Graph, graph: Graph, program: Program, weights: dict[str, Tensor]) -> str:
        """Replaces what a row becomes logits by with one product, or two; says what it was. Raises NotThis."""
        output: Any = next(n for n in reversed(changed.nodes) if n.op == "output")
        logits = output.args[0][list(graph.outputs).index("logits")]
        entry = source(logits)
        cost = {part: multiplied(entry, part, logits) for part in ways(entry, logits)}
        before = written(entry, logits)
        if min(cost.values()) > before:
            raise NotThis(f"as it is written a row takes {before} multiplications, folded {min(cost.values())}")
        for part in sorted((n for n in cost if cost[n] <= before), key=lambda n: spent(entry, n, logits)):
            made = unshuffle(entry, part, logits, weights)
            if made is not None:
                break
        else:
            raise NotThis("a window's logits are no product of its row with the same weights in every row")
        names = [t if t is None else f"{graph.name}.unshuffle.{i}" for i, t in enumerate(made)]
        weights |= {n: t for n, t in zip(names, made, strict=True) if n is not None and t is not None}
        replaced(changed, logits, "token_unshuffle", (entry, *names))
        form = "one product" if part is logits else f"{part.meta['val'].shape[3]} features each, then the head"
        return f"{form}: {cost[part]} multiplications a row, of {before} ({place(logits)})"


PASS = TokenShuffleFusion


def replaced(graph: fx.Graph, old: fx.Node, op: str, args: tuple[Any, ...]) -> None:
    """An op in the place of a node; arguments that are text name weights."""
    with graph.inserting_before(old.next):
        given = [graph.get_attr(a) if isinstance(a, str) else a for a in args]
        made = graph.call_function(ops.load(op).overload, tuple(given))
    made.meta = dict(old.meta)
    old.replace_all_uses_with(made)
