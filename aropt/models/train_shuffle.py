"""Turning a raster model into a shuffled one and tuning it: python -m aropt.models.train --from digits-ar --shuffle 2.

Windows that don't fit the weights, so it is a start, not an equivalent: backbone, embeddings and head are taken over,
what shuffles is new (2504.17789 tunes from a model without shuffling in the same way).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt.models import digits, shuffle, train_digits
from aropt.models.optimise import SEED


def shuffled(raster: digits.DigitsAR, window: int, dropout: float = 0.0) -> shuffle.ShuffleAR:
    """A ShuffleAR with raster's embeddings, blocks and head; a window's position is the mean of its pixels' positions.

    The rest is drawn from seed 0.  Raises UsageError where the window does not divide the side.
    """
    width, layers = raster.head.in_features, len(raster.blocks)
    block = raster.blocks[0]
    assert isinstance(block, digits.Block)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        shape = shuffle.Shape(
            window=window, width=width, layers=layers, heads=block.heads, hidden=block.down.in_features
        )
        model = shuffle.ShuffleAR(shape, dropout)
    weights = dict(raster.state_dict())
    for name in ("row.weight", "column.weight"):
        weights[name] = weights[name].unflatten(0, (-1, window)).mean(1)
    left = model.load_state_dict(weights, strict=False)
    assert not left.unexpected_keys
    return model


def tune(raster: nn.Module, window: int, name: str, steps: int, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Trains the shuffled form of raster, writes NAME.safetensors into out; the model and its record, not measured."""
    assert isinstance(raster, digits.DigitsAR)
    model = shuffled(raster, window, train_digits.DROPOUT)
    best_step = train_digits.fit(model, name, steps)
    train_digits.save(model, out / f"{name}.safetensors")
    return model, {"best_step": best_step, "from": "digits-ar", "window": window, **train_digits.about(model)}
