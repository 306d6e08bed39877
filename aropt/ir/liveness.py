"""Which outputs of graphs are live: what a later call, a condition or the caller reads, through loops too."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

from torch import fx

from aropt.ir.control import Call, Control, If, Loop, Seq, calls, loops, rewrite, writes
from aropt.ir.program import Graph, Program


def outputs_needed(program: Program) -> dict[str, set[str]]:
    """For each graph, the outputs that some call's value makes live.

    What a loop's rounds decide, and from what, is kept on every path where it is on some: `loop-roles` of the verifier.
    """
    depends, roles = {n: dependencies(g) for n, g in program.graphs.items()}, set[str]()
    while True:
        needed: dict[str, set[str]] = defaultdict(set, {c.graph: set() for c in calls(program.control)})
        live_before(program.control, set(program.outputs), needed, depends, roles)
        left = rewrite(program.control, lambda call, kept=needed: live(call, kept[call.graph]))  # type: ignore[misc]
        found = {r for at in loops(left) for r in at.roles & partly(at.body)}
        if found <= roles:
            return dict(needed)
        roles |= found


def live(call: Call, kept: set[str]) -> list[Control]:
    """The call with these outputs alone."""
    return [replace(call, writes={o: v for o, v in call.writes.items() if o in kept})]


def partly(control: Control) -> set[str]:
    """Values that are written on some paths, not on all."""
    return writes(control) - writes(control, certain=True)


def dependencies(graph: Graph) -> dict[str, set[str]]:
    """For each output, the inputs that it is computed from."""
    sources: dict[fx.Node, set[str]] = {}
    for node in graph.fx.nodes:
        sources[node] = (
            {node.name} if node.op == "placeholder" else set().union(*(sources[n] for n in node.all_input_nodes))
        )
    return {o: sources[n] for o, n in zip(graph.outputs, graph.results(), strict=True)}


def live_before(
    control: Control,
    live: set[str],
    needed: dict[str, set[str]],
    depends: dict[str, dict[str, set[str]]],
    roles: set[str],
) -> set[str]:
    """Values that must exist before the node, for `live` to be right after it, and `roles` after each round."""
    match control:
        case Call(graph, reads, written):
            used = {o for o, v in written.items() if v in live}
            needed[graph] |= used
            return (live - set(written.values())) | {reads[i] for o in used for i in depends[graph][o]}
        case Seq(body):
            for part in reversed(body):
                live = live_before(part, live, needed, depends, roles)
            return live
        case If(cond, then, orelse):
            sides = [live_before(side, live, needed, depends, roles) for side in (then, orelse)]
            return sides[0] | sides[1] | {cond}
        case Loop(_, until, body, emits):
            around = (live - set(emits.values())) | {until}
            watched = set() if control.internal else {control.shown} - {""}
            ends = set(emits) | watched | (roles & control.roles)
            while True:
                before = live_before(body, around | ends, needed, depends, roles) | around
                if before == around:
                    return around
                around = before
