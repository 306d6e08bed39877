"""What generate() takes: steps by block, fills, negative prompts, and values in the range of their parameter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

import aropt
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.models.canvas import MASK
from tests.conftest import make_program
from tests.support.canvases import capture, rounds, tiny
from tests.support.run import generate

OWN = 4


@pytest.fixture(scope="module")
def own() -> Program:
    """A model with blocks of its own, four rows each."""
    return capture(tiny(OWN))


@pytest.fixture(scope="module")
def free() -> Program:
    return capture(tiny())


@pytest.fixture(scope="module")
def guided() -> Program:
    return make_program(1, ("guidance", "repetition-penalty", "bias", "top-k", "top-p", "min-p"))


@pytest.mark.parametrize(("prompt", "n", "steps", "count"), [(3, 8, 1, 3), (4, 8, 1, 2), (3, 8, 2, 5), (1, 1, 3, 1)])
def test_steps_are_of_each_block_where_blocks_are_the_models(
    own: Program, prompt: int, n: int, steps: int, count: int
) -> None:
    """A prompt that ends within a block makes the answer touch one more."""
    assert rounds(own, [[1] * prompt], n, steps=steps)[1] == count


def test_a_batch_of_such_a_model_takes_any_steps(own: Program) -> None:
    """The blocks that an answer touches differ by prompt; the rounds of each don't."""
    prompts = [[1, 2, 3], [1, 2, 3, 4]]
    assert generate(own, prompts, 8, steps=3) == [generate(own, [p], 8, steps=3, streams=[i])[0]
                                                 for i, p in enumerate(prompts)]  # fmt: skip


def test_steps_are_of_all_blocks_elsewhere(free: Program) -> None:
    assert rounds(free, [[1, 2, 3]], 8, block=4, steps=6)[1] == 6
    with pytest.raises(UsageError, match="3 steps are not a whole number") as error:
        generate(free, [[1]], 8, block=4, steps=3)
    assert "of a model with blocks of its own" in error.value.where


@pytest.mark.parametrize(
    ("fill", "what", "where"),
    [
        ([[5, MASK, MASK, 260]], "token 260 is not in the vocabulary", "fill 0"),
        ([[5, MASK, MASK, -1]], "token -1 is not in the vocabulary", "fill 0"),
        ([[5, MASK, MASK]], "fill 0 has 3 ids, not 4", "fill"),
        ([[5, MASK, MASK, 1, 2]], "fill 0 has 5 ids, not 4", "fill"),
        ([], "0 answers to fill in for 1 prompts", "fill"),
        ([[MASK] * 4] * 2, "2 answers to fill in for 1 prompts", "fill"),
    ],
)
def test_fills_are_checked(free: Program, fill: Any, what: str, where: str) -> None:
    with pytest.raises(UsageError, match=what) as error:
        generate(free, [[1, 2]], 4, fill=fill)
    assert error.value.where == where


def test_what_a_program_has_no_use_for_is_refused(free: Program, guided: Program) -> None:
    with pytest.raises(UsageError, match="no canvas to fill"):
        generate(guided, [[1]], 2, fill=[[1, 2]])
    for program in (free, make_program(1)):
        with pytest.raises(UsageError, match="takes no negative prompts"):
            generate(program, [[1]], 2, negative=[[1]])


@pytest.mark.parametrize(
    ("negative", "what"),
    [([[1]], "have"), ([[1, 2], [3]], "have"), ([[1, 99]], "token 99 is not in the vocabulary")],
)
def test_negative_prompts_are_checked(guided: Program, negative: Any, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        generate(guided, [[1, 2]], 2, negative=negative)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("temperature", -1.0, "the least is 0"),
        ("temperature", math.nan, "not a finite number"),
        ("temperature", math.inf, "not a finite number"),
        ("temperature", "hot", "it takes numbers, not str"),
        ("temperature", [1.0, 2.0], "it takes one number"),
        ("top_k", 2.5, "whole numbers"),
        ("top_k", -1, "the least is 0"),
        ("top_p", 1.5, "the most is 1"),
        ("top_p", -0.5, "the least is 0"),
        ("min_p", 2, "the most is 1"),
        ("repetition_penalty", 0, "the least is 0.01"),
        ("bias", [1.0, 2.0], "it takes [11]"),
        ("bias", [math.nan] * 11, "not a finite number"),
        ("guidance", math.nan, "not a finite number"),
        ("guidance", math.inf, "not a finite number"),
        ("guidance", 0.5, "the least is 1"),
        ("top_k", 12, "the most is 11"),
    ],
)
def test_values_out_of_range(guided: Program, name: str, value: Any, why: str) -> None:
    with pytest.raises(UsageError, match=f"{name} can't be") as error:
        generate(guided, [[1, 2]], 2, **{name: value})
    assert why in error.value.why and name in error.value.where


def test_values_at_the_ends_of_their_range(guided: Program) -> None:
    """Whole numbers may be floats, as --param gives them; a bias may forbid a token."""
    edges: dict[str, Any] = {"top_k": 3.0, "top_p": 0, "min_p": 1, "bias": [-math.inf] * 10 + [0.0], "guidance": 1}
    assert generate(guided, [[1, 2]], 2, temperature=1, **edges) == [[10, 10]]
    assert len(generate(guided, [[1, 2]], 2, top_p=1, min_p=0, bias=0.5)[0]) == 2


def test_a_canvas_takes_whole_steps_and_blocks(free: Program) -> None:
    for name in ("steps", "block"):
        with pytest.raises(UsageError, match=f"{name} can't be 2.5"):
            generate(free, [[1, 2]], 8, **{name: 2.5})


def test_ranges_are_kept(guided: Program) -> None:
    """In the program of all rules, and in its file; one without them, of an older version, can be read."""
    from aropt.ir.serialize import from_json, to_json

    assert (guided.inputs["top_p"].minimum, guided.inputs["top_p"].maximum) == (0, 1)
    data = to_json(guided)
    assert from_json(data, guided.weights).inputs == guided.inputs
    for given in data["inputs"].values():
        del given["minimum"], given["maximum"]
    assert from_json(data, guided.weights).inputs["top_p"] == replace(
        guided.inputs["top_p"], minimum=None, maximum=None
    )


@pytest.mark.exhaustive
def test_a_model_with_blocks_of_its_own_takes_every_rule() -> None:
    """Validation gives all rules the same steps, whatever the prompts' lengths."""
    done = aropt.optimize(capture(tiny(OWN)), target="eager")
    assert done.report["verify"]["status"] == "pass"
