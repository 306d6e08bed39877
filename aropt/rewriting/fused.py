"""One op of ours in the place of what `attention.py` matched: rotary embedding, cache update, attention."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.program import Graph, Program
from aropt.rewriting.attention import Form, Match, NotThis, Source, beside, matches
from aropt.rewriting.contract import Applies, Skips

aten = torch.ops.aten
END = 2**63 - 1


def planned(program: Program, graphs: Sequence[Graph], form: Form, otherwise: str) -> Applies | Skips:
    """What there is to fuse in these graphs, whose attention has that form; `otherwise`: why there is nothing."""
    found, rejected = [], []
    for graph in graphs:
        try:
            count = len(matches(graph, program.weights, program.meta["capacity"], form))
            found += [f"{graph.name}: {count} attentions"] if count else []
        except NotThis as reason:
            rejected.append((reason.where or graph.name, reason.what))
    if not found:
        return Skips(rejected[0][1] if rejected else otherwise, tuple(rejected))
    return Applies(tuple(found), tuple(rejected))


def changed(
    program: Program, graphs: Sequence[Graph], fused: Callable[[Graph, dict[str, Tensor], int], Graph]
) -> Program:
    """The program with each of these graphs that `planned` counts changed by `fused`, which adds to the weights."""
    weights, made = dict(program.weights), dict(program.graphs)
    for graph in graphs:
        try:
            made[graph.name] = fused(graph, weights, program.meta["capacity"])
        except NotThis:
            continue  # `planned` says why
    used = {w for g in made.values() for w in g.weights()}
    return program.replace(graphs=made, weights={w: v for w, v in weights.items() if w in used})


def visible(graph: fx.Graph, one: Match) -> fx.Node:
    """The mask bool [B, R, S] that is the same for all heads."""
    mask: Any = one.node.args[3]
    if mask.target is aten.unsqueeze.default and mask.args[1] == 1:
        return mask.args[0]  # type: ignore[no-any-return]
    with graph.inserting_before(one.result):
        return graph.call_function(aten.select.int, (mask, 1, 0))


def table_weights(found: list[Match], weights: dict[str, Tensor]) -> dict[Any, list[str]]:
    """Adds the rotary tables to the weights, each once; returns their names."""
    names: dict[Any, list[str]] = {}
    for table in (m.rotary for m in found if m.rotary is not None):
        if table not in names:
            names[table] = [f"rotary.{kind}_{len(names)}" for kind in ("cos", "sin")]
            weights |= dict(zip(names[table], (table.cos, table.sin), strict=True))
    return names


def fuse(
    graph: fx.Graph, one: Match, op: str, places: Sequence[Any], numbers: Sequence[Any], tables: dict[Any, list[str]]
) -> None:
    """The op for a match; `places` say where its rows go, `numbers` are its own. `build` removes what nobody reads."""
    call = graph.call_function
    with graph.inserting_before(one.result):
        angles = [graph.get_attr(n) for n in tables[one.rotary]] if one.rotary else [None, None]
        heads, kv_heads, *_ = one.numbers
        widths = [n * int(one.stored[0].meta["val"].shape[3]) for n in (heads, kv_heads, kv_heads)]
        rows: list[Any] = [one.rows[0].node, None, None]
        if len(one.rows) > 1:
            rows = [features(graph, source, width) for source, width in zip(one.rows, widths, strict=True)]
        caches, kept = zip(*(kept_of(n) for n in one.stored), strict=True)
        made = call(ops.load(op).overload, (*rows, *caches, *places, *angles, *numbers))
        made.meta = {"where": one.node.meta.get("where", "")}
        out, *new = (call(operator.getitem, (made, i)) for i in range(3))
        if one.last:
            out = call(aten.slice.Tensor, (out, 1, -1, END))
    out.meta = {k: v for k, v in one.result.meta.items() if k != "val"}
    one.result.replace_all_uses_with(out)
    for old, updated in zip(kept, new, strict=True):
        for user in [u for u in old.users if u.op == "output"]:
            user.replace_input_with(old, updated)


def kept_of(stored: Any) -> tuple[fx.Node, fx.Node]:
    """A cache, and what a graph may return of it: its update, or the rows of nodes behind it."""
    return beside(stored) if stored.target is aten.cat.default else (stored.args[0], stored)


def features(graph: fx.Graph, source: Source, width: int) -> fx.Node:
    """The source as a value [B, R, width]."""
    shape = source.node.meta["val"].shape
    if len(shape) == 4:
        return graph.call_function(aten.flatten.using_ints, (source.node, 2))
    if int(shape[2]) == width:
        return source.node
    return graph.call_function(aten.slice.Tensor, (source.node, 2, source.offset, source.offset + width))
