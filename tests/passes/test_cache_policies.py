"""Lossy caches of a canvas: schedules against plain Python, invariants E2 to E14 of the literature, budgets."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import BudgetMissed, UsageError
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program
from aropt.loops.request import Request
from aropt.loops.runtime import make_inputs
from aropt.loops.scheme import Round
from aropt.loops.unmask.cache_policy import cached
from aropt.models.canvas import MASK
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import Rewritten, run_passes
from aropt.pipeline.registry import make, parse, pipeline
from aropt.rewriting.contract import Applies, Result, Skips, planned
from aropt.validate.compare import Case, cases, validate, with_probe
from aropt.validate.drift import budget, ledger, measure
from aropt.validate.replay import Trace
from tests.support.canvases import capture, tiny
from tests.support.run import generate
from tests.support.targets import EAGER

BLOCK = 4
OPTIONS: dict[str, dict[str, str]] = {
    "dual-cache": {},
    "prefix-cache": {},
    "free-cache": {},
    "free-cache sliding": {"left": "2", "right": "6"},
    "dkv-cache": {"refresh": "4"},
    "vicinity": {"before": "1", "after": "2", "warmup": "2"},
}


@pytest.fixture(scope="module")
def plain() -> Program:
    program = capture(tiny(0), "threshold")
    return program.replace(meta={**program.meta, "prompts": [[1, 2, 3, 4, 5], [9, 8, 7]]})


@pytest.fixture(scope="module")
def fast(plain: Program) -> dict[str, Program]:
    return {name: make(name.split()[0], options).run(plain) for name, options in OPTIONS.items()}


def rounds(program: Program, prompts: list[list[int]], n: int, **params: float) -> list[list[Round]]:
    """The rounds of each prompt."""
    case = Case(tuple(map(tuple, prompts)), n, params=tuple(params.items()))
    return Trace(with_probe(program), case, Eager(program)).rounds


def declared(name: str, steps: list[Round], prompt: int, block: int) -> list[set[int]]:
    """The rows of each round as the papers describe them, in plain Python."""
    size, found, was, began = len(steps[0].before), [], -1, 0
    window = set(range(size))
    for number, step in enumerate(steps):
        masks = [i for i in range(size) if step.before[i] == MASK]
        now = (masks[0] - prompt) // block
        start, end = prompt + now * block, min(prompt + (now + 1) * block, size)
        fresh, began = now != was, number if now != was else began
        own = set(range(start, end))
        if name == "dual-cache":
            rows = window if fresh else own
        elif name == "prefix-cache":
            rows = window if fresh else set(range(start, size))
        elif name == "free-cache":
            rows = set(range(start if number else 0, size))
        elif name == "free-cache sliding":
            first = masks[0]
            rows = set(range(max(0, first - 2) if number else 0, min(first + 6, size))) | (own & set(masks))
        elif name == "dkv-cache":
            i = number - began
            before = {j for j in range(size) if (steps[number - 1].before if number else step.before)[j] == MASK}
            rows = window if i < 2 or i % 4 == 0 else before
        else:
            rows = window if fresh or number < 2 else set(range(max(0, start - 1), min(end + 2, size)))
        found.append(rows)
        was = now
    return found


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tau", [2.0, 0.1])
def test_the_schedule_is_the_declared_one(fast: dict[str, Program], name: str, tau: float) -> None:
    """E14: which version of each row every round read, against the policy's schedule."""
    (steps,) = rounds(fast[name], [[1, 2, 3, 4, 5]], 16, threshold=tau, block=BLOCK)
    want = declared(name, steps, 5, BLOCK)
    assert [set(s.rows.tolist()) for s in steps] == want
    versions = ledger(steps)
    for number in range(len(steps)):
        last = [max((r for r in range(number + 1) if i in want[r]), default=-1) for i in range(versions.shape[1])]
        assert versions[number].tolist() == last


