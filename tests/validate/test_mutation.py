"""The validator catches every seeded miscompile of tests/mutants, and lets right programs pass."""

import pytest

from aropt.validate.compare import cases, validate
from tests.mutants import EQUIVALENT, MUTANTS, check, optimized, reference

BASES = sorted({base for one in MUTANTS.values() for base in one.bases})
EVERY = [(name, base) for name, one in MUTANTS.items() for base in one.bases]
PAIRS = [
    pytest.param(*pair, marks=[pytest.mark.exhaustive] * (i % 2)) for i, pair in enumerate(EVERY)
]  # every other one, or all
SEEDS = [
    pytest.param(base, seed, marks=[pytest.mark.exhaustive] * (seed != i % 3))
    for i, base in enumerate(BASES)
    for seed in range(3)
]  # one seed a base, or all
RIGHT = [
    pytest.param(name, base, marks=[pytest.mark.exhaustive] * (base != one.bases[-1]))
    for name, one in EQUIVALENT.items()
    for base in one.bases
]


@pytest.mark.parametrize(("name", "base"), PAIRS)
def test_mutant_is_caught_and_located(name: str, base: str) -> None:
    """With the short list of cases, as after each pass, unless only the full one can show it."""
    one = MUTANTS[name]
    verdict = check(name, base, quick=one.quick)
    assert not verdict.passed, "not caught"
    failed = verdict.outcomes[-1]
    assert "raises" not in failed.problem, "a mutant must give a wrong result, not an error"
    assert verdict.diverges is not None
    assert verdict.diverges["module"] in one.modules, f"expected {one.modules}: {verdict.diverges}"
    assert ("outside the model" in verdict.diverges.get("where", "")) == (verdict.diverges["module"] == "")
    assert verdict.diverges["repro"] == failed.case.repro("program")


@pytest.mark.parametrize(("base", "seed"), SEEDS)
def test_right_programs_pass(base: str, seed: int) -> None:
    plain = reference(base.partition("-")[0])
    verdict = validate(plain, optimized(base), chosen=cases(plain, seed=seed))
    assert verdict.passed, verdict.outcomes[-1]
    assert verdict.metrics()["max_ratio"] < 8, "too near the tolerance of 16"
    stopped = [o.case for o in verdict.outcomes if o.case.kind == "stop"]
    assert {"temperature" in dict(c.params) for c in stopped} == {True, False}


@pytest.mark.parametrize(("name", "base"), RIGHT)
def test_equivalent_programs_pass(name: str, base: str) -> None:
    verdict = check(name, base)
    assert verdict.passed, verdict.outcomes[-1]


def test_there_are_enough_kinds() -> None:
    assert len(MUTANTS) >= 26
    assert [name for name, one in MUTANTS.items() if not one.quick] == ["seed_of_32_bits"]
