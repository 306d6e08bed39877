"""Guidance: two branches as one batch, an interval of it; how often forwards run, and refused input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import UsageError
from aropt.exporters.whole_loop import export_program
from aropt.ir.executor import Values
from aropt.ir.interpreter import Eager
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.ir.serialize import from_json, to_json
from aropt.loops.rules import ALWAYS
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.rewriting.contract import Skips, planned
from aropt.targets import lower
from aropt.targets.ort import run_loop
from aropt.validate.compare import validate, with_probe
from tests.conftest import CAPACITY, VOCAB, make_program
from tests.mutants.surgery import Tiny as Rotary
from tests.support.guided import FUSED, PARAMS, PROMPTS, RULES, Prompts, counted, passed
from tests.support.run import from_session, generate
from tests.support.targets import EAGER
from tests.support.windows import Windows

NEW = CAPACITY - 3  # rows after the longest prompt


@pytest.fixture(scope="module")
def plain() -> Program:
    return make_program(1, ("guidance", *RULES))


@pytest.fixture(scope="module")
def interval() -> Program:
    return make_program(1, ("guidance-interval", *RULES))


@pytest.fixture(scope="module")
def variants(plain: Program) -> dict[str, Program]:
    """Two calls and one batch, with and without caches."""
    batch = passed(plain, "cfg-batch")
    two, one = passed(plain, "kv-cache"), passed(batch, "kv-cache")
    return {
        "batch": batch, "two calls, cached": two, "batch, cached": one,
        "two calls, fused": passed(two, *FUSED[1:]), "batch, fused": passed(one, *FUSED[1:]),
    }  # fmt: skip


@pytest.fixture(scope="module")
def skipping(interval: Program) -> dict[str, Program]:
    """Without the idle branch."""
    plain = passed(interval, "cfg-interval")
    cached = passed(plain, "kv-cache")
    return {"plain": plain, "cached": cached, "fused": passed(cached, *FUSED[1:])}


@pytest.fixture(scope="module")
def batched(interval: Program) -> Program:
    """Both branches in all rounds, cached."""
    return passed(interval, "cfg-batch", "kv-cache")


# --- cfg-batch ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(prompts=PROMPTS, params=PARAMS, n=st.integers(0, 8), data=st.data())
def test_one_batch_is_two_calls(
    plain: Program, variants: dict[str, Program], prompts: Prompts, params: dict[str, Any], n: int, data: st.DataObject
) -> None:
    negative = [data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=len(p), max_size=len(p))) for p in prompts]
    want = generate(plain, prompts, n, negative=negative, **params)
    for name, program in variants.items():
        assert generate(program, prompts, n, negative=negative, **params) == want, name


def test_one_batch_runs_half_as_often_on_twice_the_sequences(plain: Program, variants: dict[str, Program]) -> None:
    assert counted(plain, [[1], [2]], 3) == [(2, 1), (2, 1), (2, 2), (2, 2), (2, 3), (2, 3)]
    assert counted(variants["batch"], [[1], [2]], 3) == [(4, 1), (4, 2), (4, 3)]
    assert counted(variants["batch, cached"], [[1, 2]], 3) == [(2, 2), (2, 1), (2, 1)]
    assert counted(variants["two calls, cached"], [[1, 2]], 3) == [(1, 2), (1, 2), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_the_default_pipeline_makes_one_batch(plain: Program) -> None:
    early = pipeline(dropped=FUSED[1:])
    fast, results, _ = run_passes(plain, early, "eager", Instruments(check=False))
    assert {r.name: r.status for r in results}["cfg-batch"] == "applied"
    assert "negative_tokens" not in fast.state and "negative_feed" not in fast.state
    unguided = planned(make("cfg-batch"), make_program(1), EAGER)
    assert isinstance(unguided, Skips) and unguided.reason == "there is no guidance"


# --- cfg-interval ---------------------------------------------------------------------------------------------------

INTERVALS = st.tuples(st.integers(0, NEW + 1), st.integers(0, NEW + 1)).map(sorted)


@settings(deadline=None, max_examples=12)
@given(prompts=PROMPTS, params=PARAMS, n=st.integers(0, NEW), ends=INTERVALS)
def test_rounds_outside_the_interval_do_not_need_the_branch(
    interval: Program, skipping: dict[str, Program], prompts: Prompts, params: dict[str, Any], n: int, ends: list[int]
) -> None:
    params |= {"guidance_from": ends[0], "guidance_to": ends[1]}
    want = generate(interval, prompts, n, **params)
    for name, program in skipping.items():
        assert generate(program, prompts, n, **params) == want, name


@settings(deadline=None, max_examples=6)
@given(prompts=PROMPTS, params=PARAMS, ends=INTERVALS)
def test_the_reference_has_scale_1_outside(
    plain: Program, interval: Program, prompts: Prompts, params: dict[str, Any], ends: list[int]
) -> None:
    """Row by row: the plain guided program at the scale of that row."""
    found = generate(interval, prompts, 6, guidance_from=ends[0], guidance_to=ends[1], **params)
    for i, prompt in enumerate(prompts):
        for count, token in enumerate(found[i]):
            scale = params["guidance"] if ends[0] <= count < ends[1] else 1.0
            before = prompt + found[i][:count]
            negative = [[0, *before[1:]]]
            one = generate(plain, [before], 1, negative=negative, streams=[i], **{**params, "guidance": scale})
            assert one == [[token]]


def test_everything_is_guided_by_default(plain: Program, interval: Program) -> None:
    options: dict[str, Any] = {"guidance": 5.0, "temperature": 1.0, "seed": 3}
    assert interval.inputs["guidance_to"].default == ALWAYS
    assert generate(interval, [[1, 2]], 12, **options) == generate(plain, [[1, 2]], 12, **options)
    assert generate(interval, [[1, 2]], 12, guidance_to=0, **options) != generate(plain, [[1, 2]], 12, **options)


@pytest.mark.parametrize(("start", "end"), [(0, 3), (2, 5), (4, 4), (3, ALWAYS), (9, ALWAYS), (0, ALWAYS)])
def test_the_branch_catches_up_once_and_then_ends(skipping: dict[str, Program], start: int, end: int) -> None:
    """Forwards as (sequences, rows): both branches are one batch from the second guided round on."""
    n, ends = 7, {"guidance_from": start, "guidance_to": end}
    want = []
    for count in range(n):
        rows = 1 if count else 2
        inside = start <= count < end
        want += [(2, 1)] if inside and count > start else [(1, rows)]
        want += [(1, 2 + start)] if inside and count == start else []
    assert counted(skipping["cached"], [[1, 2]], n, **ends) == want
    assert [b for b, _ in counted(skipping["plain"], [[1, 2]], n, **ends)] == [b for b, _ in want]
    assert sum(b for b, _ in want) == n + max(0, min(n, end) - start)


def test_who_takes_the_pass(plain: Program, interval: Program, skipping: dict[str, Program], batched: Program) -> None:
    no = planned(make("cfg-interval"), plain, EAGER)
    assert isinstance(no, Skips) and "capture the model with the rule 'guidance-interval'" in no.reason
    chosen = planned(make("cfg-batch"), skipping["plain"], EAGER)
    assert isinstance(chosen, Skips) and "cfg-interval chose" in chosen.reason
    both = passed(batched, *FUSED[1:])
    options: dict[str, Any] = {"guidance": 4.0, "guidance_from": 2, "guidance_to": 5}
    assert generate(both, [[1, 2], [3]], 9, **options) == generate(interval, [[1, 2], [3]], 9, **options)
    assert "cfg-interval" not in [p.name for p in pipeline()]


@pytest.mark.parametrize(
    "stage", ["fused", *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ("plain", "cached"))]
)
def test_validation_knows_the_interval(interval: Program, skipping: dict[str, Program], stage: str) -> None:
    verdict = validate(interval, with_probe(skipping[stage]))
    assert verdict.passed and verdict.metrics()["tokens"] > 200, verdict.outcomes[-1]


def test_validation_sees_guidance_outside_the_interval(interval: Program, batched: Program) -> None:
    unguided = batched.replace(inputs=interval.inputs)
    wrong = Everywhere(with_probe(unguided))
    assert not validate(interval, with_probe(unguided), wrong, explain=False).passed


class Everywhere(Eager):
    """Guides every row."""

    def call(self, graph: str, inputs: Values) -> Values:
        zero = {n: v * 0 for n, v in inputs.items() if n == "guidance_from"}
        return super().call(graph, {**inputs, **zero})


def test_an_interval_survives_its_file(skipping: dict[str, Program]) -> None:
    program = skipping["fused"]
    again = from_json(to_json(program), program.weights)
    options: dict[str, Any] = {"guidance": 4.0, "guidance_from": 2, "guidance_to": 5}
    assert generate(again, [[1, 2], [3]], 9, **options) == generate(program, [[1, 2], [3]], 9, **options)
    assert text(again) == text(program)


@pytest.fixture(scope="module")
def pair() -> tuple[Program, Program]:
    """A model whose attention onnxruntime has a kernel for, plain and optimized."""
    torch.manual_seed(1)
    model = Rotary(1, groups=2, width=64)
    plain = aropt.capture(model, capacity=24, null=0, rules=["guidance-interval", "temperature"])
    fast, results, _ = run_passes(plain, pipeline(["cfg-interval"]), "onnxruntime", Instruments(check=False))
    assert {r.name: r.status for r in results}["fuse-attention"] == "applied"
    return plain, fast


CHOICES: list[dict[str, Any]] = [
    {"guidance": 3.0, "guidance_from": 3, "guidance_to": 9},
    {"guidance": 3.0, "guidance_from": 3, "guidance_to": 9, "temperature": 1.0, "seed": 4},
    {"guidance": 2.0, "guidance_to": 5},
    {"guidance": 2.0, "temperature": 1.0},
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the onnxruntime target keeps what it builds of the pair's second program."""
    return tmp_path_factory.mktemp("guided")


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_targets_skip_the_branch(pair: tuple[Program, Program], built: Path, target: str) -> None:
    plain, fast = pair
    executor = lower(fast, target, built)
    for options in CHOICES:
        want = generate(plain, [[18], [22]], 14, **options)
        for _ in range(2):  # the second time buffers are there
            assert generate(fast, [[18], [22]], 14, executor=executor, **options) == want
    ragged = [[18, 3, 4], [20]]
    assert generate(fast, ragged, 12, executor=executor, **CHOICES[1]) == generate(plain, ragged, 12, **CHOICES[1])


