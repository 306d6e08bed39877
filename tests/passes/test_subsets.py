"""Any legal choice of passes, on any kind of loop with any rules, leaves the tokens as they are."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aropt.ir.printer import text as printed
from aropt.ir.program import Program
from aropt.ir.serialize import from_json, to_json
from aropt.ir.verify import verify
from aropt.pipeline.registry import names, pass_class, pipeline
from aropt.rewriting.contract import Pass, Skips, planned, unkept
from aropt.targets import find_target
from tests.support.programs import canvas, image, text, written
from tests.support.run import generate

EXACT = [name for name in names() if pass_class(name).contract.level in ("bitwise", "rounding")]
OPTIONS = {"int8-draft": "int8-draft:least=1,group=32,drafts=2", "ngram-draft": "ngram-draft:drafts=2",
           "tree-draft": "tree-draft:draft=text,shape=chain:2"}  # fmt: skip
SAMPLED = ("temperature", "top-k", "top-p", "min-p", "repetition-penalty", "bias")
GUIDANCE = ((), ("guidance",), ("guidance-interval",))
COMMITS = ((), ("threshold",), ("entropy",), ("remask",))
FEW: list[tuple[str, tuple[str, ...]]] = [  # what a quick run draws from: a capture takes a second
    ("positions", ("temperature", "top-k")), ("positions", ("guidance", "temperature")),
    ("positions", ("guidance-interval", "repetition-penalty")), ("written", ()), ("unmask", ("threshold",)),
    ("blocks", ()), ("guide", ("guide-argmax",)), ("windows", ("temperature",)),
]  # fmt: skip


def program_of(kind: str, rules: tuple[str, ...]) -> Program:
    match kind:
        case "positions":
            return text(*rules)
        case "written":
            return written()
        case "unmask":
            return canvas(*rules)
        case "blocks":
            return canvas(*rules, block=4)
        case "guide":
            return canvas(*rules, guided=True)
        case _:
            return image(*rules)


def many() -> st.SearchStrategy[tuple[str, tuple[str, ...]]]:
    """Any rules that the kind of loop takes."""
    sampled = st.lists(st.sampled_from(SAMPLED), unique=True).map(tuple)
    rules = st.tuples(st.sampled_from(GUIDANCE), sampled).map(lambda pair: pair[0] + pair[1])
    loops = st.tuples(st.sampled_from(("positions", "windows")), rules)
    canvases = st.tuples(st.sampled_from(("unmask", "blocks")), st.sampled_from(COMMITS))
    return st.one_of(loops, canvases, st.sampled_from(FEW))


def tokens(program: Program, temperature: float) -> list[list[int]]:
    return generate(
        program, [[1, 2, 1, 2]] if not program.meta.get("unit") else [[6]], 8, temperature=temperature, seed=3
    )


def applied(program: Program, one: Pass) -> Program:
    """The program after a pass, which keeps its contract and has nothing left to do; or as it was."""
    target = find_target("onnxruntime")
    plan = planned(one, program, target)
    if isinstance(plan, Skips):
        return program
    changed = plan.make() if plan.make else one.run(program)
    verify(changed)
    assert unkept(one, changed) == ""
    again = planned(one, changed, target)
    assert isinstance(again, Skips), f"{one.name} applies twice: {again.matches}"
    return changed


def check(base: tuple[str, tuple[str, ...]], passes: list[str], temperature: float) -> None:
    plain = program_of(*base)
    program = plain
    for one in pipeline([OPTIONS.get(name, name) for name in passes], set(names()) - set(passes)):
        program = applied(program, one)
    assert tokens(program, temperature) == tokens(plain, temperature)
    again = from_json(json.loads(json.dumps(to_json(program))), program.weights)
    assert printed(again, fold=False) == printed(program, fold=False)


CHOSEN = st.lists(st.sampled_from(EXACT), unique=True)
TEMPERATURES = st.sampled_from([0.0, 0.9])
SLOW = [HealthCheck.too_slow]


@given(st.sampled_from(FEW), CHOSEN, TEMPERATURES)
@settings(deadline=None, max_examples=4, suppress_health_check=SLOW)
def test_any_passes_leave_the_tokens(base: tuple[str, tuple[str, ...]], passes: list[str], temperature: float) -> None:
    check(base, passes, temperature)


@pytest.mark.exhaustive
@given(many(), CHOSEN, TEMPERATURES)
@settings(deadline=None, max_examples=60, suppress_health_check=SLOW)
def test_any_rules_and_passes_leave_the_tokens(
    base: tuple[str, tuple[str, ...]], passes: list[str], temperature: float
) -> None:
    check(base, passes, temperature)


OFTEN = (0, 1)  # programs whose kind has another with more rules
SPREAD = [pytest.param(base, id="-".join([base[0], *base[1]]), marks=[pytest.mark.exhaustive] * (i in OFTEN))
          for i, base in enumerate(FEW)]  # fmt: skip


@pytest.mark.parametrize("base", SPREAD)
def test_all_passes_together_leave_the_tokens(base: tuple[str, tuple[str, ...]]) -> None:
    check(base, EXACT, 0.9)
