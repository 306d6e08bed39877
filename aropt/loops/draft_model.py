"""A smaller model that drafts for a program: its cached step, and this step for the nodes of a tree."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import cast

from torch import Tensor

from aropt.errors import Unsupported, UsageError
from aropt.frontend.facts import Source
from aropt.frontend.sources import resolve
from aropt.ir.edit import copied, trim
from aropt.ir.program import Graph, Meta, Program
from aropt.ir.torch_compat import build
from aropt.ir.units import window
from aropt.loops.drafters import Model
from aropt.loops.scheme import scheme
from aropt.loops.tree_control import general
from aropt.loops.trees import Drafts
from aropt.restrict import excluded
from aropt.rewriting.tree import Nodes, forms

Prepare = Callable[[Program], Program]  # the passes that give a program a cached step
PREFIX = "draft."  # of its weights
WHERE = "--draft, or the draft of a pass"
HINT = "give a smaller model of the same family, or leave --draft out"


@functools.lru_cache(maxsize=2)
def found(text: str, capacity: int) -> Source:
    """The model that a text names. Raises UsageError, Unsupported."""
    with told(text):
        return resolve(text, capacity)


@functools.lru_cache(maxsize=2)
def cached(text: str, capacity: int, prepare: Prepare) -> Program:
    """Its program with a cached step. Raises UsageError, Unsupported."""
    source = found(text, capacity)
    with told(text):
        graph, weights = source.captured()
        meta = cast(Meta, source.meta | excluded.facts(graph, source.meta))
        return prepare(scheme("positions").build(graph, weights, meta, (), None))


@contextlib.contextmanager
def told(text: str) -> Iterator[None]:
    """Errors say that they are of the draft model."""
    try:
        yield
    except (UsageError, Unsupported) as error:
        hint = HINT if isinstance(error, Unsupported) else error.hint
        raise type(error)(f"the draft model {text}: {error.what}", error.where, error.why, hint) from error


def check(text: str, meta: Meta) -> Source:
    """What is known of a draft model. Raises UsageError for one that can't draft for a model with this meta."""
    source = found(text, int(meta["capacity"]))
    read, known = int(source.meta["input_vocab"]), int(meta.get("input_vocab") or meta["vocab"])
    wrong = ""
    if source.meta["vocab"] != meta["vocab"]:
        wrong = f"it has {source.meta['vocab']} ids, and the model {meta['vocab']}"
    elif read < known:
        wrong = f"it reads ids up to {read - 1}, and the model up to {known - 1}"
    elif source.meta.get("mask") is not None:
        wrong = "it unmasks a canvas, and writes no ids one after the other"
    elif window(source.meta):
        wrong = "a row of it holds several ids"
    if wrong:
        raise UsageError(what=f"{text} can't draft for {meta.get('name', 'this model')}", where=WHERE, why=wrong,
                         hint=HINT)  # fmt: skip
    return source


def read(text: str, meta: Meta, weights: dict[str, Tensor], prepare: Prepare, shape: Drafts) -> Model:
    """The model's graphs; its weights are added to `weights`. Raises UsageError, Unsupported, NoTree."""
    check(text, meta)
    program = cached(text, int(meta["capacity"]), prepare)
    step, own = program.graphs[general(program)[0].step.graph], dict(program.weights)
    rows = forms(step, own, Nodes(shape.deepest + 1, shape.deepest + 1, chain=True))  # the ids that came last
    graphs = {"step": step, "chain": rows.tree, "settle": rows.settle}
    for depth in range(1, shape.deepest):
        name = f"level_{depth}"
        level = forms(step, own, shape.rows(range(1, depth + 1)), f"draft_{name}").tree
        graphs[name] = trim(level, {"logits"}, own)  # nobody reads its stash
    weights |= {PREFIX + n: own[n] for g in graphs.values() for n in g.weights()}
    made = {n: renamed(g, f"draft_{n}", weights) for n, g in graphs.items()}
    state = {n: s for n, s in program.state.items() if n in step.outputs}
    return Model(made.pop("step"), made.pop("chain"), made.pop("settle"), list(made.values()), state)


def renamed(graph: Graph, name: str, weights: Mapping[str, Tensor]) -> Graph:
    """The graph under another name, on weights of the prefix."""
    made = copied(graph.fx)
    for node in made.nodes:
        if node.op == "get_attr":
            node.target = PREFIX + str(node.target)
        node.meta.pop("origin", None)  # nothing of the reference computes this
    return replace(build(name, made, dict(graph.inputs), list(graph.outputs), weights), role="bookkeeping")
