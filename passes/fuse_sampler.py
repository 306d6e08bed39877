"""fuse-sampler: the rule joins the step's graph, so that a round is one call that returns a token and not logits.

Calls that follow each other become one graph, in a loop's body and before the first round. What only they exchange
(logits, slots, positions) is then internal, and `prune` takes it off the graph's outputs. A call that makes a value
longer in each round stays by itself where no other reads it: the others then have the same sizes in every round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

from aropt.ir.control import Call, Control, Loop, Seq, calls, map_parts, reads, walk
from aropt.ir.edit import compose
from aropt.ir.program import Graph, Program, growing, own_sizes
from aropt.rewriting.contract import Applies, Contract, Fact, Skips
from aropt.rewriting.target import Target


def several_calls(program: Program) -> str:
    """Why rounds take more calls than they need; "" if they don't."""
    found = next(fusible(program.control, program.graphs), None)
    return f"{' and '.join(call.graph for call in found)} follow each other" if found else ""


FEWEST = Fact("as few calls as there may be", several_calls)


@dataclass(frozen=True)
class FuseSampler:
    name: ClassVar[str] = "fuse-sampler"
    contract: ClassVar[Contract] = Contract(
        "bitwise",
        after=("fuse-attention", "fuse-canvas", "fuse-rules", "fuse-tree", "int8-draft", "ngram-draft", "tree-draft"),
        establishes=(FEWEST,),
    )

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        found = tuple(" + ".join(call.graph for call in run) for run in fusible(program.control, program.graphs))
        return Applies(found) if found else Skips("each round is one call already")

    def run(self, program: Program) -> Program:
        graphs, known = dict(program.graphs), dict[str, Call]()  # by what it is made of: the same calls are one graph
        specs = {n: i.spec for n, i in program.inputs.items()} | {n: s.spec for n, s in program.state.items()}

        def fuse(control: Control, without: str = "begin") -> Control:
            inner = "between" if isinstance(control, Loop) else without
            control = map_parts(control, lambda part: fuse(part, inner))
            if not isinstance(control, Seq):
                return control
            parts = [join(run, without) if len(run) > 1 else run[0] for run in runs(control.body, graphs)]
            return parts[0] if len(parts) == 1 else replace(control, body=tuple(parts))

        def join(run: Sequence[Control], without: str) -> Call:
            together = [call for call in run if isinstance(call, Call)]
            if str(together) not in known:
                name = stem(together, graphs, without)
                while name in graphs:
                    name += "_"
                graphs[name], known[str(together)] = compose(name, together, graphs, specs, program.weights)
            return known[str(together)]

        control = fuse(program.control)
        return program.replace(graphs=graphs, control=control)


PASS = FuseSampler


def runs(parts: Iterable[Control], graphs: Mapping[str, Graph]) -> Iterator[list[Control]]:
    """Calls that follow each other together, every other part by itself.

    A graph with results of a size of its own ends a run: what reads them is traced with that size as an input.
    """
    parts = list(parts)
    late = [part for part in parts if isinstance(part, Call) and by_itself(part, parts, graphs)]
    for together, group in groupby((p for p in parts if p not in late), lambda part: isinstance(part, Call)):
        run: list[Control] = []
        for part in group:
            run.append(part)
            if not isinstance(part, Call) or own_sizes(graphs[part.graph]):
                yield run
                run = []
        if together and run:
            yield run
    for call in late:
        yield [call]


def by_itself(call: Call, parts: Sequence[Control], graphs: Mapping[str, Graph]) -> bool:
    """Whether a call makes values grow and may run after all other parts: they read none of what it writes."""
    if not growing(call, graphs[call.graph]):
        return False
    others = [part for part in parts if part is not call]
    later = [c for part in parts[parts.index(call) + 1 :] for c in calls(part)]
    written = {value for c in later for value in c.writes.values()}
    return not written & set(call.reads.values()) and not any(set(call.writes.values()) & reads(p) for p in others)


def fusible(control: Control, graphs: Mapping[str, Graph]) -> Iterator[list[Call]]:
    """The runs of more than one call."""
    for seq in (node for node in walk(control) if isinstance(node, Seq)):
        for run in runs(seq.body, graphs):
            if len(run) > 1:
                yield [call for call in run if isinstance(call, Call)]


def stem(run: Sequence[Call], graphs: Mapping[str, Graph], without: str) -> str:
    """A name that says which forward and which rule the fused graph holds; `without` if it has no rule."""
    forwards, rules = ([c.graph for c in run if graphs[c.graph].role == role] for role in ("forward", "rule"))
    return "_".join([*forwards[:1], rules[0]]) if rules else without