def test_what_waits_grows_by_itself(pair: tuple[Program, Program], built: Path) -> None:
    """The rounds before the interval have the same sizes: in twice as many of them nothing more is bound."""
    _, fast = pair
    bound = []
    for start in (4, 8):
        executor: Any = lower(fast, "onnxruntime", built)
        generate(fast, [[18]], 14, executor=executor, guidance=3.0, guidance_from=start, guidance_to=start + 1)
        assert {"pend"} == {g for g in executor.sessions if "pend" in g} - set(executor.hot)
        bound.append(sum(len(session.bindings) for session in executor.sessions.values()))
    assert bound[0] == bound[1]


def test_sessions_that_take_turns_do_not_spin(pair: tuple[Program, Program], built: Path, tmp_path: Path) -> None:
    """While one runs, the threads of the others must not hold the cores; one alone keeps its threads awake."""
    alone = run_passes(make_program(1), pipeline(), "onnxruntime", Instruments(check=False))[0]
    for program, folder, expected in ((pair[1], built, True), (alone, tmp_path, False)):
        executor: Any = lower(program, "onnxruntime", folder)
        params = {"guidance": 3.0, "guidance_from": 2, "guidance_to": 4} if expected else {}
        generate(program, [[1]], 6, executor=executor, **params)
        hot = [executor.sessions[g].session.get_session_options() for g in executor.hot if g in executor.sessions]
        assert hot and all(stops_spinning(options) is expected for options in hot)


