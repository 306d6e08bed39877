"""Rounds and time by window."""

from __future__ import annotations

import pytest
import torch

import aropt
from aropt.bench.window_sweep import curve, windows
from aropt.ir.interpreter import Eager
from aropt.models.shuffle import Shape, ShuffleAR
from aropt.pipeline.report import html


def test_windows_divide_the_image_and_leave_more_than_one() -> None:
    assert windows(8) == [1, 2, 4] and windows(6) == [1, 2, 3] and windows(32) == [1, 2, 4, 8] and windows(7) == [1]


def test_twins_take_a_round_a_window() -> None:
    module = ShuffleAR(Shape(side=4, window=2, width=16, layers=1, heads=2, hidden=16, mixing=16)).eval()
    done = aropt.optimize(aropt.capture(module), "eager", check=False)
    found = curve(module, done, "eager", 1, 2, lambda _: None)
    assert [(w["window"], w["rounds"], w["n"]) for w in found] == [(1, 16, 2), (2, 4, 2)]
    assert all(0 < w["p10"] <= w["median"] <= w["p90"] for w in found)
    checked = {"status": "pass", "metrics": {"cases": 1}}
    page = html({**done.report, "verify": checked, "windows": found})
    assert "Rounds and time by window" in page and "2 × 2" in page


def test_models_without_twins_have_no_curve() -> None:
    plain = aropt.capture("digits-ar")
    done = aropt.Compiled(plain, Eager(plain))
    assert curve(torch.nn.Identity(), done, "eager", 1, 2, lambda _: None) == []


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_twin_has_the_same_backbone(window: int) -> None:
    module = ShuffleAR(Shape(side=4, window=2, width=16, layers=1, heads=2, hidden=16, mixing=16))
    twin = module.twin(window)
    assert twin.unit == window**2 and not twin.training
    shapes = {n: p.shape for n, p in module.blocks.named_parameters()}
    assert shapes == {n: p.shape for n, p in twin.blocks.named_parameters()}
