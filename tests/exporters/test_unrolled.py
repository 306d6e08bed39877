"""Several rounds a call generate what stepping and the reference generate, whatever ends a sequence and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import Unsupported
from aropt.exporters.unroll import in_order, unroll
from aropt.ir.control import Call, Seq, loops
from aropt.ir.interpreter import run
from aropt.ir.program import Program
from aropt.loops.request import Request
from aropt.loops.runtime import make_inputs, slots
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.targets import lower
from aropt.targets.ort import multi_step
from aropt.targets.ort.executor import OnnxRuntime
from aropt.targets.ort.plan import Plan
from tests.support.directories import small_llama
from tests.support.run import generate

K = multi_step.ROUNDS
PROMPTS = [[72, 101, 108, 108, 111], [84, 104]]


class Pair:
    """The same program stepping and with several rounds a call."""

    def __init__(self, rules: tuple[str, ...], folder: Path) -> None:
        plain = aropt.capture(small_llama(folder), capacity=64, rules=rules)
        self.plain = plain
        self.fast: Program = run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))[0]
        made: Any = lower(self.fast, "onnxruntime", threads=1)
        self.stepping: OnnxRuntime = made.stepping()
        self.several = made.with_plan(Plan(multi_step.build(self.fast, self.stepping)))
        self.kept = made

    def both(self, prompts: list[list[int]], n: int, **options: Any) -> list[list[int]]:
        """What both generate, which must be the same. Nothing ends a sequence but what is given."""
        options = {"plain": True, **options}
        want = generate(self.fast, prompts, n, executor=self.stepping, **options)
        assert generate(self.fast, prompts, n, executor=self.several, **options) == want
        return want


@pytest.fixture(scope="module", params=["default", pytest.param("repetition-penalty", marks=pytest.mark.exhaustive)])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The second one has state that grows with each token: which were seen."""
    penalty = request.param != "default"
    rules = ("repetition-penalty", "temperature", "top-k") if penalty else ("temperature", "top-k", "top-p")
    return Pair(rules, tmp_path_factory.mktemp("model"))


def test_lengths_around_calls(pair: Pair) -> None:
    """Also where the caches have no slots for rounds after the limit: the last rounds are then single."""
    for prompt in PROMPTS:
        for n in range(2 * K + 3):
            want = pair.both([prompt], n)
            assert [len(row) for row in want] == [n]
    full = 64 - len(PROMPTS[0]) + 1
    for n in range(full - K, full + 1):
        assert pair.both([PROMPTS[0]], n) == generate(pair.plain, [PROMPTS[0]], n, plain=True)


def test_single_rounds_where_no_slot_is_spare(pair: Pair) -> None:
    """After the limit a round too many needs a slot that nothing else is in: of 64 here, in each cache."""
    assert K == 4
    for length, n, single in (
        (4, 2, True),
        (4, 11, False),
        (4, 59, False),
        (4, 60, False),
        (5, 58, True),
        (4, 61, True),
    ):
        pair.several.sessions.pop("step_greedy", None)
        pair.both([PROMPTS[1][:1] * length], n)
        assert ("step_greedy" in pair.several.sessions) is single, (length, n)


def test_stops_inside_a_call(pair: Pair) -> None:
    """`generated` ends with the round in which the last sequence ended, as stepping's does."""
    free = pair.both(PROMPTS, 2 * K + 2)
    for prompts in ([PROMPTS[0]], PROMPTS):
        for at in range(2 * K + 2):
            stop = [row[at] for row in free[: len(prompts)]]
            pair.both(prompts, 2 * K + 2, stop=stop)
            inputs = make_inputs(pair.fast, Request(prompts, 2 * K + 2, stop=tuple(stop)))
            found = [
                run(pair.fast, inputs, slots(pair.fast, inputs), executor)["generated"].tolist()
                for executor in (pair.stepping, pair.several)
            ]
            assert found[0] == found[1]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 130), min_size=1, max_size=9), min_size=1, max_size=3), st.integers(0, 14),
       st.integers(0, 2**40), st.sampled_from([0.0, 0.7, 1.5]), st.sampled_from([1.0, 1.4]))  # fmt: skip
