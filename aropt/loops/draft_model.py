"""A smaller model that drafts for a program: its cached step, and this step for the nodes of a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor

from aropt.errors import UsageError
from aropt.frontend.facts import Source
from aropt.frontend.sources import resolve
from aropt.ir.edit import copied, trim
from aropt.ir.program import Graph, Meta, Program
from aropt.ir.torch_compat import build
from aropt.loops.drafters import Model
from aropt.loops.scheme import scheme
from aropt.loops.tree_control import general
from aropt.restrict import excluded
from aropt.rewriting.tree import forms

Prepare = Callable[[Program], Program]  # the passes that give a program a cached step
PREFIX = "draft."  # of its weights


@functools.lru_cache(maxsize=2)
def cached(text: str, capacity: int, prepare: Prepare) -> tuple[Source, Program]:
    """The model that a text names, and its program with a cached step."""
    source = resolve(text, capacity)
    graph, weights = source.captured()
    meta = cast(Meta, source.meta | excluded.facts(graph, source.meta))
    return source, prepare(scheme("positions").build(graph, weights, meta, (), None))


def check(text: str, meta: Meta) -> Source:
    """What is known of a draft model. Raises UsageError for one that can't draft for a model with this meta."""
    source = resolve(text)
    wrong = ""
    if source.meta["vocab"] != meta["vocab"]:
        wrong = f"it has {source.meta['vocab']} ids, and the model {meta['vocab']}"
    elif source.meta.get("mask") is not None:
        wrong = "it unmasks a canvas, and writes no ids one after the other"
    elif (most := source.meta.get("capacity")) and most < meta["capacity"]:
        wrong = f"it takes {most} ids at most, and the model {meta['capacity']} (--capacity takes fewer)"
    if wrong:
        raise UsageError(what=f"{text} can't draft for {meta.get('name', 'this model')}", where="--draft", why=wrong,
                         hint="give a smaller model of the same family, or leave --draft out")  # fmt: skip
    return source


def read(text: str, meta: Meta, weights: dict[str, Tensor], prepare: Prepare, chain: bool) -> Model:
    """The model's graphs; its weights are added to `weights`. Raises UsageError, Unsupported, NoTree."""
    check(text, meta)
    _, program = cached(text, int(meta["capacity"]), prepare)
    step, own = program.graphs[general(program)[0].step.graph], program.weights
    rows = forms(step, own, chain=True)
    graphs = {"step": step, "chain": rows.tree, "settle": rows.settle}
    graphs |= {"tree": rows.tree if chain else trim(forms(step, own).tree, {"logits"}, own)}  # nobody reads its stash
    weights |= {PREFIX + n: own[n] for g in graphs.values() for n in g.weights()}
    made = {n: renamed(g, f"draft_{n}", weights) for n, g in graphs.items()}
    return Model(**made, state={n: s for n, s in program.state.items() if n in step.outputs})


def renamed(graph: Graph, name: str, weights: Mapping[str, Tensor]) -> Graph:
    """The graph under another name, on weights of the prefix."""
    made = copied(graph.fx)
    for node in made.nodes:
        if node.op == "get_attr":
            node.target = PREFIX + str(node.target)
        node.meta.pop("origin", None)  # nothing of the reference computes this
    return replace(build(name, made, dict(graph.inputs), list(graph.outputs), weights), role="bookkeeping")