def stops_spinning(options: Any) -> bool:
    try:
        return bool(options.get_session_config_entry("session.force_spinning_stop") == "1")
    except RuntimeError:  # no such entry
        return False


@pytest.mark.exhaustive
def test_inductor_skips_the_branch(skipping: dict[str, Program]) -> None:
    program, executor = skipping["fused"], lower(skipping["fused"], "inductor")
    for options in CHOICES[:2]:
        found = generate(program, [[1, 2], [3, 4]], 12, executor=executor, **options)
        assert found == generate(program, [[1, 2], [3, 4]], 12, **options)


@pytest.mark.parametrize("contrib", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_one_onnx_graph_skips_the_branch(pair: tuple[Program, Program], contrib: bool, tmp_path: Path) -> None:
    plain, fast = pair
    export_program(fast, tmp_path / "model.onnx", contrib=contrib)
    made = run_loop.session(tmp_path / "model.onnx")
    for options in CHOICES:
        want = generate(plain, [[18], [22]], 14, **options)
        for chunk in (None, 4):
            assert from_session(made, fast, [[18], [22]], 14, chunk=chunk, **options) == want


@pytest.mark.exhaustive
def test_one_onnx_graph_of_two_calls(tmp_path: Path) -> None:
    program = aropt.capture(Windows(), rules=["guidance", "temperature"])
    fast = passed(program, *FUSED)
    export_program(fast, tmp_path / "model.onnx")
    made = run_loop.session(tmp_path / "model.onnx")
    want = generate(program, [[5], [6]], 16, guidance=3.0)
    assert from_session(made, fast, [[5], [6]], 16, guidance=3.0) == want


@pytest.mark.exhaustive
@settings(deadline=None, max_examples=6)
@given(ends=st.tuples(st.integers(0, 5), st.integers(0, 5)).map(sorted), sampled=st.booleans())
def test_windows_count_rows(windows: tuple[Program, Program], ends: list[int], sampled: bool) -> None:
    plain, fast = windows
    options = {"guidance": 4.0, "guidance_from": ends[0], "guidance_to": ends[1], "temperature": float(sampled)}
    prompts = [[5], [6, 1, 2, 3, 4]]
    assert generate(fast, prompts, 16, **options) == generate(plain, prompts, 16, **options)


@pytest.fixture(scope="module")
def windows() -> tuple[Program, Program]:
    plain = aropt.capture(Windows(), rules=["guidance-interval", "temperature"])
    return plain, passed(plain, "cfg-interval", *FUSED)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "what"),
    [
        ({"guidance": 0.99}, "guidance can't be 0.99"),
        ({"guidance": math.inf}, "guidance can't be inf"),
        ({"guidance": math.nan}, "guidance can't be nan"),
        ({"top_k": VOCAB + 1}, "top_k can't be 12"),
        ({"guidance_from": 5, "guidance_to": 4}, "can't begin at row 5 and end before row 4"),
        ({"guidance_from": -1}, "guidance_from can't be -1"),
        ({"guidance_from": 1.5}, "guidance_from can't be 1.5"),
    ],
)
def test_bad_values_are_refused(interval: Program, params: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        generate(interval, [[1]], 2, **params)
    assert error.value.code == 2 and error.value.hint


def test_a_bias_must_leave_a_token() -> None:
    program = make_program(1, ("bias",))
    for bias in (-math.inf, [-math.inf] * VOCAB):
        with pytest.raises(UsageError, match="bias leaves no token"):
            generate(program, [[1]], 2, bias=bias)
    assert generate(program, [[1]], 2, bias=[-math.inf] * 10 + [0.0]) == [[10, 10]]


def test_both_rules_are_one() -> None:
    program = make_program(1, ("guidance", "guidance-interval"))
    assert program.meta["rules"] == ["guidance-interval", "temperature"]
