"""Stop ids that do occur: taken from what a request generates without any."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aropt.cases import Case

if TYPE_CHECKING:
    from aropt.validate import Verdict

Answers = MutableMapping[Case, list[list[int]]]


def with_stops(chosen: Sequence[Case], verdict: Verdict, known: Answers, vocab: int) -> Iterator[Case]:
    """The cases in turn; before one that a stop id ends, what it generates without, unless that is known."""
    for case in chosen:
        if not case.ends:
            yield case
            continue
        free = replace(
            case, name=f"{case.name}, without", ends="", kind="ragged" if len(case.prompts) > 1 else "greedy"
        )
        if free not in known:
            yield free
            known[free] = verdict.outcomes[-1].generated
        yield replace(case, ends="", stop=ids(case, known[free], vocab))


def ids(case: Case, answers: list[list[int]], vocab: int) -> tuple[int, ...]:
    """The stop ids of a case, given its answers without any."""
    used = {t for answer in answers for t in answer}
    unused = [t for t in range(min(vocab, len(used) + 3)) if t not in used]
    met = first_met(answers)
    if case.ends == "met by some" or not met:
        return tuple(met[:2] or unused[:2])
    given = [t for t in met if any(t in p for p in case.prompts)]  # in a prompt too, where it ends nothing
    return (*unused[:2], (given or met)[0])


def first_met(answers: list[list[int]]) -> list[int]:
    """Ids that answers hold: first those that end one in its midst, of these the ones that end few, and late."""

    def worth(token: int) -> tuple[bool, int, int, int]:
        ends = [(answer.index(token), len(answer)) for answer in answers if token in answer]
        return not any(0 < at < size - 1 for at, size in ends), len(ends), -max(at for at, _ in ends), token

    return sorted({t for answer in answers for t in answer}, key=worth)
