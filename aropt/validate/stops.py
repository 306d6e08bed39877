"""Stop ids that do occur: taken from what a request generates without any."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from aropt.loops.requests.cases import Case

if TYPE_CHECKING:
    from aropt.validate.verdict import Verdict

Answers = MutableMapping[Case, list[list[int]]]
PLACES = (  # how many stop ids, and which of them is met: each place among up to five, mixed
    *((5, 4), (4, 0), (3, 2), (2, 1), (3, 1), (1, 0), (5, 0), (4, 3)),
    *((2, 0), (5, 2), (4, 1), (3, 0), (5, 1), (4, 2), (5, 3)),
)  # fmt: skip


def with_stops(chosen: Sequence[Case], verdict: Verdict, known: Answers, vocab: int) -> Iterator[Case]:
    """The cases in turn; before one that a stop id ends, what it generates without, unless that is known."""
    places = itertools.cycle(PLACES)
    for case in chosen:
        free, key = replace(case, ends=""), replace(case, name="", kind="", ends="")
        if not case.ends:
            yield free
        elif key not in known:
            kind = "ragged" if len(case.prompts) > 1 else "greedy"
            yield replace(free, name=f"{case.name}, without", kind=kind)
        known[key] = known.get(key) or verdict.outcomes[-1].generated
        if case.ends:
            yield replace(free, stop=ids(case, known[key], vocab, *next(places)))


def ids(case: Case, answers: list[list[int]], vocab: int, size: int, place: int) -> tuple[int, ...]:
    """The stop ids of a case, given its answers without any: `size` ids, of which the one at `place` is met."""
    used = {t for answer in answers for t in answer}
    unused = [t for t in (0, vocab - 1, *range(1, min(vocab - 1, len(used) + size))) if t not in used][: size - 1]
    if not used:
        return tuple(unused)
    met = each_but_the_last(answers) if case.ends == "by all but the last" else []
    return (*unused[:place], *(met or [chosen(case, answers, vocab)]), *unused[place:])


def each_but_the_last(answers: list[list[int]]) -> list[int]:
    """An id of each answer but the last one, that the last one has not; none where they have no other."""
    own = [[t for t in answer if t not in answers[-1]] for answer in answers[:-1]]
    return list(dict.fromkeys(found[0] for found in own if found))


def chosen(case: Case, answers: list[list[int]], vocab: int) -> int:
    """The id that ends a case as it asks for; the first or last of the vocabulary, or one of a prompt, where it may."""
    at = {t: min(a.index(t) for a in answers if t in a) for answer in answers for t in answer}
    if case.ends == "late":
        return max(at, key=lambda t: (at[t] < case.n - 1, at[t]))
    if case.ends == "at once":
        return min(at, key=lambda t: (at[t], t))
    met = first_met(answers)
    prompts = {t for p in case.prompts for t in p}  # where it ends nothing
    wanted = [t for t in met if t in (0, vocab - 1)] or [t for t in met if t in prompts]
    return (wanted or met)[-1 if case.n % 2 and wanted else 0]


def first_met(answers: list[list[int]]) -> list[int]:
    """Ids that answers hold: first those that end one in its midst, of these the ones that end few, and late."""

    def worth(token: int) -> tuple[bool, int, int, int]:
        ends = [(answer.index(token), len(answer)) for answer in answers if token in answer]
        return not any(0 < at < size - 1 for at, size in ends), len(ends), -max(at for at, _ in ends), token

    return sorted({t for answer in answers for t in answer}, key=worth)