def test_drawn_and_ragged(
    pair: Pair, prompts: list[list[int]], n: int, seed: int, temperature: float, penalty: float
) -> None:
    params = {"temperature": temperature, "top_k": 20}
    if "repetition_penalty" in pair.fast.inputs:
        params["repetition_penalty"] = penalty
    pair.both(prompts, n, seed=seed, **params)


def test_it_is_the_reference(pair: Pair) -> None:
    for params in ({}, {"temperature": 0.9, "seed": 3}):
        want = generate(pair.plain, PROMPTS, 3 * K, **params)
        assert generate(pair.fast, PROMPTS, 3 * K, executor=pair.several, **params) == want
    assert multi_step.compare(pair.fast, pair.stepping, pair.several)["cases"] > 20


def test_streaming_shows_each_round(pair: Pair) -> None:
    """And then the step's own session runs, for a part of the rounds or for all."""
    for until in (1, 3, 99):
        shown: list[int] = []

        def show(values: Any, until: int = until, shown: list[int] = shown) -> bool:
            shown.append(int(values["emitted"]))
            return len(shown) < until

        got = generate(pair.fast, [PROMPTS[0]], 11, executor=pair.several, on_round=show)
        assert got == pair.both([PROMPTS[0]], 11) and shown == got[0][:until]


def test_another_generation_of_other_sizes(pair: Pair) -> None:
    """Buffers are shared by generations: what an earlier one left there is not seen."""
    for n in (20, 5, 50, 20):
        for prompts in ([PROMPTS[1]], [PROMPTS[0], PROMPTS[0]], PROMPTS):
            pair.both(prompts, n)


def test_caches_are_in_one_buffer_only_in_order(pair: Pair) -> None:
    """A ragged step's positions don't depend on the round before: in one buffer a later round's would be read."""
    control = {loop.body.graph: loop for loop in loops(pair.fast.control) if isinstance(loop.body, Call)}
    for graph, shared in (("ragged_greedy", False), ("step_greedy", True)):
        model = pair.stepping.translated(graph)
        unroll(model, pair.fast.graphs[graph], control[graph], pair.stepping.aliases[graph], 2)
        names = {o.name for o in model.graph.outputs}
        assert "out.k_0@0" in names and "out.emitted@0" in names and "out.feed@0" not in names
        assert shared or "out.slot_positions@0" not in names
        values = {v.name: v for node in model.graph for v in node.outputs}
        cache = next(v for v in model.graph.inputs if v.name == "k_0")
        assert in_order([cache, values["out.k_0@0"], values["out.k_0"]])
        if not shared:
            start = next(v for v in model.graph.inputs if v.name == "slot_positions")
            assert not in_order([start, values["out.slot_positions@0"], values["out.slot_positions"]])


def test_what_is_not_repeated(pair: Pair) -> None:
    """Programs whose tokens grow, a loop whose state is read after it, and large ones."""
    plain = pair.plain
    assert not multi_step.eligible(plain)  # the body is a sequence of graphs
    fast = pair.fast
    assert set(multi_step.eligible(fast)) == set(pair.several.plan.multi_step)
    assert isinstance(fast.control, Seq)
    graph, value = next(iter(multi_step.eligible(fast))), "count"
    reader = Call(graph, {"limit": value}, {})
    later = fast.replace(control=Seq((*fast.control.body, reader)))
    assert not multi_step.eligible(later)
    big = fast.replace(weights={n: w.expand(1024, *w.shape) for n, w in fast.weights.items()})
    with pytest.raises(Unsupported, match="MiB of weights"):
        multi_step.build(big, pair.stepping)


def test_a_difference_is_found(pair: Pair) -> None:
    from aropt.errors import VerificationFailed

    class Other(OnnxRuntime):
        def loop(self, control: Any, values: Any, on_round: Any) -> bool:
            values["limit"] = values["limit"] - int(values["limit"] == K + 1)
            return super().loop(control, values, on_round)

    other = Other(pair.fast, pair.several.folder, 1, pair.several.plan)
    with pytest.raises(VerificationFailed, match="other tokens than stepping"):
        multi_step.compare(pair.fast, pair.stepping, other)
