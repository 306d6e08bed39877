"""Several rounds a call: the onnxruntime target's rounds where calls and what the host does between them show.

`aropt.exporters.unroll` repeats a step's graph in one model, whose caches stay in their buffers. A session of it runs
what is not streamed; after the limit it may run a few rounds more, which nobody sees. It generates what stepping
generates (compared here over the cases that validation knows, and lengths around its own), and is picked by timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aropt.errors import Unsupported, VerificationFailed
from aropt.ir.control import Call, Control, If, Loop, Seq, loops, reads
from aropt.ir.executor import Executor, Values
from aropt.ir.program import Program, own_sizes
from aropt.ir.units import ids_of
from aropt.loops.positions import decoding
from aropt.loops.request import room
from aropt.loops.requests.cases import Case, cases
from aropt.loops.runtime import answer
from aropt.loops.speculate import checks_drafts
from aropt.targets.ort.files import file
from aropt.targets.ort.plan import Planned
from aropt.validate.compare import Outcome, Verdict
from aropt.validate.stops import with_stops

ROUNDS = 4  # a call, of which each round then pays a quarter
LARGEST = 32 * 2**20  # bytes of weights, which take a millisecond or more to read: a call is next to nothing of it


def spare(program: Program, call: Call, values: Values) -> int:
    """Rounds for which the caches have slots, after those for the prompt and the new tokens that were asked for."""
    states = [(value, program.state[value]) for value in call.reads.values() if value in program.state]
    slots = [values[value].shape[state.axis] for value, state in states if state.axis is not None]
    needed = values["prompt"].shape[1] + int(values["limit"]) if "prompt" in values else 0
    return min([*slots, program.meta["capacity"]]) - needed if needed else 0


def eligible(program: Program) -> dict[str, Loop]:
    """Loops by the graph that is all of their body: ended by a limit, after its end a sequence emits -1.

    What a round too many writes is no harm: nothing reads the loop's state after it.
    """
    found: dict[str, Loop] = {}
    if checks_drafts(program.control):  # other loops have begun before, or go on after: the limit is not theirs
        return found
    for loop in decoding(program.control):
        call = loop.body
        if not isinstance(call, Call) or "limit" not in loop.params or not loop.emits:
            continue
        if set(call.writes.values()) & {*program.outputs, *read_after(program.control, loop)}:
            continue
        graph = program.graphs[call.graph]
        emitted = [graph.outputs[o] for o, value in call.writes.items() if value in loop.emits]
        if not own_sizes(graph) and all(spec.dtype == torch.int64 for spec in emitted):
            found[call.graph] = loop
    return found


def read_after(control: Control, loop: Loop) -> set[str]:
    """Values that may be read once a loop has ended."""
    match control:
        case Seq(body):
            at = next((i for i, part in enumerate(body) if loop in loops(part)), len(body))
            later = {v for part in body[at + 1 :] for v in reads(part)}
            return later | (read_after(body[at], loop) if at < len(body) else set())
        case If(_, then, orelse):
            return read_after(then, loop) | read_after(orelse, loop)
        case Loop() if control is not loop:
            return reads(control) if loop in loops(control.body) else set()
    return set()


def build(program: Program, stepping: Planned) -> dict[str, Path]:
    """Writes the models, by graph. Raises Unsupported for a graph that can't be repeated, or where it can't pay."""
    from aropt.exporters.onnx import save
    from aropt.exporters.unroll import unroll

    found = eligible(program)
    if not found:
        raise Unsupported(what="no loop over positions is one graph")
    size = max(sum(program.weights[w].nbytes for w in program.graphs[graph].weights()) for graph in found)
    if size > LARGEST:
        raise Unsupported(what=f"a round reads {size / 2**20:.0f} MiB of weights, beside which a call takes no time")
    made = {}
    for graph, loop in found.items():
        made[graph] = file(stepping.folder, graph).with_name(f"rounds-{ROUNDS}.onnx")
        model = unroll(stepping.translated(graph), program.graphs[graph], loop, stepping.aliases[graph], ROUNDS)
        save(model, made[graph])
    return made


def compare(program: Program, stepping: Executor, several: Executor) -> dict[str, Any]:
    """Whether two executors generate the same. Raises VerificationFailed if a token differs."""
    verdict, tokens = Verdict(), 0
    for case in with_stops([*lengths(program), *cases(program)], verdict, {}, program.meta["vocab"]):
        want, got = (answer(program, case, executor) for executor in (stepping, several))
        tokens += sum(map(len, want))
        verdict.outcomes.append(Outcome(case, generated=want))
        if got != want:
            raise VerificationFailed(
                what=f"{ROUNDS} rounds a call generate other tokens than stepping",
                where=case.name,
                why=case.repro(program.name),
                hint="please report it; the target steps",
            )
    return {"status": "pass", "cases": len(verdict.outcomes), "tokens": tokens, "level": "tokens equal"}


def lengths(program: Program) -> list[Case]:
    """One prompt and as many new rows as end before, at and after calls of several rounds."""
    example = cases(program, quick=True)[0]
    most = room(program, example.prompts[0])
    sizes = [ids_of(program.meta, rows) for rows in range(2, 2 * ROUNDS + 3)]
    return [replace(example, name=f"{n} tokens", n=n) for n in sizes if n <= most]


def clean(folder: Path, used: Mapping[str, Path]) -> None:
    """Removes the models that are not used."""
    for path in folder.glob("models/*/onnxruntime/rounds-*"):
        if path.with_name(path.name.removesuffix(".data")) not in used.values():
            path.unlink()
