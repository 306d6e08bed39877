"""prune: dead values, dead calls, dead code, and constants computed once.

A value is live if a later call, condition or output reads it (through loops too). Graph outputs that are never live
go, with all that only they needed; so do states and graphs. Nodes that depend on weights alone are folded.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, fx

from aropt.ir.control import Call, Control, calls, conditions, rewrite
from aropt.ir.edit import inline, trim
from aropt.ir.liveness import outputs_needed
from aropt.ir.program import Graph, Program
from aropt.ir.torch_compat import build
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class Prune:
    """Options: `fold`, whether constants are folded; `limit`, the largest folded constant in MiB."""

    fold: bool = True
    limit: int = 64
    name: ClassVar[str] = "prune"
    contract: ClassVar[Contract] = Contract("bitwise", after=("fuse-sampler",))

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        dead = sorted(n for n, kept in outputs_needed(program).items() if kept < set(program.graphs[n].outputs))
        constant = [n for n, g in program.graphs.items() if self.fold and constants(g)]
        found = tuple([f"outputs of {n}" for n in dead] + [f"constants of {n}" for n in constant])
        return Applies(found) if found else Skips("nothing is dead or constant")

    def run(self, program: Program) -> Program:
        weights = dict(program.weights)
        while True:
            needed = outputs_needed(program)
            graphs = {}
            for name, kept in needed.items():
                graph = program.graphs[name]
                if kept:
                    graphs[name] = trim(graph, kept, weights) if kept < set(graph.outputs) or idle(graph) else graph
            control = rewrite(program.control, lambda call, g=graphs: shorten(call, g))  # type: ignore[misc]
            done = set(graphs) == set(program.graphs) and all(graphs[n] is program.graphs[n] for n in graphs)
            program = program.replace(graphs=graphs, control=control)
            if done:
                break
        if self.fold:
            program = program.replace(graphs={n: fold(g, weights, self.limit) for n, g in program.graphs.items()})
        touched = {v for c in calls(program.control) for v in (*c.reads.values(), *c.writes.values())} | conditions(
            program.control
        )
        touched |= set(program.outputs)
        used = {w for g in program.graphs.values() for w in g.weights()}
        return program.replace(
            state={n: s for n, s in program.state.items() if n in touched},
            weights={w: v for w, v in weights.items() if w in used},
        )


PASS = Prune


def shorten(call: Call, graphs: dict[str, Graph]) -> list[Control]:
    """The call without dead outputs and inputs; nothing if none is left."""
    if call.graph not in graphs:
        return []
    graph = graphs[call.graph]
    reads = {i: call.reads[i] for i in graph.inputs}
    return [replace(call, reads=reads, writes={o: v for o, v in call.writes.items() if o in graph.outputs})]


def idle(graph: Graph) -> bool:
    """Whether some input is not used."""
    return any(node.op == "placeholder" and not node.users for node in graph.fx.nodes)


def constants(graph: Graph) -> list[fx.Node]:
    """Calls that depend on weights alone (sizes and random ops aside)."""
    known: set[fx.Node] = set()
    found = []
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            known.add(node)
        computed = node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)
        if computed and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            known.add(node)
            found.append(node)
    return found


def fingerprint(value: Tensor) -> str:
    """12 hex digits of a hash of type and content: equal constants share a name, others never do."""
    data = value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return hashlib.sha256(f"{value.dtype}{list(value.shape)}".encode() + data).hexdigest()[:12]


def fold(graph: Graph, weights: dict[str, Tensor], limit: int) -> Graph:
    """Replaces constant nodes by weights "folded.<hash of the content>"."""
    found = [n for n in constants(graph) if n.meta["val"].numel() * n.meta["val"].element_size() <= limit * 2**20]
    edge = [n for n in found if any(u not in found for u in n.users)]
    if not edge:
        return graph
    new = fx.Graph()
    results = inline(new, graph, {n: new.placeholder(n) for n in graph.inputs})
    new.output(tuple(results.values()))
    memo: dict[fx.Node, Tensor] = {}
    twins = dict(
        zip(
            [n for n in graph.fx.nodes if n.op == "call_function"],
            [n for n in new.nodes if n.op == "call_function"],
            strict=True,
        )
    )
    with torch.no_grad():
        for node in found:
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda n: memo[n] if n in memo else weights[str(n.target)]
            )
            memo[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node in edge:
        value = memo[node].contiguous().clone()
        name = f"folded.{fingerprint(value)}"
        weights[name] = value
        with new.inserting_before(twins[node]):
            twins[node].replace_all_uses_with(new.get_attr(name))
    return build(graph.name, new, graph.inputs, list(graph.outputs), weights, graph.role)
