"""fuse-attention: rotary embedding, cache update and attention of a decoding step become one op.

`aropt::cached_attention` is what ONNX Runtime has a kernel for (GroupQueryAttention, with caches updated in place). It
wants rows of a batch to fill the same slots, without padding before them. So the program gets two loops behind an
`If`: prompts of one length run the fused step, ragged batches the general one. Attention is recognised by what it
computes (`aropt/rewriting/attention.py`); a step with an attention that is anything else stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, map_parts, parts, rewrite
from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.loops.guidance import NEW_ROWS, joining, named, parting
from aropt.loops.positions import decoding
from aropt.rewriting.attention import PLACES, Match, NotThis, Source, matches
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target

aten = torch.ops.aten
I32, I64 = torch.int32, torch.int64
STEP, RAGGED = "step", "ragged"
ENDS = {"join_cache": ("join_ends", joining), "part_cache": ("part_ends", parting)}


@dataclass(frozen=True)
class FuseAttention:
    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Contract] = Contract("rounding", after=("kv-cache", "merge-linears"), requires=(NEW_ROWS,))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        if not target.has("grouped-query-attention"):
            return Skips(f"the target {target} has no kernel for it")
        if RAGGED in program.graphs or not restricted(program):
            return Skips("no cached step of a positions loop")
        try:
            found = matches(program.graphs[STEP], program.weights, int(program.meta["capacity"]))
        except NotThis as reason:
            return Skips(reason.what, ((reason.where or STEP, reason.what),))
        return Applies((f"{len(found)} attentions",)) if found else Skips("the step has no attention")

    def run(self, program: Program) -> Program:
        weights = dict(program.weights)
        graph = replace(program.graphs[STEP], fx=copied(program.graphs[STEP].fx))
        dense = fused(graph, program, weights)
        graphs = {(RAGGED if n == STEP else n): g for n, g in program.graphs.items()}
        graphs[RAGGED] = replace(graphs[RAGGED], name=RAGGED)
        graphs |= {STEP: dense, "compare": compare(program.inputs["prompt"].spec)}
        graphs |= {"wait": wait()} if "pend" in graphs else {}
        specs = {"last": Spec(I32, ("B",)), "total": Spec(I32)}
        graphs |= {name: make(name, specs) for old, (name, make) in ENDS.items() if old in graphs}
        ends = {}
        for prefix in (n.removesuffix("pads") for n in program.state if n.endswith("pads")):
            ends[prefix + "last"] = StateSpec("counter", Spec(I32, program.state[prefix + "pads"].spec.dims))
            ends[prefix + "total"] = StateSpec("counter", Spec(I32))
        state = {**program.state, "ragged": StateSpec("flag", Spec(torch.bool)), **ends}
        used = {w for g in graphs.values() for w in g.weights()}
        kept = {w: v for w, v in weights.items() if w in used}
        control = branch(program.control, graphs)
        return program.replace(graphs=graphs, state=state, weights=kept, control=control)


PASS = FuseAttention


def restricted(program: Program) -> bool:
    """Whether a loop over positions runs the step that kv-cache derived."""
    called = any(c.graph == STEP for loop in decoding(program.control) for c in calls(loop.body))
    return called and set(PLACES) <= set(program.graphs[STEP].inputs)


def compare(prompt: Spec) -> Graph:
    """Whether some prompt is shorter than the longest; where the prompt's last row goes if none is."""

    def function(prompt: Tensor, pads: Tensor) -> tuple[Tensor, ...]:
        size = prompt.shape[1]
        return (pads != 0).any(), torch.full_like(pads, 0, dtype=I32) + (size - 1), torch.zeros((), dtype=I32) + size

    inputs = {"prompt": prompt, "pads": Spec(I64, ("N",))}
    return capture_function("compare", function, inputs, ["ragged", "last", "total"])


def wait() -> Graph:
    """A row more goes with the rows that wait to be fed."""
    inputs = {"last": Spec(I32, ("N",)), "total": Spec(I32)}
    return capture_function("wait", lambda last, total: (last + 1, total + 1), inputs, ["last", "total"])


def branch(control: Control, graphs: Mapping[str, Graph]) -> Control:
    """Each loop twice: the general one for ragged batches, the fused one for others."""
    if isinstance(control, Loop) and any(c.graph == STEP for c in calls(control.body)):
        bodies = general(control.body), even(control.body, graphs)
        return If("ragged", *(replace(control, body=body) for body in bodies))
    control = map_parts(control, lambda part: branch(part, graphs))
    entered = [part for part in parts(control) if isinstance(part, Call) and part.graph == "enter"]
    if not isinstance(control, Seq) or not entered:
        return control
    more = [named(graphs["join_ends"])] if "join_ends" in graphs else []
    at = control.body.index(entered[-1]) + 1
    return replace(control, body=(*control.body[:at], *map(compared, entered), *more, *control.body[at:]))


def compared(entered: Call) -> Call:
    """The call of `compare` for the prompts of an `enter`."""
    pads = entered.writes["pads"]
    ends = {n: pads.removesuffix("pads") + n for n in ("last", "total")}
    return Call("compare", {"prompt": entered.reads["prompt"], "pads": pads}, {"ragged": "ragged", **ends})


def general(control: Control) -> Control:
    return rewrite(control, lambda c: [replace(c, graph=RAGGED) if c.graph == STEP else c])


