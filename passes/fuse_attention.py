"""fuse-attention: rotary embedding, cache update and attention of a decoding step become one op.

`aropt::cached_attention` is what ONNX Runtime has a kernel for (GroupQueryAttention, with caches updated in place). It
wants rows of a batch to fill the same slots, without padding before them. So the program gets two loops behind an
`If`: prompts of one length run the fused step, ragged batches the general one. Attention is recognised by what it
computes (`aropt/rewriting/attention.py`); a step with an attention that is anything else stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.ir.edit import copied
from aropt.ir.program import Graph, Program, Spec
from aropt.ir.torch_compat import build
from aropt.loops.dense import in_two_forms, step_of
from aropt.loops.guidance import NEW_ROWS
from aropt.rewriting.attention import PLACES, NotThis, matches
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.fused import fuse, table_weights
from aropt.rewriting.target import Target

aten = torch.ops.aten
I32, I64 = torch.int32, torch.int64


@dataclass(frozen=True)
class FuseAttention:
    name: ClassVar[str] = "fuse-attention"
    contract: ClassVar[Contract] = Contract("rounding", after=("kv-cache", "merge-linears"), requires=(NEW_ROWS,))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        if not target.has("grouped-query-attention"):
            return Skips(f"the target {target} has no kernel for it")
        step = step_of(program)
        if step is None or not set(PLACES) <= set(step.inputs):
            return Skips("no cached step of a positions loop")
        try:
            found = matches(step, program.weights, program.meta["capacity"])
        except NotThis as reason:
            return Skips(reason.what, ((reason.where or step.name, reason.what),))
        return Applies((f"{len(found)} attentions",)) if found else Skips("the step has no attention")

    def run(self, program: Program) -> Program:
        step, weights = step_of(program), dict(program.weights)
        assert step is not None
        dense = fused(replace(step, fx=copied(step.fx)), program, weights)
        return in_two_forms(program, dense, weights)


PASS = FuseAttention


def fused(graph: Graph, program: Program, weights: dict[str, Tensor]) -> Graph:
    """The step for dense rows: where the last one goes, in the place of slots, positions and what each slot holds."""
    found = matches(graph, weights, program.meta["capacity"])
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
        fuse(graph.fx, one, "cached_attention", (last, total), one.numbers, tables)
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
    return build(graph.name, graph.fx, inputs, [*kept, "last", "total"], weights)
