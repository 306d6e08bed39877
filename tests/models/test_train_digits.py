"""Recipes of the models of digits: likelihoods and samples of both orders, tuning to windows, CCA, quality."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from aropt.errors import UsageError
from aropt.models import digits, shuffle, train, train_cca, train_digits, train_shuffle
from aropt.models.quality_digits import frechet

pytest.importorskip("sklearn", reason="needs aropt[models]")


def narrow(window: int) -> nn.Module:
    """A narrow model of seed 0 with sharp logits: window 0 is digits-ar, others a ShuffleAR."""
    torch.manual_seed(0)
    if not window:
        model: nn.Module = digits.DigitsAR(width=32, layers=2, heads=2, hidden=48)
    else:
        model = shuffle.ShuffleAR(shuffle.Shape(window=window, width=32, layers=2, heads=2, hidden=48, mixing=40))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.ndim == 2 else 1)
    return model.eval().requires_grad_(False)


def inputs(model: nn.Module, labels: Tensor, pixels: Tensor) -> Tensor:
    """What model.forward reads of images: int64 [N, 64] or [N, T, W]."""
    first = 17 + labels
    if isinstance(model, digits.DigitsAR):
        return torch.cat([first[:, None], pixels[:, :-1]], 1)
    assert isinstance(model, shuffle.ShuffleAR)
    rows = shuffle.rows(pixels, 8, model.shape.window)
    return torch.cat([first[:, None, None].repeat(1, 1, model.unit), rows[:, :-1]], 1)


@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_stepping_gives_the_logits_of_a_forward(window: int) -> None:
    model, (labels, pixels) = narrow(window), (part[:3] for part in train_digits.data()[2])
    ids = inputs(model, labels, pixels)
    step = train_digits.stepper(model)
    rows = [step(ids[:, t : t + 1] if window == 0 else ids[:, t], t) for t in range(ids.shape[1])]
    stepped = torch.stack(rows, 1).squeeze(2) if window == 0 else torch.stack(rows, 1)
    torch.testing.assert_close(stepped, model(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [0, 1, 2, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samples_are_those_of_plain_forwards(window: int, guidance: float) -> None:
    model, labels = narrow(window), torch.tensor([0, 3, 9])
    drawn = train_digits.sample(model, labels, guidance, torch.Generator().manual_seed(1))
    assert drawn.shape == (3, 64)
    generator, written = torch.Generator().manual_seed(1), torch.zeros(3, 64, dtype=torch.long)
    ids = inputs(model, labels, written)
    null = inputs(model, torch.full_like(labels, 10), written)
    for t in range(ids.shape[1]):
        null[:, 1:] = ids[:, 1:]
        base = model(null)[:, t]
        logits = base + guidance * (model(ids)[:, t] - base)
        new = torch.multinomial(logits.reshape(-1, 17).softmax(-1), 1, generator=generator).view(3, -1)
        order = torch.arange(64)[None] if window < 1 else shuffle.rows(torch.arange(64)[None], 8, window).flatten(1)
        written[:, order[0, t * new.shape[1] : (t + 1) * new.shape[1]]] = new
        ids = inputs(model, labels, written)
    assert drawn.tolist() == written.tolist()


def test_a_likelihood_counts_every_pixel_once() -> None:
    """With a constant model every image has 64 times the logarithm of 17 levels, whatever the window."""
    labels, pixels = (part[:5] for part in train_digits.data()[2])
    for window in (0, 1, 2, 4):
        model = narrow(window)
        head = model.get_submodule("head")
        assert isinstance(head, nn.Linear)
        head.weight.zero_()
        assert train_digits.nll(model, labels, pixels) == pytest.approx(math.log(17), rel=1e-5)
        wanted = torch.full((5,), -64 * math.log(17))
        torch.testing.assert_close(train_cca.likelihood(model, labels, pixels), wanted)


def test_targets_are_the_pixels_in_the_order_of_generation() -> None:
    labels, pixels = (part[:2] for part in train_digits.data()[2])
    _, targets = train_digits.predicted(narrow(2), labels, pixels)
    assert targets[0, :8].tolist() == pixels[0, [0, 1, 8, 9, 2, 3, 10, 11]].tolist()
    assert train_digits.predicted(narrow(0), labels, pixels)[1].tolist() == pixels.tolist()


def test_a_raster_model_gives_its_weights_to_windows() -> None:
    raster = narrow(0)
    assert isinstance(raster, digits.DigitsAR)
    model = train_shuffle.shuffled(raster, 2)
    assert model.shape == shuffle.Shape(window=2, width=32, layers=2, heads=2, hidden=48)
    for name in ("token", "head", "norm", "blocks.1.qkv"):
        assert torch.equal(model.get_submodule(name).weight, raster.get_submodule(name).weight)
    torch.testing.assert_close(model.row.weight[1], raster.row.weight[2:4].mean(0))
    again = train_shuffle.shuffled(raster, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(UsageError, match="window of 3 does not divide"):
        train_shuffle.shuffled(raster, 3)


def test_tuning_writes_a_model_that_loads(tmp_path: Path) -> None:
    raster = narrow(0)
    before = train_shuffle.shuffled(raster, 4)  # type: ignore[arg-type]
    model, record = train_shuffle.tune(raster, 4, "tuned", 12, tmp_path)
    found = shuffle.load(tmp_path / "tuned.safetensors")
    held = train_digits.data()[2]
    nll = train_digits.nll(model.eval(), *held)
    assert train_digits.nll(found.eval(), *held) == pytest.approx(nll, abs=0.02)  # bfloat16
    assert nll < train_digits.nll(before.eval(), *held)
    assert (record["from"], record["window"], record["best_step"]) == ("digits-ar", 4, 12)


def test_contrast_starts_at_the_logarithm_of_two() -> None:
    model, (labels, pixels) = narrow(0), (part[:6] for part in train_digits.data()[0])
    labels = torch.tensor([1, 1, 2, 10, 4, 5])  # negatives: 2 of 1, 1 of 5, 5 of 4; not 1 of 1, none of 2, 4 of none
    found = train_cca.contrast(model, model, labels, pixels, beta=0.3, negative=10.0)
    assert found.item() == pytest.approx(math.log(2) * (6 + 10 * 3) / 6)


def test_contrast_raises_the_right_class_over_the_wrong_one() -> None:
    frozen, (labels, pixels) = narrow(0), (part[:24] for part in train_digits.data()[0])
    model = narrow(0).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def seen(model: nn.Module) -> tuple[float, float]:
        """Log likelihoods under the right and under the wrong classes."""
        with torch.no_grad():
            right, wrong = (train_cca.likelihood(model, c, pixels).mean() for c in (labels, labels.roll(1)))
        return float(right), float(wrong)

    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(train_cca.contrast(model, frozen, labels, pixels, beta=0.1, negative=4.0))
        optimizer.step()
    (right, wrong), (right_before, wrong_before) = seen(model), seen(frozen)
    assert wrong < wrong_before
    assert right - wrong > right_before - wrong_before + 0.01


def test_cca_marks_what_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_cca.quality_digits, "sampled", lambda *_: {})
    base = digits.DigitsAR().requires_grad_(False)
    _, record = train_cca.tune(base, "tuned", 1, tmp_path)
    assert record["guidance_free"] is True
    assert digits.load(tmp_path / "tuned.safetensors").guidance_free is True
    digits.save(base, tmp_path / "base.safetensors")
    assert digits.load(tmp_path / "base.safetensors").guidance_free is False


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.floats(-3, 3), st.floats(0.2, 3))
def test_the_distance_is_that_of_normal_distributions(seed: int, moved: float, scaled: float) -> None:
    a = torch.randn(300, 4, generator=torch.Generator().manual_seed(seed)).double()
    b = (a - a.mean(0)) * scaled + a.mean(0) + moved
    wanted = 4 * moved**2 + (scaled - 1) ** 2 * float(a.T.cov().trace())
    assert frechet(a, b) == pytest.approx(wanted, abs=1e-6)
    assert frechet(b, a) == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    "arguments",
    [[], ["digits-ar", "--shuffle", "2"], ["--from", "digits-ar"], ["--shuffle", "2"], ["--from", "text-ar"]],
)
def test_the_command_names_what_is_missing(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    assert "digits-ar" in capsys.readouterr().err
