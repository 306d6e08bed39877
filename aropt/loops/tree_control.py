"""The control of rounds that check a tree of drafts, in the place of a loop over positions (see trees.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from aropt.ir.control import Call, Control, If, Loop, Seq, loops, map_parts, parts, renamed, sequence
from aropt.ir.edit import call_by_name
from aropt.ir.program import Program
from aropt.loops.accept import MATCH
from aropt.loops.drafters import Drafter, Ranked
from aropt.loops.speculate import Rounds, checking, dense, rounds_of, varies
from aropt.loops.trees import Made


def general(program: Program) -> list[Rounds]:
    """The loops over positions whose step takes rows of any prompts, short ones padded."""
    found = [made for loop in loops(program.control, "positions") if (made := rounds_of(loop, program.graphs))]
    return [made for made in found if not dense(program.graphs[made.step.graph]) and made.before]


def unfit(program: Program, widest: int) -> str:
    """Why no tree of drafts, of so many children of a node, can be checked in a program; "" if one can."""
    found = general(program)
    if not found:
        return "no loop over positions runs a cached step for rows of any prompt"
    if program.state["feed"].spec.dims[0] != "B":
        return "a round feeds both branches of guidance"
    if widest > int(program.meta["vocab"]):
        return f"a node has {widest} drafts, of {program.meta['vocab']} ids"
    if other := sorted({v for one in found for v in varies(program, one.rule)}):
        return f"the rule depends on more than a row's logits: {', '.join(other)}"
    return ""


def beside(program: Program, found: Sequence[Rounds], made: Made, drafted: Callable[[Rounds], Control]) -> Control:
    """Each loop, in all its forms, as it was for large batches, and with drafts for others."""

    def of(loop: Control) -> Rounds | None:
        return next((one for one in found if one.loop == loop), None)

    def change(node: Control) -> Control:
        one = of(node)
        if one is None and isinstance(node, If):  # the same rounds for rows that fill the same slots, or not
            both = [rounds_of(p, program.graphs) if isinstance(p, Loop) else None for p in parts(node)]
            if None not in both and both[0].rule.graph == both[1].rule.graph:  # type: ignore[union-attr]
                one = next((o for p in parts(node) if (o := of(p))), None)
        if one is None:
            return map_parts(node, change)
        return Seq((call_by_name(made.graphs["open"]), If("speculates", drafted(one), node)))

    return change(program.control)


def with_drafts(one: Rounds, drafter: Drafter, made: Made, rule: Ranked) -> Control:
    """The prompt's round, the rounds that check drafts, and the ids of all of them."""
    plain, graphs = one.loop, made.graphs
    (emitted,) = plain.emits
    opening = sequence(plain.body)
    count = len(one.before)
    lead = Call("lead", {"token": emitted}, {n: n for n in graphs["lead"].outputs})
    first = (*opening[:count], *drafter.prompt, *opening[count:], call_by_name(graphs["opened"]), lead)
    prompt = replace(plain, body=Seq(first), until="begun", emits={emitted: "first"})
    rounds = checking("finished", Seq((*drafter.rounds, *checked(one, made, drafter, rule))), plain, "node_row", "path")
    if rule.accept != MATCH:
        rounds = replace(rounds, drawn=rule.accept.label, drafts=offered_by(rule, made))
    return Seq((*drafter.before, prompt, rounds, call_by_name(graphs["merge"])))


def checked(one: Rounds, made: Made, drafter: Drafter, rule: Ranked) -> tuple[Call, ...]:
    """What a round does with its drafts."""
    plain, graphs = one.loop, made.graphs
    tree = graphs["tree"]
    verify = Call(
        "tree",
        {n: drafter.fed.get(n, n) for n in tree.inputs},
        {n: drafter.logits if n == "logits" else n for n in tree.outputs},
    )
    rows = renamed(call_by_name(graphs["node_rows"]), {"row": "node_row"})
    names = {plain.evidence: "node_row", plain.decides: "picks", "position": "node_places", "streams": "node_streams"}
    picks = [renamed(one.rule, names)] if rule.accept.reads("picks") else []
    chances = [weighed(made, rule)] if rule.accept.reads("logits") else []
    spread, accept, settle = (call_by_name(graphs[n]) for n in ("spread", rule.accept.graph, "settle"))
    picked = (rows, *picks, *chances, accept)
    return spread, *drafter.widened, verify, *drafter.narrowed, *picked, *drafter.settled, settle


def weighed(made: Made, rule: Ranked) -> Call:
    """The call that says by which logits the rule draws after each node."""
    function, inputs = rule.chances()
    graph = made.add(f"chances_{rule.call.graph}", function, inputs, ["node_logits"], "rule")
    reads = {n: rule.call.reads.get(n, n) for n in inputs} | {"logits": "node_row"}
    return Call(graph.name, reads, {"node_logits": "node_logits"})


def offered_by(rule: Ranked, made: Made) -> tuple[str, ...]:
    """The values from which validation draws a round's ids again: its drafts, and by which logits these were drawn."""
    levels = [name for name in made.graphs[rule.accept.graph].inputs if name.startswith("drafted_")]
    return ("nodes", "node_parents", "origin", *levels) if rule.accept.label == "distribution" else ()
