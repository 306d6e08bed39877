"""STree (Wu et al. 2025, 2505.14969): trees of drafts on recurrent state, which keep aside no state of a node."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from aropt.bench.drafted import counted, unchecked
from aropt.bench.ratios import over
from aropt.ir.program import Program
from aropt.loops.tree_control import general
from aropt.loops.trees import Shape
from aropt.models import load, text
from aropt.passes.canonicalize import Canonicalize
from aropt.passes.kv_cache import KvCache
from aropt.recipes import Recipe, Row, Say
from aropt.rewriting.tree import bytes_aside, forms

MODELS = ("text-mamba2", "text-hybrid")
CHAIN, TREE = "chain:5", "0-0-0-1-1-2-4-4-5-6-7-8-9-10-11"  # both five deep; of the tree the likeliest paths
PROMPTS, PROMPT, NEW = 16, 64, 200


def check(say: Say, quick: bool) -> Iterator[Row]:
    """For each model: equal ids, ids a verification beside a chain's, bytes kept aside."""
    import aropt

    prompts = text.heldout(4 if quick else PROMPTS, PROMPT)
    for name in MODELS:
        program = aropt.capture(name)
        ways = {"none": [], **{shape: [f"tree-draft:draft={name}-draft,shape={shape}"] for shape in (CHAIN, TREE)}}
        made = {}
        for way, chosen in ways.items():
            say(f"{name}, drafts {way}: optimizing")
            made[way] = unchecked(program, chosen)
        rows = []
        for row in counted(made, load(name), prompts, NEW):
            rows.append(row)
            say(f"{name}: generating, {len(rows)} of {len(prompts)} prompts")
        yield from drafted(name, rows)
        yield aside(name, program)


def drafted(name: str, rows: list[dict[str, Any]]) -> Iterator[Row]:
    """What was counted on the prompts."""
    there = partial(Row, n=len(rows), of="prompts")
    ties = [one for row in rows for one in row["differs"].values() if one]
    told = f", but for {len(ties)} ties of logits" if ties else ""
    yield there(
        f"{name}: drafts of a chain and of a tree give the ids of plain greedy decoding",
        f"all {NEW} ids of each answer are the same{told}", holds=True,
    )  # fmt: skip
    each = {way: over([(NEW - 1, row["checks"][way]) for row in rows])["all"] for way in (CHAIN, TREE)}
    gain = over([(row["checks"][CHAIN], row["checks"][TREE]) for row in rows])
    yield there(
        f"{name}: a verification of a tree gives more ids than one of a chain as deep, by the same drafter",
        f"{each[TREE]:.2f} ids, a chain {each[CHAIN]:.2f}: {gain['all']:.2f} times as many"
        f" (95 %: {gain['low']:.2f} to {gain['high']:.2f}), with {Shape.parse(TREE).nodes} nodes for"
        f" {Shape.parse(CHAIN).nodes}",
        holds=gain["low"] > 1,
    )  # fmt: skip


def aside(name: str, program: Program) -> Row:
    """The bytes that a round keeps for a sequence until it is known which nodes count."""
    for one in (Canonicalize(), KvCache()):
        program = one.run(program)
    shape = Shape.parse(TREE)
    step, nodes = program.graphs[general(program)[0].step.graph], shape.nodes
    both = forms(step, dict(program.weights), shape.rows(range(nodes)))
    found = bytes_aside(both, program.state, nodes)
    kept, states = found["aside"], found["snapshots"]
    return Row(
        f"{name}: what a round keeps aside for its nodes is less than their recurrent states",
        f"{kept / 2**10:.0f} KiB; a copy of the state for each node takes {states / 2**10:.0f} KiB",
        nodes, "nodes", kept < states,
    )  # fmt: skip


RECIPE = Recipe(
    title="trees of drafts on recurrent state",
    paper="STree, Wu et al. 2025, 2505.14969",
    runs="aropt compiles all of it, with the pass `tree-draft`; the module is a plain forward of transformers",
    proxy="text-mamba2 and text-hybrid, with drafts of one and two layers; held-out text of the Python distribution.",
    check=check,
)
