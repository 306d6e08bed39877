"""Rows of several ids: a model of image windows is captured, cached, lowered and exported like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aropt
from aropt.bench.variants import Origin, Spec
from aropt.errors import Unsupported, UsageError
from aropt.ir import units
from aropt.ir.executor import Executor
from aropt.ir.interpreter import run
from aropt.loops.request import Request, room
from aropt.loops.runtime import make_inputs, slots
from aropt.targets import lower
from aropt.validate.compare import cases, validate, with_probe
from tests.support.run import generate
from tests.support.windows import LEVELS, ROWS, W, Windows

RULES = ["guidance", "repetition-penalty", "temperature", "top-k", "top-p"]


@pytest.fixture(scope="module")
def program() -> aropt.Program:
    return aropt.capture(Windows(), rules=RULES)


@pytest.fixture(scope="module")
def cached(program: aropt.Program) -> aropt.Compiled:
    return aropt.optimize(program, "eager", check=False)


Rows = list[list[int]]


def joined(rows: Rows) -> list[int]:
    return [t for row in rows for t in row]


IDS = st.integers(0, LEVELS - 1)
ROW = st.one_of(st.integers(LEVELS, LEVELS + 2).map(lambda c: [c]), st.lists(IDS, min_size=W, max_size=W))
PROMPTS = st.lists(st.lists(ROW, min_size=1, max_size=3).map(joined), min_size=1, max_size=3)
META = {"unit": W, "single": LEVELS, "vocab": LEVELS}


@given(st.lists(ROW, max_size=5))
def test_rows_hold_a_window_or_an_id_alone(rows: list[list[int]]) -> None:
    assert units.rows(META, joined(rows)) == [r if len(r) == W else r * W for r in rows]
    assert units.rows({"vocab": LEVELS}, joined(rows)) == joined(rows)


@given(st.lists(ROW, max_size=3), st.lists(IDS, min_size=1, max_size=W - 1), st.lists(ROW, max_size=1))
def test_windows_that_are_not_whole_are_refused(
    before: list[list[int]], part: list[int], after: list[list[int]]
) -> None:
    if after and len(after[0]) == W:
        after = [after[0][: W - len(part) - 1]]
    with pytest.raises(UsageError, match=f"of its {W} ids"):
        units.rows(META, joined([*before, part, *after]))


def plain(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    """Greedy generation by forwards over all rows."""
    rows = units.rows(META, prompt)
    new: list[int] = []
    while len(new) < n:
        window = model(torch.tensor([rows]))[0, -1].argmax(-1).tolist()
        new += window
        rows = [*rows, window]
    return new[:n]


@settings(max_examples=12, deadline=None)
@given(PROMPTS, st.integers(0, 3 * W))
def test_greedy_generation_is_the_models_own(prompts: list[list[int]], n: int) -> None:
    model = Windows().eval()
    program, cached = plain_programs(model)
    expected = [plain(model, p, n) for p in prompts]
    assert generate(program, prompts, n) == expected
    assert generate(cached, prompts, n) == expected


KEPT: dict[str, Any] = {}


def plain_programs(model: nn.Module) -> tuple[aropt.Program, aropt.Compiled]:
    if not KEPT:
        KEPT["plain"] = aropt.capture(model)
        KEPT["cached"] = aropt.optimize(KEPT["plain"], "eager", check=False)
    return KEPT["plain"], KEPT["cached"]


def test_a_round_is_a_window(program: aropt.Program, cached: aropt.Compiled) -> None:
    for one in (program, cached):
        rounds: list[int] = []
        (row,) = generate(one, [[LEVELS]], 10, on_round=lambda _, r=rounds: r.append(1))
        assert len(row) == 10 and len(rounds) == 3  # the third window is cut


def test_what_fits(program: aropt.Program) -> None:
    assert room(program, [LEVELS]) == ROWS * W and room(program, [LEVELS, 0, 0, 0, 0]) == (ROWS - 1) * W
    assert len(generate(program, [[LEVELS]], ROWS * W)[0]) == ROWS * W
    with pytest.raises(UsageError, match="don't fit"):
        generate(program, [[LEVELS]], ROWS * W + 1)


@pytest.mark.exhaustive
@settings(max_examples=10, deadline=None)
@given(PROMPTS, st.integers(0, 2**40), st.sampled_from([{}, {"top_k": 2}, {"repetition_penalty": 3.0}]))
def test_sampled_rows_do_not_depend_on_the_batch(prompts: list[list[int]], seed: int, more: dict[str, float]) -> None:
    if "guided" not in KEPT:
        KEPT["guided"] = aropt.optimize(aropt.capture(Windows(), rules=RULES), "eager", check=False)
    params = {"seed": seed, "temperature": 1.3, "guidance": 2.0, **more}
    together = generate(KEPT["guided"], prompts, 2 * W, **params)
    for i, prompt in enumerate(prompts):
        assert generate(KEPT["guided"], [prompt], 2 * W, streams=[i], **params) == [together[i]]


def test_each_id_of_a_window_has_noise_of_its_own() -> None:
    flat_model = Windows()
    for weight in flat_model.head.parameters():
        nn.init.zeros_(weight)
    drawn = generate(aropt.capture(flat_model), [[LEVELS]] * 60, 2 * W, temperature=1.0, seed=5)
    seen = torch.tensor(drawn)
    assert len(seen.unique()) == LEVELS
    for i in range(2 * W):  # of any two ids in a sequence, a fifth are equal by chance
        for j in range(i):
            assert 0.05 < float((seen[:, i] == seen[:, j]).float().mean()) < 0.45


def test_nothing_is_emitted_after_a_stop_token_inside_a_window(program: aropt.Program, cached: aropt.Compiled) -> None:
    (free,) = generate(program, [[LEVELS]], 3 * W, temperature=1.0, seed=1)
    at = next(i for i in range(W, 2 * W - 1) if free[i] not in free[:i])
    for made in (program, cached):
        assert generate(made, [[LEVELS]], 3 * W, temperature=1.0, seed=1, stop=[free[at]]) == [free[: at + 1]]
    for one in (program, cached.program):
        values = run(one, make_inputs(one, Request(((LEVELS,),), 3 * W, 1, (("temperature", 1.0),), (free[at],))), 16)
        assert values["generated"].shape == (1, at // W + 1, W)


@pytest.mark.exhaustive
def test_the_whole_pipeline_is_valid(program: aropt.Program) -> None:
    done = aropt.optimize(program, "onnxruntime")
    assert done.report["verify"]["status"] == "pass"
    status = {p["name"]: p["status"] for p in done.report["passes"]}
    assert status["kv-cache"] == "applied" and status["fuse-sampler"] == "applied"
    assert status["fuse-attention"] == "applied"


def test_validation_sees_a_wrong_id_inside_a_window(program: aropt.Program, cached: aropt.Compiled) -> None:
    executor = lower(cached.program, "eager")

    class Wrong(Executor):
        """The third id of the second window is another one."""

        rounds = 0

        def call(self, graph: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            results = executor.call(graph, inputs)
            for name, value in results.items():
                if name == "emitted" and value.numel():
                    self.rounds += 1
                    if self.rounds == 2:
                        results[name] = value.clone()
                        results[name][0, 2] = (value[0, 2] + 1) % LEVELS
            return results

    probed = with_probe(cached.program)
    executor = lower(probed, "eager")
    chosen = [c for c in cases(program, quick=True) if "temperature" in dict(c.params) and not c.ends]
    assert validate(program, probed, executor, chosen).passed
    assert not validate(program, probed, Wrong(), chosen, explain=False).passed


@pytest.mark.exhaustive
def test_the_whole_loop_runs_in_plain_onnxruntime(program: aropt.Program, tmp_path: Path) -> None:
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    done = aropt.optimize(program, "onnxruntime", check=False)
    for contrib in (False, True):
        path = tmp_path / str(contrib) / "model.onnx"
        export_program(done.program, path, contrib)
        assert run_loop.compare(path, done.program, done.executor)["status"] == "pass"


class Flat(Windows):
    """Forgets the axis of the window."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids).flatten(2)


def test_logits_without_a_row_for_each_id_are_refused() -> None:
    with pytest.raises(Unsupported, match="return logits"):
        aropt.capture(Flat())


def test_caches_hold_a_row_a_window(program: aropt.Program, cached: aropt.Compiled) -> None:
    inputs = make_inputs(cached.program, Request(((LEVELS,),), ROWS * W))
    values = run(cached.program, inputs, slots(cached.program, inputs), cached.executor)
    assert values["slot_positions"].amax() == ROWS - 1


@pytest.mark.exhaustive
def test_the_benchmark_runs_windows_too(tmp_path: Path) -> None:
    from aropt.bench import timing as bench
    from aropt.cli.optimize import optimize
    from aropt.cli.options import Doing, Reading, Writing

    out = tmp_path / "out"
    optimize(Reading(f"{__file__}:Windows"), Doing("eager", runs=0, no_check=True), Writing(out))
    expected = aropt.load(out).generate([[LEVELS]], 10)[0]
    origin = Origin(f"{__file__}:Windows")
    for variant in ("eager", "cached"):
        tokens, first = bench.variant(Spec(variant, str(out), [LEVELS], 10, 1, origin=origin))()
        assert tokens == expected and first > 0