def test_dkv_stores_a_row_after_it_was_written(fast: dict[str, Program]) -> None:
    """E12: never what it was in the round that wrote it; the last round's rows are not read again."""
    for steps in rounds(fast["dkv-cache"], [[1, 2, 3], [4]], 16, threshold=0.1, block=8):
        versions = ledger(steps)
        for number, step in enumerate(steps[:-1]):
            written = ((step.before == MASK) & (step.decided != MASK)).nonzero().flatten()
            assert (versions[number + 1 :, written] >= number + 1).all()


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_stored_is_what_the_ledger_says(fast: dict[str, Program], name: str) -> None:
    """Keys change in the rows that a round computes, and in no other."""
    program, kept = fast[name], []
    values = make_inputs(program, Request(((1, 2, 3),), 12, params=(("threshold", 2.0), ("block", BLOCK))))

    def keep(_: Any, found: Any) -> None:
        kept.append((found["slots"][0].tolist(), found["k_1"].clone()))

    run(program, values, 16, Eager(program), keep)
    for (_, before), (slots, after) in pairwise(kept):
        changed = (before != after).flatten(0, 1).any(-1).any(0) if before.dim() == 4 else (before != after)
        assert set(changed.nonzero().flatten().tolist()) <= set(slots)
    assert len({len(s) for s, _ in kept}) > 1


prompts = st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=7), min_size=1, max_size=4)


@settings(deadline=None, max_examples=30)
@given(prompts, st.sampled_from(sorted(OPTIONS)), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.0, 1.0]))
def test_a_row_of_a_batch_equals_the_request_alone(
    fast: dict[str, Program], ids: list[list[int]], name: str, tau: float, temperature: float
) -> None:
    """E7 for ragged batches: each sequence has a schedule of its own."""
    params: dict[str, Any] = {"threshold": tau, "temperature": temperature, "block": BLOCK}
    together = generate(fast[name], ids, 12, **params)
    assert together == [generate(fast[name], [p], 12, streams=[i], **params)[0] for i, p in enumerate(ids)]


@pytest.mark.parametrize("name", sorted({name.split()[0] for name in OPTIONS}))
def test_refreshed_each_round_it_is_exact(plain: Program, name: str) -> None:
    """E3, and E12 for dkv-cache: with a refresh in every round nothing is stale."""
    always = make(name, {"refresh": "1"}).run(plain)
    assert validate(plain, with_probe(always), chosen=cases(plain, quick=True)).passed


def test_a_window_that_never_moves_is_exact(plain: Program) -> None:
    """E8: free-cache with its window at 0; and with one block it is prefix-cache, which then refreshes nothing."""
    whole = cached(plain, lambda look: look.all)
    assert validate(plain, with_probe(whole), chosen=cases(plain, quick=True)).passed
    for tau in (0.05, 0.3):
        once = [
            generate(make(n).run(plain), [[5, 6]], 16, block=16, threshold=tau) for n in ("free-cache", "prefix-cache")
        ]
        assert once[0] == once[1]


@pytest.mark.parametrize("name", OPTIONS)
def test_lossy_caches_lose(plain: Program, fast: dict[str, Program], name: str) -> None:
    """E6: on a random model stale rows change tokens, so that the tests above have something to find."""
    ids = torch.randint(0, 250, (12, 5), generator=torch.Generator().manual_seed(0)).tolist()
    params = {"threshold": 0.2, "block": 8}
    assert generate(fast[name], ids, 16, **params) != [generate(plain, [p], 16, **params)[0] for p in ids]


@pytest.mark.parametrize(
    "name", ["dual-cache", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("prefix-cache", "vicinity"))]
)
def test_by_the_mask_some_are_exact(name: str) -> None:
    """Where blocks don't see later ones, what these leave alone is not stale: level rounding, no budget needed."""
    blocks = capture(tiny(BLOCK), "threshold")
    plan = planned(make(name), blocks, EAGER)
    assert isinstance(plan, Applies) and plan.level == "rounding"
    result = applied(blocks, name)[1]
    assert (result.status, result.level) == ("applied", "rounding")
    assert make("free-cache").plan(blocks, EAGER).level == ""  # type: ignore[union-attr]


