"""Data, training and sampling of the models of 8x8 digits (called by aropt.models.train).

Labels are 0..9, and 10 for none.  Pixels are in raster order, whatever the order in which a model writes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.models import digits, shuffle
from aropt.models.optimise import SEED, log, optimise, parameters

Split = tuple[Tensor, Tensor]  # labels int64 [N], pixels int64 [N, 64]
DROPOUT = 0.35
ROWS = 64  # images of a step


def data() -> tuple[Split, Split, Split, str]:
    """(fit, stop, held-out, sha256).

    One image in five is held out.  Early stopping looks at a tenth of the others and never at the held-out ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels, labels = data.data.astype(np.uint8), data.target.astype(np.uint8)
    sha = hashlib.sha256(labels.tobytes() + pixels.tobytes()).hexdigest()
    rest, held = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SEED, stratify=labels)
    fit, stop = train_test_split(rest, test_size=0.1, random_state=SEED, stratify=labels[rest])
    parts = [(torch.from_numpy(labels[i]).long(), torch.from_numpy(pixels[i]).long()) for i in (fit, stop, held)]
    return parts[0], parts[1], parts[2], sha


def predicted(model: nn.Module, labels: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits float32 [N, 64, 17] of each pixel given what the model sees of it, and the pixels in the same order."""
    first = digits.LEVELS + labels[:, None]
    if not isinstance(model, shuffle.ShuffleAR):
        return model(torch.cat([first, pixels[:, :-1]], 1)), pixels
    rows = shuffle.rows(pixels, model.shape.side, model.shape.window)
    ids = torch.cat([first[..., None].expand(-1, 1, model.unit), rows[:, :-1]], 1)
    return model(ids).flatten(1, 2), rows.flatten(1)


def loss(model: nn.Module, labels: Tensor, pixels: Tensor) -> Tensor:
    """Mean negative log likelihood, in nats per pixel."""
    logits, targets = predicted(model, labels, pixels)
    return F.cross_entropy(logits.transpose(1, 2), targets)


@torch.no_grad()
def nll(model: nn.Module, labels: Tensor, pixels: Tensor) -> float:
    """Mean negative log likelihood, in nats per pixel."""
    return loss(model, labels, pixels).item()


@torch.no_grad()
def sample(model: nn.Module, labels: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
    """Pixels int64 [N, 64] drawn at temperature 1, one image per label (int64 [N]).

    Logits are null + guidance * (conditional - null); guidance 1 is the model's own distribution.
    """
    rows = model.unit if isinstance(model, shuffle.ShuffleAR) else 1
    branches = 1 if guidance == 1.0 else 2
    wanted = torch.cat([labels, torch.full_like(labels, digits.CLASSES)]) if branches == 2 else labels
    step = stepper(model)
    ids = (digits.LEVELS + wanted)[:, None].expand(-1, rows)
    drawn: list[Tensor] = []
    for position in range(digits.CAPACITY // rows):
        logits = step(ids, position)
        if branches == 2:
            given, base = logits.chunk(2)
            logits = base + guidance * (given - base)
        drawn.append(torch.multinomial(logits.flatten(0, 1).softmax(-1), 1, generator=generator).view(-1, rows))
        ids = drawn[-1].repeat(branches, 1)
    made = torch.stack(drawn, 1)
    if isinstance(model, shuffle.ShuffleAR):
        return shuffle.raster(made, model.shape.side, model.shape.window)
    return made.flatten(1)


def stepper(model: nn.Module) -> Callable[[Tensor, int], Tensor]:
    """A function of the ids int64 [N, W] of one row and its position: logits float32 [N, W, 17] of the next row.

    Keys and values of earlier calls are kept; it gives the last row of the model's forward of all rows so far.
    """
    parts: Any = model
    shuffled = isinstance(model, shuffle.ShuffleAR)
    across = parts.across if shuffled else digits.SIDE
    past: list[list[Tensor]] = [[] for _ in parts.blocks]

    def step(ids: Tensor, position: int) -> Tensor:
        x = parts.fuse(ids[:, None]) if shuffled else parts.token(ids)
        x = x + parts.row.weight[position // across] + parts.column.weight[position % across]
        for block, kept in zip(parts.blocks, past, strict=True):
            q, k, v = block.heads_of(x)
            kept[:] = [torch.cat([*kept[i : i + 1], new], 2) for i, new in enumerate((k, v))]
            x = block.mixed(x, F.scaled_dot_product_attention(q, kept[0], kept[1]))
        x = parts.norm(x)
        logits: Tensor = parts.split(x)[:, 0] if shuffled else parts.head(x)
        return logits

    return step


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels int64 [N, 64], half of the images moved by up to one pixel each way; paper comes in at the edge."""
    n = len(pixels)
    padded = F.pad(pixels.view(n, digits.SIDE, digits.SIDE), (1, 1, 1, 1))
    move = torch.randint(3, (n, 2), generator=generator)
    move[torch.rand(n, generator=generator) >= 0.5] = 1
    span = torch.arange(digits.SIDE)
    rows, columns = move[:, :1] + span, move[:, 1:] + span
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]].view(n, -1)


def batch(fit: Split, rows: int, generator: torch.Generator) -> Split:
    """Images of the fitting split, augmented; one in ten trains the null class."""
    pick = torch.randint(len(fit[0]), (rows,), generator=generator)
    labels = torch.where(torch.rand(rows, generator=generator) < 0.1, digits.CLASSES, fit[0][pick])
    return labels, shifted(fit[1][pick], generator)


def fit(model: nn.Module, name: str, steps: int, peak: float = 1.5e-3, seed: int = SEED) -> int:
    """Trains model and leaves it with the weights that did best on the stopping split; returns their step."""
    seen, stop, _, _ = data()
    generator = torch.Generator().manual_seed(seed)
    best, best_step, weights = math.inf, 0, {}

    def look(step: int) -> None:
        nonlocal best, best_step, weights
        found = nll(model.eval(), *stop)
        model.train()
        log(f"{name} step {step}/{steps}: {found:.4f} nats/pixel on the stopping split")
        if found < best:
            best, best_step = found, step
            weights = {key: value.clone() for key, value in model.state_dict().items()}

    for step, _ in optimise(model.train(), steps, peak, decay=0.1):
        if step % 50 == 0:
            look(step)
        torch.autograd.backward(loss(model, *batch(seen, ROWS, generator)))
    look(steps)
    model.load_state_dict(weights)
    return best_step


def build(name: str) -> nn.Module:
    """The untrained model of a name: digits-ar, or digits-shuffle and the window."""
    if name == "digits-ar":
        return digits.DigitsAR(dropout=DROPOUT)
    return shuffle.ShuffleAR(shuffle.Shape(window=int(name.removeprefix("digits-shuffle"))), DROPOUT)


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as bfloat16."""
    if isinstance(model, shuffle.ShuffleAR):
        shuffle.save(model, path)
    else:
        assert isinstance(model, digits.DigitsAR)
        digits.save(model, path)


def train(name: str, steps: int, out: Path) -> dict[str, Any]:
    """Train the model called name, write its checkpoint into out; its record but for the measurements."""
    model = build(name)
    best_step = fit(model, name, steps)
    save(model, out / f"{name}.safetensors")
    return {"best_step": best_step, **about(model)}


def about(model: nn.Module) -> dict[str, Any]:
    """What the records of all models of digits hold."""
    return {"parameters": parameters(model), "data": "sklearn load_digits", "data_sha256": data()[3]}
