"""What the recipes of all reference models share."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SEED = 0


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def windows(ids: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """A batch int64 [rows, length] of ids int64 [N], each row from a place drawn at random."""
    starts = torch.randint(len(ids) - length + 1, (rows, 1), generator=generator)
    return ids[starts + torch.arange(length)]


def optimise(model: nn.Module, steps: int, peak: float, decay: float) -> Iterator[tuple[int, torch.optim.AdamW]]:
    """Yield (step, optimizer) for each step, gradients cleared, then clip and apply the gradients left by the caller.

    The learning rate rises linearly to peak over the first 5% of steps and falls on a cosine to a twentieth of it.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    for step in range(steps):
        rate = 0.05 + 0.95 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * min(rate, (step + 1) / warmup)
        optimizer.zero_grad()
        yield step, optimizer
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
