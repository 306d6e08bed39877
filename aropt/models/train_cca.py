"""Condition contrastive alignment (2410.09347): tuning that makes guidance unnecessary, so that a step is one forward.

With r(x, c) the log ratio of what the tuned and the frozen model give image x under class c, images under their own
class should have a high r and the same images under others' classes a low one.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.models import digits, quality_digits, train_digits
from aropt.models.optimise import SEED, log, optimise

BETA = 0.1  # how much one nat of r counts
NEGATIVE = 1.0  # how much more images under others' classes count
ROWS = 32
GUIDED = (1.0, 1.5, 2.0)


def likelihood(model: nn.Module, labels: Tensor, pixels: Tensor) -> Tensor:
    """Log likelihoods float32 [N], in nats per image."""
    logits, targets = train_digits.predicted(model, labels, pixels)
    return -F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)


def contrast(
    model: nn.Module, frozen: nn.Module, labels: Tensor, pixels: Tensor, beta: float = BETA, negative: float = NEGATIVE
) -> Tensor:
    """The loss of a batch (2410.09347, eq. 12); negatives are the batch's own labels moved on by one.

    Images without a class, and those that get their own class again, are no negatives.
    """
    wrong = labels.roll(1)
    known = (wrong != labels) & (wrong != digits.CLASSES) & (labels != digits.CLASSES)
    both = torch.cat([labels, wrong[known]]), torch.cat([pixels, pixels[known]])
    with torch.no_grad():
        before = likelihood(frozen, *both)
    ratio = beta * (likelihood(model, *both) - before)
    kept, turned = ratio[: len(labels)], ratio[len(labels) :]
    return -(F.logsigmoid(kept).sum() + negative * F.logsigmoid(-turned).sum()) / len(labels)


def tune(base: nn.Module, name: str, steps: int, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Tunes and marks a copy of base, writes NAME.safetensors into out; the model, its record and what base gave."""
    model: Any = copy.deepcopy(base).requires_grad_(True)
    seen = train_digits.data()[0]
    generator = torch.Generator().manual_seed(SEED)
    for step, _ in optimise(model.eval(), steps, peak=1e-4, decay=0.0):
        found = contrast(model, base, *train_digits.batch(seen, ROWS, generator))
        if step % 20 == 0:
            log(f"{name} step {step}/{steps}: {found.item():.4f}")
        torch.autograd.backward(found)
    model.guidance_free = True
    train_digits.save(model, out / f"{name}.safetensors")
    before = {f"guidance_{g:g}": quality_digits.sampled(base, g) for g in GUIDED}
    record = {"guidance_free": True, "beta": BETA, "negative": NEGATIVE, "before": before}
    return model, record | train_digits.about(model)
