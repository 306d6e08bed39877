"""Quality: how many ids of known answers a program of a canvas finds, so that a lossy cache can be held to a task.

An example is {"prompt": ids, "answer": ids, "masked": [[start, end], ...]}: the ids of the answer in these spans are to
be found (all of it, where "masked" is left out), the others are given. A file has one a line, as JSON; prompt and
answer may be texts there.
"""

from __future__ import annotations

from aropt.errors import UsageError
from aropt.frontend.examples import FORM, Example, refused, wrong
from aropt.ir.executor import Executor
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.loops.runtime import generate

AT_ONCE = 16  # canvases of one batch


def measure(program: Program, executor: Executor | None = None) -> tuple[float, int]:
    """The share of the ids to be found that are the examples', and how many ids these are; greedy, rule's defaults.

    `executor` runs the program (default: eagerly). Raises UsageError for examples that the program can't take.
    """
    examples, mask = checked(program), program.meta["mask"]
    right = total = 0
    for n in sorted({len(e["answer"]) for e in examples}):
        alike = [e for e in examples if len(e["answer"]) == n]
        for start in range(0, len(alike), AT_ONCE):
            some = alike[start : start + AT_ONCE]
            hidden = [to_find(e) for e in some]
            fill = [
                [mask if i in h else t for i, t in enumerate(e["answer"])] for e, h in zip(some, hidden, strict=True)
            ]
            prompts = [e["prompt"] for e in some]
            found = generate(program, prompts, n, fill=fill, executor=executor or Eager(program), plain=True)
            for example, answer, rows in zip(some, found, hidden, strict=True):
                right += sum(answer[i] == example["answer"][i] for i in rows)
                total += len(rows)
    return right / total, total


def to_find(example: Example) -> set[int]:
    """Which places of the answer are masked."""
    spans = example.get("masked", [[0, len(example["answer"])]])
    return {i for start, end in spans for i in range(start, end)}


def checked(program: Program) -> list[Example]:
    """The program's examples. Raises UsageError where it has none, or can't take one of them."""
    examples: list[Example] = program.meta.get("examples") or []
    if not examples:
        raise UsageError(
            what="there is nothing to measure quality on",
            where="--budget quality",
            why="the model comes without examples",
            hint="give some: --examples FILE, with lines as " + FORM,
        )
    known, mask, capacity = (int(program.meta[k]) for k in ("vocab", "mask", "capacity"))
    for number, example in enumerate(examples, 1):
        problem = wrong(example)
        ids = [] if problem else [*example["prompt"], *example["answer"]]
        bad = next((t for t in ids if not 0 <= t < known or t == mask), None)
        if bad is not None:
            problem = f"id {bad} is {'the mask' if bad == mask else f'outside the vocabulary of {known}'}"
        elif len(ids) > capacity:
            problem = f"{len(ids)} ids, and the model takes {capacity}"
        if problem:
            raise refused(f"example {number}", problem)
    return examples
