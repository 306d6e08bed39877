"""Runs an exported whole loop with plain onnxruntime, in one call or in chunks, and compares it with its program."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from aropt.errors import MissingTool, VerificationFailed
from aropt.ir.executor import Executor, Values
from aropt.ir.program import Program
from aropt.ir.units import flat, ids_of, window
from aropt.loops import runtime
from aropt.loops.request import Request, room
from aropt.loops.runtime import batches, make_inputs
from aropt.targets.ort.threads import options, share

if TYPE_CHECKING:
    from aropt.loops.requests.cases import Case

NEEDS = {20: (1, 17)}  # the first onnxruntime that has an opset


def session(path: Path, threads: int | None = None) -> Any:
    """An onnxruntime session. Raises MissingTool if onnxruntime is not there or older than the model's opset."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingTool(
            what="ONNX Runtime is not installed", why=str(error), hint="pip install onnxruntime"
        ) from error
    check_version(ort.__version__)
    threads = threads or torch.get_num_threads()
    share(threads)
    return ort.InferenceSession(str(path), options(threads), providers=["CPUExecutionProvider"])


def check_version(found: str) -> None:
    """Raises MissingTool if this onnxruntime does not have the opset that aropt writes."""
    from aropt.exporters.onnx import OPSET

    if tuple(int(part) for part in found.split(".")[:2]) < NEEDS[OPSET]:
        first = ".".join(map(str, NEEDS[OPSET]))
        raise MissingTool(
            what=f"onnxruntime {found} is too old",
            why=f"the model needs opset {OPSET}, which onnxruntime has from {first} on",
            hint=f"pip install 'onnxruntime>={first}'",
        )


def answer(session: Any, program: Program, request: Request, chunk: int | None = None) -> list[list[int]]:
    """The tokens, as `aropt.loops.runtime.answer` returns them, in the same batches; `chunk`: rounds of one call."""
    results: dict[int, list[int]] = {}
    for group in batches(program, request.prompts):
        found = batch(session, program.outputs[0], make_inputs(program, request.part(group)), chunk)
        results |= {i: row[: request.n] for i, row in zip(group, found, strict=True)}
    return [results[i] for i in range(len(request.prompts))]


def batch(session: Any, generated: str, values: Values, chunk: int | None) -> list[list[int]]:
    """The tokens of one batch; `generated` names the output."""
    feeds = {k: v.numpy() for k, v in values.items()}
    names = [o.name for o in session.get_outputs()]
    rows: list[list[int]] = [[] for _ in values["lengths"]]
    while True:
        most = {} if chunk is None else {"chunk": torch.tensor(chunk).numpy()}
        out = dict(zip(names, session.run(None, feeds | most), strict=True))
        for row, new in zip(rows, flat(torch.from_numpy(out[generated])), strict=False):
            row[:] = (row if "counts" in out else []) + [t for t in new if t >= 0]  # a canvas is whole each time
        if chunk is None or bool(out["next.finished"]):
            return rows
        feeds |= {"state." + k.removeprefix("next."): v for k, v in out.items() if k.startswith("next.")}
        feeds["resume"] = torch.tensor(True).numpy()


def compare(path: Path, program: Program, executor: Executor | None = None, home: str = "") -> dict[str, Any]:
    """Checks an exported loop against its program on an executor: in chunks, and what programs are validated on.

    Raises VerificationFailed if a token differs.
    """
    from aropt.exporters.whole_loop import ROUNDS
    from aropt.loops.requests.cases import cases
    from aropt.validate.compare import Outcome, Verdict
    from aropt.validate.stops import with_stops

    made, verdict = session(path), Verdict()
    for case in with_stops([*chunked(program), *cases(program)], verdict, {}, program.meta["vocab"]):
        with runtime.blaming(home):
            want = runtime.answer(program, case, executor)
        verdict.outcomes.append(Outcome(case, tokens=sum(map(len, want)), generated=want))
        for chunk in (None, ROUNDS + 1) if case.kind == "chunks" else (None,):
            if answer(made, program, case, chunk) != want:
                raise VerificationFailed(
                    what="the exported loop generates other tokens than its program",
                    where=str(path),
                    why=f"{case.repro(program.name)}, chunks of {chunk}",
                    hint="please report it; aropt export without --whole-loop writes the graphs apart",
                )
    found = verdict.metrics()
    return {"status": "pass", "cases": found["cases"], "tokens": found["tokens"], "level": "tokens equal"}


def chunked(program: Program) -> list[Case]:
    """One, several and ragged, greedy and drawn, for longer than a chunk."""
    from aropt.exporters.whole_loop import ROUNDS
    from aropt.loops.requests.cases import Case

    rows = example(program)
    n = min(2 * ROUNDS + 4, room(program, joined(rows)))
    others = rows[::-1], [rows[-1], *rows[:-1]][: max(1, len(rows) - 1)]
    start, back, second = (tuple(joined(some)) for some in (rows, *others))
    alone = "negative" in program.inputs and program.meta.get("null") is None
    return [
        Case(
            prompts,
            n,
            seed,
            params,
            negative=tuple(p[::-1] for p in prompts) if alone else (),
            name="in chunks",
            kind="chunks",
        )
        for prompts in ((start,), (start, back), (start, second))
        for seed, params in ((0, ()), (5, (("temperature", 0.9),)))
    ]


def joined(rows: list[list[int]]) -> list[int]:
    return [t for row in rows for t in row]


def example(program: Program) -> list[list[int]]:
    """The rows of a prompt of more than one, so that others can be shorter, where the capacity allows it."""
    known, capacity = program.meta.get("input_vocab", program.meta["vocab"]), program.meta["capacity"]
    start = [int(t) for t in program.meta["prompts"][0]] if program.meta.get("prompts") else [1 % known]
    taken = {start[0], program.meta.get("mask"), *program.meta.get("never", ())}
    more = [t for t in range(min(known, 5)) if t not in taken]
    made = [[t] for t in start]
    if window(program.meta):  # a class, then windows
        made = [start[:1], *([t] * ids_of(program.meta, 1) for t in more)]
    elif len(start) < 3:
        made += [[t] for t in more]
    return made[: max(1, min(3, capacity // 2) if len(start) < 3 else capacity // 2)]
