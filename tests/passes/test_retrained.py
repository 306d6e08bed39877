"""token-shuffle: a raster image model becomes one of windows, which nothing ships before it is tuned."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import aropt
from aropt.errors import Unsupported, UsageError, VerificationFailed
from aropt.ir.interpreter import Eager
from aropt.ir.verify import verify
from aropt.models import load
from aropt.passes.token_shuffle import TokenShuffle
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Skips
from tests.support.run import generate
from tests.support.targets import EAGER


@cache
def captured() -> aropt.Program:
    return aropt.capture("digits-ar")


@cache
def shuffled(window: int) -> aropt.Program:
    return TokenShuffle(window).run(captured())


@pytest.fixture(scope="module")
def digits() -> aropt.Program:
    return captured()


def mixed(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    normed = F.rms_norm(x, x.shape[-1:], weights[f"{name}.mix.0.norm.weight"], 1e-6)
    return x + F.silu(normed @ weights[f"{name}.mix.0.up.weight"].T) @ weights[f"{name}.mix.0.down.weight"].T


def by_hand(weights: dict[str, Tensor], ids: Tensor, window: int) -> Tensor:
    """digits-ar's own layers between a shuffle and an unshuffle written out."""
    model, unit = load("digits-ar"), window**2
    known = model.token(ids)
    narrow = (known @ weights["shuffle.compress.weight"].T).flatten(2)
    x = mixed(weights, "shuffle", torch.where(ids[..., :1] >= 17, known[:, :, 0], narrow))
    row = torch.arange(ids.shape[1])
    across = 8 // window
    x = x + model.row(row // across * window) + model.column(row % across * window)
    for block in model.blocks:
        x = block(x)
    x = mixed(weights, "unshuffle", model.norm(x)) @ weights["unshuffle.expand.weight"].T
    return model.head(x.unflatten(2, (unit, -1)) @ weights["unshuffle.lift.weight"].T)


@pytest.mark.parametrize("window", [pytest.param(2, marks=pytest.mark.exhaustive), 4])
def test_the_forward_is_the_model_between_shuffle_and_unshuffle(window: int) -> None:
    made = shuffled(window)
    verify(made)
    unit, rows = window**2, 64 // window**2
    ids = torch.randint(0, 17, (2, rows, unit), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 21
    (logits,) = Eager(made).call("model", {"ids": ids}).values()
    expected = by_hand(made.weights, ids, window)
    assert logits.shape == (2, rows, unit, 17)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [2, 4, 8])
def test_an_image_takes_a_round_a_window(window: int) -> None:
    made = shuffled(window)
    rounds: list[int] = []
    (image,) = generate(made, [[20]], 64, on_round=lambda _: rounds.append(1))
    assert len(rounds) == 64 // window**2 and len(image) == 64
    assert made.meta["capacity"] == 64 // window**2


@pytest.mark.exhaustive
def test_later_passes_are_held_to_the_new_model(digits: aropt.Program) -> None:
    done, results, reference = run_passes(digits, pipeline(["token-shuffle"]), "eager", Instruments())
    status = {r.name: (r.status, r.level) for r in results}
    assert status["token-shuffle"] == ("applied", "retrained") and status["kv-cache"] == ("applied", "rounding")
    assert reference is not digits and reference.meta["unit"] == 4
    assert done.state["k_0"].spec.dims == ("B", 4, "S", 32)


@pytest.mark.exhaustive
def test_nothing_ships_before_it_is_tuned(digits: aropt.Program) -> None:
    with pytest.raises(VerificationFailed, match="needs fine-tuning") as failed:
        aropt.optimize(digits, "eager", pipeline(["token-shuffle:window=4"]))
    assert failed.value.hint == "python -m aropt.models.train --from digits-ar --shuffle 4"


@pytest.mark.parametrize("window", [1, 3, 16])
def test_windows_that_do_not_divide_the_side_are_refused(digits: aropt.Program, window: int) -> None:
    with pytest.raises(UsageError, match="don't divide an image of side 8") as failed:
        TokenShuffle(window).plan(digits, EAGER)
    assert failed.value.hint == "take one of 2, 4, 8"


def test_other_models_are_refused_by_name(digits: aropt.Program) -> None:
    def plan(**meta: object) -> object:
        return TokenShuffle().plan(digits.replace(meta={**digits.meta, **meta}), EAGER)

    with pytest.raises(Unsupported, match="takes the ids of images"):
        plan(side=None)
    with pytest.raises(Unsupported, match="takes the ids of images"):
        plan(loop="unmask")
    with pytest.raises(Unsupported, match="writes text between images"):
        plan(single=9)
    assert isinstance(plan(unit=4), Skips)


def test_a_prompt_may_hold_ids_that_stand_alone() -> None:
    """Text before an image: each id a row of its own, as class ids are."""
    made = shuffled(TokenShuffle().window)
    image = generate(made, [[20, 25, 1, 2, 3, 4]], 8)[0]
    assert len(image) == 8
    with pytest.raises(UsageError, match="a window has 2 of its 4 ids"):
        generate(made, [[20, 1, 2, 25]], 8)