def even(control: Control, graphs: Mapping[str, Graph]) -> Control:
    """The body without `place`: the fused step knows where its rows go."""

    dense = graphs[STEP]

    def change(call: Call) -> list[Control]:
        if call.graph == STEP:
            prefix = call.reads["ids"].removesuffix("feed")
            reads = {n: prefix + n for n in dense.inputs} | {"ids": call.reads["ids"]}
            return [replace(call, reads=reads, writes={n: call.writes.get(n, prefix + n) for n in dense.outputs})]
        if call.graph == "pend":
            ends = {n: call.reads["feed"].removesuffix("feed") + n for n in ("last", "total")}
            return [call, Call("wait", ends, ends)]
        if call.graph in ENDS:
            return [call, named(graphs[ENDS[call.graph][0]])]
        return [] if call.graph == "place" else [call]

    return rewrite(control, change)


def fused(graph: Graph, program: Program, weights: dict[str, Tensor]) -> Graph:
    """The step for dense rows: where the last one goes, in the place of slots, positions and what each slot holds."""
    found = matches(graph, weights, int(program.meta["capacity"]))
    tables = table_weights(found, weights)
    call = graph.fx.call_function
    ids = next(iter(graph.fx.nodes))
    with graph.fx.inserting_after(ids):
        total = graph.fx.placeholder("total")
        last = graph.fx.placeholder("last")
    with graph.fx.inserting_before(next(n for n in graph.fx.nodes if n.op != "placeholder")):
        batch, rows = (call(aten.sym_size.int, (ids, i)) for i in (0, 1))
        start = call(aten.sub.Tensor, (call(aten._to_copy.default, (total,), {"dtype": I64}), rows))
        slots = call(aten.add.Tensor, (call(aten.arange.default, (rows,)), start))
        at = call(aten.expand.default, (call(aten.unsqueeze.default, (slots, 0)), [batch, rows]))
        after = [call(aten.add.Tensor, (n, 1)) for n in (last, total)]
    for one in found:
        replace_attention(graph.fx, one, (last, total), batch, tables)
    placed = {n.name: n for n in graph.fx.nodes if n.op == "placeholder"}
    placed["slots"].replace_all_uses_with(slots)
    placed["positions"].replace_all_uses_with(at)
    kept = {o: n for o, n in zip(graph.outputs, graph.results(), strict=True) if o != "slot_positions"}
    output = next(n for n in reversed(graph.fx.nodes) if n.op == "output")
    output.args = ((*kept.values(), *after),)
    graph.fx.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    for name in PLACES:
        graph.fx.erase_node(placed[name])
    specs = {**graph.inputs, "total": Spec(I32), "last": Spec(I32, graph.inputs["ids"].dims[:1])}
    inputs = {n.name: specs[n.name] for n in graph.fx.nodes if n.op == "placeholder"}
    return build(STEP, graph.fx, inputs, [*kept, "last", "total"], weights)


def table_weights(found: list[Match], weights: dict[str, Tensor]) -> dict[Any, list[str]]:
    """Adds the rotary tables to the weights, each once; returns their names."""
    names: dict[Any, list[str]] = {}
    for table in (m.rotary for m in found if m.rotary is not None):
        if table not in names:
            names[table] = [f"rotary.{kind}_{len(names)}" for kind in ("cos", "sin")]
            weights |= dict(zip(names[table], (table.cos, table.sin), strict=True))
    return names


def replace_attention(
    graph: fx.Graph, one: Match, ends: tuple[fx.Node, ...], batch: fx.Node, tables: dict[Any, list[str]]
) -> None:
    """One op for a match."""
    with graph.inserting_before(one.result):
        angles = [graph.get_attr(n) for n in tables[one.rotary]] if one.rotary else [None, None]
        heads, kv_heads, *_ = one.numbers
        widths = [n * int(one.stored[0].meta["val"].shape[3]) for n in (heads, kv_heads, kv_heads)]
        rows = (
            [features(graph, s, w, batch) for s, w in zip(one.rows, widths)]
            if len(one.rows) > 1
            else [one.rows[0].node, None, None]
        )
        caches = [n.args[0] for n in one.stored]
        op = ops.load("cached_attention").overload
        call = graph.call_function(op, (*rows, *caches, *ends, *angles, *one.numbers))
        call.meta = {"where": one.node.meta.get("where", "")}
        out, *new = (graph.call_function(operator.getitem, (call, i)) for i in range(3))
        if one.last:
            out = graph.call_function(aten.slice.Tensor, (out, 1, -1, 2**63 - 1))
    out.meta = {k: v for k, v in one.result.meta.items() if k != "val"}
    one.result.replace_all_uses_with(out)
    for old, updated in zip(one.stored, new, strict=True):
        for user in [u for u in old.users if u.op == "output"]:
            user.replace_input_with(old, updated)


def features(graph: fx.Graph, source: Source, width: int, batch: fx.Node) -> fx.Node:
    """The source as a value [B, R, width]."""
    shape = source.node.meta["val"].shape
    if len(shape) == 4:
        return graph.call_function(aten.reshape.default, (source.node, [batch, -1, width]))
    if int(shape[2]) == width:
        return source.node
    return graph.call_function(aten.slice.Tensor, (source.node, 2, source.offset, source.offset + width))
