"""Guided programs: two branches of one forward, conditional and unconditional, and what passes need to know of them.

The plain program runs the forward twice a round: on `tokens`, and on `negative_tokens` with its results under names
with the prefix NEGATIVE. `last` puts the rows of both together for the rule, the conditional ones first. Where rounds
differ in what they run, the state of both as one batch has names with the prefix JOINED.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, Loop, Seq, calls, loops, map_parts, parts, rewrite, transform
from aropt.ir.dims import replaced
from aropt.ir.edit import compose, trim
from aropt.ir.program import Graph, Program, Spec
from aropt.ir.units import window
from aropt.loops.rules import GUIDED, chosen, rule
from aropt.rewriting.contract import Fact

NEGATIVE, JOINED, TWICE = "negative_", "joined_", "2*B"
TOKENS, UNCONDITIONAL = "tokens", NEGATIVE + "tokens"
INPUTS = ("negative", "guidance", "guidance_from", "guidance_to")
RULES = {"greedy": False, "sample": True}  # graphs, and whether they draw


def forwards(program: Program) -> dict[str, Call]:
    """The calls that run the whole forward in a loop over positions, by the state that they read."""
    found = {}
    for loop in loops(program.control, "positions"):
        for call in calls(loop.body):
            state = program.state.get(call.reads.get("ids", ""))
            if state is not None and state.kind == "tokens" and list(program.graphs[call.graph].inputs) == ["ids"]:
                found[call.reads["ids"]] = call
    return found


def unlike(program: Program) -> str:
    """Why the program is not one whose rounds run the forward on both branches, one after the other; "" if it is."""
    if not guided(program):
        return "there is no guidance"
    if any(not straight(loop.body) for loop in loops(program.control, "positions")):
        return "cfg-interval chose which rounds run both branches"
    if set(forwards(program)) != {TOKENS, UNCONDITIONAL}:
        return "no round runs the forward on two branches"
    return ""


TWO_BRANCHES = Fact("two branches", unlike)
TOGETHER = Fact("branches together", lambda p: "" if unlike(p) else "rounds run the forward on each branch by itself")
GROWING = Fact(
    "a full forward over growing tokens",
    lambda p: "" if forwards(p) else "no loop runs a full forward over growing tokens",
)


def whole_rows(program: Program) -> str:
    """Why rounds of a loop over positions do not compute new rows alone; "" if they do."""
    if not loops(program.control, "positions"):
        return "there is no loop over positions"
    return "each round runs the full forward, no cached step" if forwards(program) else ""


NEW_ROWS = Fact("new rows alone", whole_rows)


def guided(program: Program) -> bool:
    return bool(set(GUIDED) & set(program.meta.get("rules", ())))


def straight(body: Control) -> bool:
    return isinstance(body, Seq) and all(isinstance(part, Call) for part in body.body)


def alone(program: Program) -> dict[str, Graph]:
    """The graphs that read or write both branches, for the conditional one alone."""
    vocab, names = program.meta["vocab"], tuple(r for r in program.meta["rules"] if r not in GUIDED)
    spec = program.graphs["last"].inputs["logits"]
    found = {"append": trim(program.graphs["append"], {TOKENS}, {}), "last": last(spec)}
    start = program.graphs["start"]
    found["start"] = trim(start, set(start.outputs) - {UNCONDITIONAL}, program.weights)
    never = program.meta.get("never", ())
    for name, sampled in RULES.items():
        function, inputs = rule(chosen(names), vocab, sampled, window(program.meta), never)
        found[name] = capture_function(name, function, inputs, list(program.graphs[name].outputs), "rule")
    return found


def together(program: Program) -> dict[str, Graph]:
    """The graphs that read or write both branches, for one batch of both."""
    found = {"append": append("append", program), "last": last(program.graphs["last"].inputs["logits"])}
    graph = program.graphs["start"]
    tokens = {n: graph.outputs[n] for n in (TOKENS, UNCONDITIONAL)}
    stack = capture_function("stack", lambda **branches: torch.cat(list(branches.values())), tokens, [TOKENS])
    sequence = [named(graph), Call("stack", {n: n for n in tokens}, {TOKENS: TOKENS})]
    both, _ = compose("start", sequence, {"start": graph, "stack": stack}, graph.inputs, program.weights)
    return {**found, "start": trim(both, set(graph.outputs) - {UNCONDITIONAL}, program.weights)}


def append(name: str, program: Program) -> Graph:
    """tokens [2B, T], token [B] -> tokens [2B, T + 1]: both branches get the same token."""

    def function(tokens: Tensor, token: Tensor) -> Tensor:
        return torch.cat([tokens, torch.cat([token, token]).unsqueeze(1)], 1)

    inputs = {"tokens": rebatch(program.state[TOKENS].spec, TWICE), "token": program.graphs["append"].inputs["token"]}
    return capture_function(name, function, inputs, [TOKENS])


def last(spec: Spec) -> Graph:
    """The last row of the logits of one branch, or of a batch of both."""

    def function(logits: Tensor) -> Tensor:
        return logits[:, -1].to(torch.float32)

    return capture_function("last", function, {"logits": spec}, ["row"])


def without(control: Control, graphs: Mapping[str, Graph]) -> Control:
    """The control without the unconditional branch's forward; `graphs` are called in the place of those named so."""

    def change(call: Call) -> list[Control]:
        if call.reads.get("ids") == UNCONDITIONAL:
            return []
        return [fitted(call, graphs[call.graph]) if call.graph in graphs else call]

    return rewrite(control, change)


