"""A loop over positions in two forms behind an If: one for prompts of one length, whose rows fill the same slots.

compare   whether a batch is ragged, and where its rows end      wait   a row more goes with those that wait
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, map_parts, parts, rewrite
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.guidance import joining, named, parting
from aropt.loops.positions import decoding

I32, I64 = torch.int32, torch.int64
STEP, RAGGED = "step", "ragged"
ENDS = {"join_cache": ("join_ends", joining), "part_cache": ("part_ends", parting)}


def step_of(program: Program) -> Graph | None:
    """The cached step that a loop over positions runs, if it has one form; None if there is none."""
    called = any(c.graph == STEP for loop in decoding(program.control) for c in calls(loop.body))
    return program.graphs[STEP] if called and RAGGED not in program.graphs else None


def in_two_forms(program: Program, dense: Graph, weights: Mapping[str, Tensor]) -> Program:
    """The program with a step for dense rows, told where the last of them goes, beside that for ragged ones."""
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
