"""Several rounds a call: the onnxruntime target's rounds where calls and what the host does between them show.

`aropt.exporters.unroll` repeats a step's graph in one model, whose caches stay in their buffers; a session of it takes
turns with the step's own, which runs the prompt, what is streamed, and the last rounds. It generates what stepping
generates (compared here over the cases that validation knows, and lengths around its own), and each of its rounds holds
the weights once more in the layout that ONNX Runtime multiplies: it is for small models, and picked by timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from aropt.errors import Unsupported, VerificationFailed
from aropt.passbase import loops, own_sizes
from aropt.program import Call, Loop, Program
from aropt.runtime import room
from aropt.validate import Case, Outcome, Verdict, cases, with_stops

ROUNDS = 4  # a call, of which each round then pays a quarter
LARGEST = 32 * 2**20  # bytes of weights, which take a millisecond or more to read: a call is next to nothing of it


def files(folder: Path, graphs: Sequence[str]) -> dict[str, Path]:
    """The models of several rounds in an artifact, by graph."""
    found = {graph: sorted((folder / "models" / graph / "onnxruntime").glob("rounds-*.onnx")) for graph in graphs}
    return {graph: paths[0] for graph, paths in found.items() if paths}


def of(outputs: Any, emits: Sequence[str]) -> int:
    """How many rounds write these outputs."""
    return 1 + sum(name.startswith(f"{emits[0]}@") for name in outputs) if emits else 1


def eligible(program: Program) -> dict[str, Loop]:
    """Loops by the graph that is all of their body: ended by a limit, after its end a sequence emits -1."""
    found: dict[str, Loop] = {}
    for loop in loops(program.control, "positions"):
        call = loop.body
        if not isinstance(call, Call) or "limit" not in loop.params or not loop.emits:
            continue
        graph = program.graphs[call.graph]
        emitted = [graph.outputs[o] for o, value in call.writes.items() if value in loop.emits]
        if not own_sizes(graph) and all(spec.dtype == torch.int64 for spec in emitted):
            found[call.graph] = loop
    return found


def build(program: Program, executor: Any) -> dict[str, Path]:
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
        made[graph] = executor.folder / "models" / graph / "onnxruntime" / f"rounds-{ROUNDS}.onnx"
        model = unroll(executor.translated(graph), program.graphs[graph], loop, executor.aliases[graph], ROUNDS)
        save(model, made[graph])
    return made


def compare(program: Program, executor: Any, several: dict[str, Path]) -> dict[str, Any]:
    """Generates with several rounds a call what stepping does. Raises VerificationFailed if a token differs."""
    verdict, tokens = Verdict(), 0
    try:
        for case in with_stops([*lengths(program), *cases(program)], verdict):
            executor.rounds = {}
            want = generated(program, executor, case)
            executor.rounds = several
            got = generated(program, executor, case)
            tokens += sum(map(len, want))
            verdict.outcomes.append(Outcome(case, generated=want))
            if got != want:
                raise VerificationFailed(
                    what=f"{ROUNDS} rounds a call generate other tokens than stepping",
                    where=case.name,
                    why=case.repro(program.name),
                    hint="please report it; the target steps",
                )
    finally:
        executor.rounds = {}
    return {"status": "pass", "cases": len(verdict.outcomes), "tokens": tokens, "level": "tokens equal"}


def lengths(program: Program) -> list[Case]:
    """One prompt and as many new tokens as end before, at and after calls of several rounds."""
    example = cases(program, quick=True)[0]
    most = room(program, len(example.prompts[0]))
    return [replace(example, name=f"{n} tokens", n=n) for n in range(2, 2 * ROUNDS + 3) if n <= most]


def generated(program: Program, executor: Any, case: Case) -> list[list[int]]:
    """What a case generates."""
    options: dict[str, Any] = dict(case.params)
    if case.streams:
        options["streams"] = list(case.streams)
    if case.negative:
        options["negative"] = case.negative
    return program.generate(
        [list(p) for p in case.prompts], case.n, seed=case.seed, stop=case.stop, executor=executor, **options
    )


def clean(executor: Any) -> None:
    """Removes the models that the executor does not use, and forgets their sessions."""
    used = set(executor.rounds.values())
    for path in executor.folder.glob("models/*/onnxruntime/rounds-*"):
        if path.with_name(path.name.removesuffix(".data")) not in used:
            path.unlink()
    for session in executor.sessions.values():
        session.turns.clear()  # they hold bindings of sessions that go
    executor.several = {path: session for path, session in executor.several.items() if path in used}
