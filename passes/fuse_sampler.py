"""fuse-sampler: the rule joins the step's graph, so that a round is one call that returns a token and not logits.

Calls that follow each other in a loop's body become one graph. What only they exchange (logits, slots, positions) is
then internal, and `prune` takes it off the graph's outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import ClassVar

from aropt.compose import compose
from aropt.passbase import Applies, Contract, Skips, loops
from aropt.program import Call, Control, Graph, If, Loop, Program, Seq, Spec


@dataclass(frozen=True)
class FuseSampler:
    name: ClassVar[str] = "fuse-sampler"
    contract: ClassVar[Contract] = Contract("bitwise", (), ("one call a round",))

    def plan(self, program: Program, target: str) -> Applies | Skips:
        bodies = [straight(loop.body) for loop in loops(program.control)]
        found = tuple(f"{' + '.join(c.graph for c in body)}" for body in bodies if len(body) > 1)
        return Applies(found) if found else Skips("each round is one call already")

    def run(self, program: Program) -> Program:
        graphs = dict(program.graphs)
        specs = {n: i.spec for n, i in program.inputs.items()} | {n: s.spec for n, s in program.state.items()}

        def fuse(control: Control) -> Control:
            match control:
                case Loop() if len(straight(control.body)) > 1:
                    body = straight(control.body)
                    call = self.join(program, graphs, specs, body)
                    return Loop(control.kind, control.until, call, control.emits, control.params)
                case Loop():
                    return Loop(control.kind, control.until, fuse(control.body), control.emits, control.params)
                case Seq(body):
                    return Seq(tuple(self.fuse_runs(program, graphs, specs, [fuse(part) for part in body])))
                case If(cond, then, orelse):
                    return If(cond, fuse(then), fuse(orelse))
                case Call():
                    return control

        control = fuse(program.control)
        return program.replace(graphs=graphs, control=control)

    def fuse_runs(
        self, program: Program, graphs: dict[str, Graph], specs: dict[str, Spec], parts: list[Control]
    ) -> list[Control]:
        """Calls that follow each other outside of loops (what comes before the first round) as one call each."""
        fused: list[Control] = []
        for together, run in groupby(parts, lambda part: isinstance(part, Call)):
            found = list(run)
            calls_of_run = [part for part in found if isinstance(part, Call)]
            joined = together and len(found) > 1
            fused += [self.join(program, graphs, specs, calls_of_run, "begin")] if joined else found
        return fused

    def join(
        self, program: Program, graphs: dict[str, Graph], specs: dict[str, Spec], body: list[Call], name: str = ""
    ) -> Call:
        """Adds the composed graph; without a name given, it says which step and which rule the graph holds."""
        steps = [c.graph for c in body if "logits" in c.writes.values() and c.graph != "model"]
        rules = [c.graph for c in body if "token" in c.writes.values()]
        name = name or (steps[0] if steps else "step") + "_" + (rules[0] if rules else "loop")
        while name in graphs:
            name += "_"
        graphs[name], call = compose(name, body, program.graphs, specs, program.weights)
        return call


PASS = FuseSampler


def straight(control: Control) -> list[Call]:
    """The calls of a body without branches, else nothing."""
    match control:
        case Call():
            return [control]
        case Seq(body) if all(isinstance(part, Call) for part in body):
            return [part for part in body if isinstance(part, Call)]
        case _:
            return []
