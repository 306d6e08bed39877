"""Exported loops over a canvas: batches as the program runs them, rules with steps, a status for what they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aropt.exporters.whole_loop import export_program
from aropt.ir.program import Program
from aropt.loops.guards import STATUS
from aropt.models.canvas import MASK
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.targets.ort import run_loop
from tests.conftest import make_program
from tests.support.canvases import capture, tiny
from tests.support.run import from_session, generate

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8]]


@pytest.fixture(scope="module", params=[0, pytest.param(4, marks=pytest.mark.exhaustive)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Any]:
    """A model that sees its whole canvas, and one with blocks of its own, of 64 ids; the default rule."""
    plain = capture(tiny(request.param))
    program = run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))[0]
    path = tmp_path_factory.mktemp("canvas") / "model.onnx"
    export_program(program, path)
    return program, run_loop.session(path, 1)


def test_batches_and_steps_are_those_of_the_program(exported: tuple[Program, Any]) -> None:
    """The rule has a parameter `steps`, which is not how many rounds one call takes."""
    program, session = exported
    block = {} if program.meta["block"] else {"block": 4}
    fill = [[MASK] * 4 + [9, 9] + [MASK] * 2] * 3
    for params in ({}, {"steps": 4, **block}, {"temperature": 0.9, "seed": 3}, {"fill": fill}):
        given: dict[str, Any] = params
        want = generate(program, PROMPTS, 8, **given)
        for chunk in (None, 3):
            assert from_session(session, program, PROMPTS, 8, chunk=chunk, **given) == want


def canvas(program: Program, lengths: list[int], n: int = 4, width: int | None = None) -> dict[str, Any]:
    """Inputs of canvases whose prompts are ones."""
    own, width = int(program.meta["block"]), width or max(lengths)
    rows = [[0] * (width - size) + [1] * (size - n) + [MASK] * n for size in lengths]
    inputs = {"canvas": rows, "lengths": lengths, "answers": [size - n for size in lengths], "block": own or n}
    return inputs | {"origin": [0 if own else size - n for size in lengths], "streams": list(range(len(lengths)))}


BAD: list[tuple[dict[str, Any], int]] = [
    ({"canvas": [[1] * 61 + [MASK] * 4], "lengths": [65], "answers": [61]}, 1),
    ({"answers": [0]}, 2),
    ({"answers": [7]}, 2),
    ({"lengths": [8]}, 2),
    ({"lengths": [-1]}, 2),
    ({"seed": -1}, 3),
    ({"seed": 2**62}, 3),
    ({"block": 0}, 5),
    ({"block": -4}, 5),
    ({}, 0),
]


@pytest.mark.parametrize(("change", "status"), BAD)
def test_what_a_canvas_can_not_be(exported: tuple[Program, Any], change: dict[str, Any], status: int) -> None:
    program, session = exported
    feeds = {k: np.array(v) for k, v in {**canvas(program, [7]), **change}.items()}
    tokens, found = session.run(["generated", "status"], feeds)
    assert int(found) == status and (status == 0 or status in STATUS)
    assert (tokens >= 0).sum() == (0 if status else 4)


def test_rows_of_different_lengths(exported: tuple[Program, Any]) -> None:
    """A model that sees all of its canvas sees padding too: refused, not answered otherwise than alone."""
    program, session = exported
    for lengths, width in (([7, 9], 9), ([7, 7], 9)):
        feeds = {k: np.array(v) for k, v in canvas(program, lengths, width=width).items()}
        tokens, status = session.run(["generated", "status"], feeds)
        assert int(status) == (0 if program.meta["ragged"] else 4)
        assert (tokens >= 0).any() == program.meta["ragged"]


def test_other_blocks_than_the_models_own(exported: tuple[Program, Any]) -> None:
    program, session = exported
    for change in ({"block": 3}, {"origin": [3]}):
        feeds = {k: np.array(v) for k, v in {**canvas(program, [7]), **change}.items()}
        assert int(session.run(["status"], feeds)[0]) == (5 if program.meta["block"] else 0)


def test_prompts_of_a_plain_loop(tmp_path: Path) -> None:
    """Without positions apart from slots, padding would be read as a prompt."""
    cached = run_passes(make_program(1), pipeline(), "onnxruntime", Instruments(check=False))[0]
    program = cached.replace(meta={**cached.meta, "ragged": False})
    export_program(program, tmp_path / "model.onnx")
    session = run_loop.session(tmp_path / "model.onnx", 1)
    prompts = [[1, 2, 3], [4, 5]]
    assert from_session(session, program, prompts, 4) == generate(program, prompts, 4)
    feeds = {"prompt": [[1, 2, 3], [0, 4, 5]], "lengths": [3, 2], "limit": 4, "streams": [0, 1]}
    tokens, status = session.run(["generated", "status"], {k: np.array(v) for k, v in feeds.items()})
    assert int(status) == 4 and tokens.size == 0


@pytest.mark.parametrize(("prompts", "capacity"), [([[1]], 16), ([], 16), ([[1]], 4), ([[5] * 40], 8)])
def test_the_comparison_has_prompts_of_several_lengths(prompts: Any, capacity: int) -> None:
    program = make_program(1)
    program = program.replace(meta={**program.meta, "prompts": prompts, "capacity": capacity, "mask": 2})
    start = run_loop.example(program)
    assert 1 < len(start) <= capacity // 2 and 2 not in start