def fitted(call: Call, graph: Graph) -> Call:
    """The call with another graph, which has no more inputs and outputs."""
    reads, writes = {i: call.reads[i] for i in graph.inputs}, {o: call.writes[o] for o in graph.outputs}
    return replace(call, graph=graph.name, reads=reads, writes=writes)


def bodies(control: Control, change: Callable[[Control], Control]) -> Control:
    """The control with the bodies of its loops over positions changed."""

    def visit(node: Control) -> Control:
        return replace(node, body=change(node.body)) if isinstance(node, Loop) and node.kind == "positions" else node

    return transform(control, visit)


def in_rounds(
    control: Control, model: str, change: Callable[[Call, set[str]], list[Control]], fed: set[str] | None = None
) -> Control:
    """The control with its calls changed; `change` is told whose tokens the forward reads in the same round."""
    if isinstance(control, Call):
        return Seq(tuple(change(control, fed or set())))
    fed = {c.reads["ids"] for c in parts(control) if isinstance(c, Call) and c.graph == model}
    return map_parts(control, lambda part: in_rounds(part, model, change, fed))


def joining(name: str, specs: Mapping[str, Spec]) -> Graph:
    """State of both branches as one batch, the conditional rows first.

    Counters are the same of both, and so is what they are fed when they are joined.
    """
    twins = {n: n if n == "feed" else NEGATIVE + n for n, s in specs.items() if s.dims}

    def function(**values: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([values[n], values[twins[n]]]) if n in twins else values[n].clone() for n in specs)

    inputs = {**specs, **{twin: specs[n] for n, twin in twins.items()}}
    return capture_function(name, function, inputs, [JOINED + n for n in specs])


def parting(name: str, specs: Mapping[str, Spec]) -> Graph:
    """The conditional rows of joined state."""

    def function(**values: Tensor) -> tuple[Tensor, ...]:
        return tuple((x[: x.shape[0] // 2] if x.dim() else x).clone() for x in values.values())

    inputs = {JOINED + n: rebatch(s, TWICE) for n, s in specs.items()}
    return capture_function(name, function, inputs, list(specs))


def named(graph: Graph) -> Call:
    """A call whose values are named as the graph's inputs and outputs."""
    return Call(graph.name, {n: n for n in graph.inputs}, {n: n for n in graph.outputs})


def rebatch(spec: Spec, batch: str) -> Spec:
    """The spec with the program's batch in place of the graph's B."""
    return Spec(spec.dtype, tuple(replaced(d, {"B": batch}) for d in spec.dims))
