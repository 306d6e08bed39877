"""tree-draft: a cheaper model drafts a tree of ids for each sequence, and one call of the step checks all its nodes.

A tree says what to try where the first guess is wrong (SpecInfer, Miao et al. 2024, 2305.09781; on recurrent state:
STree, Wu et al. 2025, 2505.14969). The step for nodes reads the state and writes none; what a path of accepted nodes
would have written is taken in afterwards, so that nothing has to be rolled back (`rewriting/tree.py`). A draft counts
if the rule picks it itself after its parent, with the noise of its place: the ids are those of the plain loop, greedy
or drawn, whatever is drafted. Sequences of a batch accept different lengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from aropt.errors import UsageError
from aropt.ir.control import Control
from aropt.ir.program import Program
from aropt.loops.accept import ACCEPT, MATCH, levelled
from aropt.loops.draft_model import cached, check, read
from aropt.loops.drafters import Drafter, Ranked, from_text, own_model, own_step, ranking
from aropt.loops.grown import shaped
from aropt.loops.guidance import NEW_ROWS
from aropt.loops.jacobi import from_before
from aropt.loops.own_masks import from_masks, masked
from aropt.loops.speculate import DRAFTS, NO_DRAFTS, Rounds
from aropt.loops.tree_control import beside, general, unfit, with_drafts
from aropt.loops.trees import Drafts, Made, rounds, state
from aropt.passes.canonicalize import Canonicalize
from aropt.passes.kv_cache import KvCache
from aropt.passes.merge_linears import MergeLinears
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.facts import ROWS_OF_ONE
from aropt.rewriting.target import Target
from aropt.rewriting.tree import Nodes, NoTree, bytes_aside, forms, kept_aside, sketches

SOURCES = ("self", "text", "jacobi", "masks")
CHAINS = ("text", "jacobi", "masks")  # what drafts no trees


@dataclass(frozen=True)
class TreeDraft:
    """Options.

    `draft`, what drafts: "self" (the step with weights of eight bits), "text" (what followed the latest ids where they
    stood before: a chain), "jacobi" (what the round before said of these places: a chain), "masks" (rows of the model's
    `draft_mask`: a chain), or a smaller model, as `aropt optimize` takes one. `shape`, the tree: chain:4, the children
    of a node on each level (3x2x1), each draft's parent (0-0-1), or the best 8 of 4 levels of 3 nodes (grown:4x3:8).
    `most`, sequences of a batch that is speculated. `accept`, when a draft of a draw counts (loops/accept.py).
    """

    draft: str = "self"
    shape: str = "chain:4"
    most: int = 8
    accept: str = "match"
    name: ClassVar[str] = "tree-draft"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        when="tried",
        after=("fuse-attention", "kv-cache", "merge-linears"),
        requires=(NEW_ROWS, NO_DRAFTS, ROWS_OF_ONE),
        establishes=(DRAFTS,),
        tries=("draft=text,shape=chain:4", "draft=self,shape=chain:4", "draft=jacobi,shape=chain:8"),
    )

    def __post_init__(self) -> None:
        best, by = not self.tree.tables() or self.draft == "masks", ACCEPT.get(self.accept, MATCH)
        wrong = [
            ("shape", not self.tree.chain and self.draft in CHAINS, f"{self.draft} drafts chains", "shape=chain:4"),
            ("most", self.most < 1, "it is 1 or more", "leave it out"),
            ("accept", by.name != self.accept, "no rule of acceptance has that name", ", ".join(ACCEPT)),
            ("accept", best and by.reads("drafted"), "it takes draws, these drafts are the best ids", "accept=match"),
        ]
        for option, is_so, why, hint in wrong:
            if is_so:
                raise UsageError(what=f"tree-draft:{option}={getattr(self, option)}", why=why, hint=hint)
        object.__setattr__(self, "contract", levelled(self.contract, by))  # the class keeps its own

    @property
    def source(self) -> str:
        return self.draft if self.draft in SOURCES else "model"

    @property
    def offers(self) -> tuple[int, int]:
        """The rows of a round, and how many ids it gives at most."""
        return int(self.nodes.rows), self.tree.deepest + 1

    @property
    def tree(self) -> Drafts:
        return shaped(self.shape)[0]

    @property
    def nodes(self) -> Nodes:
        """The rows of a round."""
        return masked(self.tree.nodes) if self.draft == "masks" else self.tree.checked

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        none = self.draft == "masks" and program.meta.get("draft_mask") is None
        if why := unfit(program, self.tree.widest) or ("the model says no `draft_mask`" if none else ""):
            return Skips(why)
        if self.draft not in SOURCES:
            check(self.draft, program.meta)
            cached(self.draft, int(program.meta["capacity"]), prepared)
        try:
            both = forms(program.graphs[general(program)[0].step.graph], dict(program.weights), self.nodes)
        except NoTree as reason:
            return Skips(f"{reason}, so that no tree can be checked")
        drafts = f"{self.tree.nodes - 1} drafts a round, {self.tree.deepest} deep, by {self.draft}"
        sizes = bytes_aside(both, program.state, int(self.nodes.rows))
        return Applies((drafts, kept_aside(sizes)), memory=sizes)

    def run(self, program: Program) -> Program:
        found, shape, by = general(program), self.tree, ACCEPT[self.accept]
        made = Made({}, dict(program.weights), int(program.meta["vocab"]), int(program.meta["capacity"]))
        rounds(made, shape, self.most, by)
        target = forms(program.graphs[found[0].step.graph], made.weights, self.nodes)
        made.graphs |= {"tree": target.tree, "settle": target.settle}
        drafter_of, kept = self.drafters(program, made), {**program.state, **state(shape)}

        def drafted(one: Rounds) -> Control:
            drafter = drafter_of(ranked := ranking(program, one.rule, by))
            kept.update(drafter.state)
            return with_drafts(one, drafter, made, ranked)

        control, graphs = beside(program, found, made, drafted), {**program.graphs, **made.graphs}
        return program.replace(graphs=graphs, state=kept, control=control, weights=made.weights)

    def drafters(self, program: Program, made: Made) -> Callable[[Ranked], Drafter]:
        """What drafts for a loop."""
        shape, growth = shaped(self.shape)
        if self.draft in (chains := {"text": from_text, "jacobi": from_before}):
            return lambda ranked: chains[self.draft](made, shape, ranked)
        if self.draft == "masks":
            return lambda ranked: from_masks(made, shape, int(program.meta["draft_mask"] or 0), ranked)
        if self.draft == "self":
            step, levels = program.graphs[general(program)[0].step.graph], range(shape.deepest)
            graphs = sketches(step, made.weights, [shape.rows(range(d + 1)) for d in levels], self.name)
            return lambda ranked: own_step(made, growth(made, ranked), graphs)
        model = read(self.draft, program.meta, made.weights, prepared, shape)
        return lambda ranked: own_model(made, shape, growth(made, ranked), model)


PASS = TreeDraft


def prepared(program: Program) -> Program:
    """A draft model's program with a cached step."""
    for one in (Canonicalize(), KvCache(), MergeLinears()):
        program = one.run(program)
    return program