def test_a_pass_applies_once(fast: dict[str, Program]) -> None:
    assert isinstance(planned(make("dual-cache"), fast["dual-cache"], EAGER), Skips)


def applied(program: Program, text: str, **bounds: float) -> tuple[Rewritten, Result]:
    """What the manager makes of the pass, and the result."""
    made = run_passes(program, [make(*parse(text))], "eager", Instruments(budget=bounds))
    return made, made.results[0]


def test_lossy_needs_a_budget(plain: Program) -> None:
    with pytest.raises(UsageError, match="nothing says how much"):
        applied(plain, "dual-cache")


def test_the_budget_decides(plain: Program) -> None:
    """Enough: as asked. Less: refreshed more often until it fits. None: reverted, and it says why."""
    made, loose = applied(plain, "free-cache", kl=100.0)
    assert (loose.status, loose.options["refresh"]) == ("applied", 0) and loose.verify["kl"] > 0
    assert made.reference is not plain and made.program.ledger[0].level == "lossy"
    few = 0.6 * loose.verify["kl"]
    _, tight = applied(plain, "free-cache", kl=few)
    assert tight.status == "applied" and tight.options["refresh"] in (2, 4, 8, 16)
    assert "the budget was missed" in tight.reason and tight.verify["kl"] <= few
    same, none = applied(plain, "free-cache:refresh=4", kl=0.0, top1=1.0)  # 4, then 2
    assert none.status == "reverted" and "at most 0" in none.reason and same.program is same.reference is plain


def test_drift_is_that_of_the_rows_that_count(plain: Program, fast: dict[str, Program]) -> None:
    """No drift from itself; KL of a known pair of distributions; more staleness, more of it."""
    none = measure(plain, plain)
    assert none.kl_max < 1e-9 and (none.top1, none.agreement, none.first) == (1.0, 1.0, -1)
    assert none.forwards == none.exact_forwards >= len(none.steps)
    some = measure(plain, fast["dual-cache"])
    often = measure(plain, make("dual-cache", {"refresh": "2"}).run(plain))
    assert some.kl > often.kl > 0 and some.rows < often.rows < some.exact_rows * 2


@pytest.mark.exhaustive
def test_the_lowered_program_is_verified_against_the_lossy_one(plain: Program) -> None:
    done = aropt.optimize(plain, passes=pipeline(["dual-cache"]), target="onnxruntime", budget={"kl": 100.0})
    assert done.report["verify"]["status"] == "pass" and done.report["drift"]["kl"] > 0
    entry = next(p for p in done.report["passes"] if p["name"] == "dual-cache")
    assert entry["level"] == "lossy" and entry["verify"]["kl"] == pytest.approx(done.report["drift"]["kl"], rel=0.05)


def test_validation_sees_a_wrong_lossy_program(plain: Program, fast: dict[str, Program]) -> None:
    """It is compared with what the pass made, not with the exact program: another schedule is an error."""
    other = make("dual-cache", {"refresh": "3"}).run(plain)
    chosen = cases(plain, quick=True)
    assert validate(fast["dual-cache"], with_probe(fast["dual-cache"]), chosen=chosen).passed
    verdict = validate(fast["dual-cache"], with_probe(other), chosen=chosen)
    assert "the schedule says" in verdict.outcomes[-1].problem


bad_options: list[tuple[Callable[[], Any], str]] = [
    (lambda: budget("kl=x"), "no bound"),
    (lambda: budget("top1=2"), "no bound"),
    (lambda: budget("loss=1"), "unknown metric"),
    (lambda: make("free-cache", {"left": "3"}), "never compute"),
    (lambda: make("dkv-cache", {"refresh": "0"}), "never compute"),
    (lambda: make("vicinity", {"before": "-1"}), "vicinity:before=-1"),
]


@pytest.mark.parametrize(("call", "why"), bad_options)
def test_bad_options(call: Callable[[], Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        call()


def test_a_missed_budget_has_a_status_of_its_own() -> None:
    assert BudgetMissed.code == 7 and budget("kl=0.05,top1=0.95") == {"kl": 0.05, "top1": 0.95}
