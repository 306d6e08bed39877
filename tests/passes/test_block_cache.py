"""block-cache: exact where the mask proves it, row by row; and what validation says when it is not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import Unsupported
from aropt.ir.control import Call, calls, rewrite
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program
from aropt.ir.serialize import from_json, to_json
from aropt.loops.request import Request
from aropt.loops.runtime import make_inputs
from aropt.loops.unmask.cache_policy import cached
from aropt.models.canvas import MASK, CanvasLM
from aropt.passes.block_cache import BlockCache
from aropt.restrict.rewrite import restrict
from aropt.rewriting.contract import Applies, Skips, planned
from aropt.validate.compare import cases, validate, with_probe
from tests.support.canvases import capture, tiny
from tests.support.run import generate
from tests.support.targets import EAGER

BLOCK = 4


@pytest.fixture(scope="module")
def plain() -> Program:
    return capture(tiny(BLOCK), "threshold")


@pytest.fixture(scope="module")
def fast(plain: Program) -> Program:
    return BlockCache().run(plain)


def test_it_applies_to_models_with_blocks(plain: Program) -> None:
    assert isinstance(planned(BlockCache(), plain, EAGER), Applies)


def test_sizes_that_only_values_tell_are_read(fast: Program) -> None:
    """How many rows a round computes follows from its canvas: a file with such a program is read again."""
    again = from_json(json.loads(json.dumps(to_json(fast))), fast.weights)
    assert generate(again, [[1, 2, 3]], 8) == generate(fast, [[1, 2, 3]], 8)


@pytest.mark.exhaustive
def test_it_asks_the_mask(plain: Program) -> None:
    """The captured mask decides, not what the model says of itself."""
    found = planned(BlockCache(), plain.replace(meta={**plain.meta, "block": 3}), EAGER)
    assert isinstance(found, Skips) and found.reason == "row 0 sees row 3, which is in a later block of 3"
    assert isinstance(planned(BlockCache(), plain.replace(meta={**plain.meta, "block": 8}), EAGER), Applies)
    everything = capture(tiny(0))
    found = planned(BlockCache(), everything.replace(meta={**everything.meta, "block": 4}), EAGER)
    assert isinstance(found, Skips) and found.reason == "row 0 sees row 63, which is in a later block of 4"
    assert "no blocks" in planned(BlockCache(), everything, EAGER).reason  # type: ignore[union-attr]
    assert isinstance(planned(BlockCache(), BlockCache().run(plain), EAGER), Skips), "it does not fire twice"


prompts = st.lists(st.lists(st.integers(0, 250), min_size=1, max_size=11), min_size=1, max_size=4)


given_ids = st.lists(st.sampled_from([MASK, MASK, MASK, 7, 8]), min_size=17, max_size=17)


@settings(deadline=None, max_examples=25)
@given(prompts, st.integers(1, 17), st.sampled_from([0.05, 0.3, 2.0]), st.sampled_from([0.0, 1.0]), st.integers(0, 9),
       given_ids)  # fmt: skip
def test_batches_equal_the_plain_loop_alone(
    plain: Program, fast: Program, ids: list[list[int]], n: int, tau: float, temperature: float, seed: int, fill: Any
) -> None:
    """Ragged batches as one, rows in different blocks, some ids given: each as the plain program gives it alone."""
    params: dict[str, Any] = {"threshold": tau, "temperature": temperature, "seed": seed, "fill": [fill[:n]] * len(ids)}
    together = generate(fast, ids, n, **params)
    params["fill"] = [fill[:n]]
    assert together == [generate(plain, [p], n, streams=[i], **params)[0] for i, p in enumerate(ids)]


def test_blocks_that_are_given_whole_are_computed_when_they_are_passed(plain: Program, fast: Program) -> None:
    """Their keys and values see the block before them, whose ids were found meanwhile."""
    for seed in range(8):
        ids = torch.randint(0, 250, (3, 4), generator=torch.Generator().manual_seed(seed)).tolist()
        fill = [[MASK] * 4 + ids[0] + ids[1] + [MASK] * 8]
        assert generate(fast, [ids[2]], 20, fill=fill, threshold=2.0) == generate(
            plain, [ids[2]], 20, fill=fill, threshold=2.0
        )


def test_few_rows_are_computed(fast: Program) -> None:
    """All up to the first block, two blocks when one begins, else one (dllm invariant E14)."""
    assert schedule(fast, [[1] * 8], 12, threshold=2.0) == [12, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]


def schedule(program: Program, ids: list[list[int]], n: int, **params: Any) -> list[int]:
    """How many rows each round computes."""
    rows: list[int] = []

    class Counting(Eager):
        def call(self, graph: str, inputs: Any) -> Any:
            if graph == "step":
                rows.append(inputs["ids"].shape[1])
            return super().call(graph, inputs)

    values = make_inputs(program, Request(ids, n, params=tuple(params.items())))
    run(program, values, values["canvas"].shape[1], Counting(program))
    return rows


@pytest.mark.parametrize("wrong", ["no persisting forward", "masks alone", "stale slots"])
def test_validation_catches_a_wrong_schedule(plain: Program, fast: Program, wrong: str) -> None:
    """Without the forward after a block is done, its last rows stay as they were masked (dllm invariant E11)."""
    broken = {
        "no persisting forward": lambda: cached(
            plain, lambda look: (look.index <= look.now) & ((look.index == look.now) | (look.rounds == 0))
        ),
        "masks alone": lambda: cached(plain, lambda look: look.masked | (look.rounds == 0)),
        "stale slots": lambda: fast.replace(control=rewrite(fast.control, stale)),
    }[wrong]()
    verdict = validate(plain, with_probe(broken), chosen=cases(plain))
    assert not verdict.passed
    assert validate(plain, with_probe(fast), chosen=cases(plain)).passed


def stale(call: Call) -> list[Any]:
    """The step without the new keys of its second layer."""
    if call.graph != "step":
        return [call]
    return [replace(call, writes={o: v for o, v in call.writes.items() if o != "k_1"} | {"k_1": "lost"})]


def test_rows_see_what_the_mask_shows() -> None:
    """facts["reach"]: the last row that each row sees."""
    program = capture(tiny(BLOCK))
    found = restrict(program.graphs["model"], program.weights, 64, canvas=True).facts
    assert found["reach"] == [(i // BLOCK + 1) * BLOCK - 1 for i in range(64)] and found["masks"] == ["table"]
    program = capture(tiny(0))
    assert restrict(program.graphs["model"], program.weights, 64, canvas=True).facts["masks"] == ["all"]


def test_what_mixes_rows_otherwise_is_refused() -> None:
    class Mean(CanvasLM):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + self.head(self.embed(ids).mean(1, keepdim=True))

    model = Mean(width=32, layers=1, heads=2, hidden=48)
    model.capacity = 64  # type: ignore[assignment]
    program = capture(model)
    with pytest.raises(Unsupported, match="mean"):
        restrict(program.graphs["model"], program.weights, 64, canvas=True)


@pytest.mark.exhaustive
def test_it_is_fused_and_lowered(plain: Program) -> None:
    done = aropt.optimize(plain, target="onnxruntime")
    assert done.report["verify"]["status"] == "pass"
    assert {c.graph for c in calls(done.program.control)} >= {"step_greedy", "step_sample", "rows"}
    assert MASK not in generate(done, [[1, 2], [3, 4, 5]], 9, threshold=0.2)[0]


@pytest.mark.parametrize(
    ("block", "contrib"),
    [
        (BLOCK, True),
        *(pytest.param(*both, marks=pytest.mark.exhaustive) for both in ((BLOCK, False), (0, True), (0, False))),
    ],
)
def test_the_whole_loop_is_one_model(block: int, contrib: bool, tmp_path: Path) -> None:
    """A canvas in, tokens out: one, several, ragged, in one call and in chunks, greedy and sampled."""
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    program = capture(tiny(block), "threshold")
    fast = aropt.optimize(program, target="onnxruntime", check=False)
    export_program(fast.program, tmp_path / "model.onnx", contrib=contrib)
    assert run_loop.compare(tmp_path / "model.onnx", fast.program, fast.executor)["status"] == "pass"
