"""Which requests a program is compared on: all at the end, after a pass those that vary what it can have changed."""

from __future__ import annotations

from aropt.ir.program import Program
from aropt.loops.requests.cases import Case, Requests, named
from aropt.loops.speculate import checks_drafts

SHAPES = frozenset({"sequences", "length", "padding", "new", "blocks", "block", "fill"})
LOOP = frozenset({"text", "stop", "steps"})  # what decides how often and on which rows a loop runs
OVERHEAD, READ = 4, 50  # a request costs so many rounds beside its own, and one for so many ids of its prompts


def touched(before: Program, after: Program) -> set[str]:
    """Factors that a pass can have changed: shapes, what the graphs that it made read, what loops depend on."""
    changed = [g for n, g in after.graphs.items() if before.graphs.get(n) is not g]
    found = {name for graph in changed for name in graph.inputs}
    loop = LOOP if before.control != after.control else frozenset()
    return set(SHAPES | loop) | found


def after_pass(requests: Requests, before: Program, after: Program, turn: int) -> list[Case]:
    """The requests after the pass of that number."""
    factors = touched(before, after)
    singles = [requests.single[places[turn % len(places)]] for places in requests.places(factors)]
    found = [*requests.bounds(True), *singles, *some(requests, factors, turn)]
    return named([*found, *drafted(requests, after, factors, turn)])


def whole(requests: Requests, candidate: Program) -> list[Case]:
    """All requests."""
    return named([*requests.everything(False), *drafted(requests, candidate, set(requests.levels), 0)])


def drafted(requests: Requests, candidate: Program, factors: set[str], turn: int) -> list[Case]:
    """More for one sequence, where drafts are checked for one alone: after long prompts, at all temperatures."""
    if not checks_drafts(candidate.control):
        return []
    one = requests.alone()
    return [*one.pairs, *one.long()] if factors >= set(requests.levels) else some(one, factors, turn)


def some(requests: Requests, factors: set[str], turn: int) -> list[Case]:
    """A few requests with the most pairs of levels of these factors for each round; another first one each turn."""
    rows, made = requests.design.rows, requests.pairs
    pairs = [{(a, b) for a in row.items() for b in row.items() if a < b and {a[0], b[0]} <= factors} for row in rows]
    left, picked = list(range(len(rows))), list[int]()
    seen: set[tuple[tuple[str, str], tuple[str, str]]] = set()

    def worth(i: int) -> float:
        return len(pairs[i] - seen) / (OVERHEAD + made[i].n + sum(map(len, made[i].prompts)) / READ)

    while left and len(picked) < requests.short:
        best = max(left, key=worth) if picked else left[turn % len(left)]
        picked.append(best)
        left.remove(best)
        seen |= pairs[best]
    return [made[i] for i in sorted(picked)]
