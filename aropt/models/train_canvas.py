"""Training and measuring text-mdlm and text-bd (called by aropt.models.train); run as a module, writes their task."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.models import CHECKPOINTS, text
from aropt.models.canvas import BLOCK, CAPACITY, MASK, CanvasLM, load

SEED = 0
LEVELS = 8  # of noise, when the bound is measured
MEASURED = 65536  # ids of held-out text, evenly spread over the documents
EXAMPLES, PROMPT, ANSWER, SPAN = 32, 32, 64, 4  # of the task: how many, ids of each part, ids masked in a row
LEAST = 0.02  # least share of masked ids: fewer make the weight 1/t too large


def corrupted(clean: Tensor, shares: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """ids [B, T] with each id masked with its row's (or block's) probability, shares [B, T]; which ids were masked."""
    masked = torch.rand(clean.shape, generator=generator) < shares
    return torch.where(masked, MASK, clean), masked


def shares(model: CanvasLM, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """A noise level for each row or block, spread evenly over (0, 1) (Kingma et al. 2021, appendix I)."""
    rows, length = shape
    count = -(-length // model.block) if model.block else 1
    levels = (torch.rand(1, generator=generator) + torch.arange(rows * count) / (rows * count)) % 1
    levels = levels[torch.randperm(rows * count, generator=generator)].view(rows, count)
    return (LEAST + (1 - LEAST) * levels).repeat_interleave(model.block or length, 1)[:, :length]


def bound(model: CanvasLM, clean: Tensor, levels: Tensor, generator: torch.Generator) -> Tensor:
    """The negative ELBO in nats per id: the loss on masked ids over their noise level (Sahoo et al. 2024, eq. 8).

    Ids at level 0 are given: they are never masked and don't count.
    """
    noisy, masked = corrupted(clean, levels, generator)
    loss = F.cross_entropy(model.denoise(noisy, clean).transpose(1, 2), clean, reduction="none")
    return (loss * masked / levels.clamp(min=LEAST)).mean()


@torch.no_grad()
def measure(model: CanvasLM, limit: int = MEASURED) -> dict[str, Any]:
    """The bound on `limit` ids of held-out text in windows of 256, and how many are right of a half that is masked."""
    held = text.split()[1]
    ids = torch.tensor(text.stream(held))
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    ids = ids[:: max(1, len(ids) * 256 // limit)]
    generator = torch.Generator().manual_seed(SEED)
    total, right, masks = 0.0, 0, 0
    for batch in ids.split(64):
        for level in range(LEVELS):
            share = torch.full(batch.shape, (level + 0.5) / LEVELS)
            total += float(bound(model, batch, share, generator)) * len(batch)
        noisy, masked = corrupted(batch, torch.full(batch.shape, 0.5), generator)
        guessed = model.denoise(noisy, batch).argmax(-1)
        right, masks = right + int((guessed == batch)[masked].sum()), masks + int(masked.sum())
    nll = total / len(ids) / LEVELS
    return {
        "nll": nll,
        "bits_per_byte": nll / 0.6931471805599453,
        "accuracy_half_masked": right / masks,
        "ids": ids.numel(),
        "documents": list(held),
        "data_sha256": text.digest(held),
    }


def infilling() -> list[str]:
    """Lines of `validate.quality`: windows of held-out text, evenly spread, every other span to be found."""
    ids, size = text.stream(text.split()[1]), PROMPT + ANSWER
    spans = [[i, i + SPAN] for i in range(0, ANSWER, 2 * SPAN)]
    lines: list[str] = []
    for near in range(0, len(ids) - size, (len(ids) - size) // EXAMPLES)[:EXAMPLES]:
        start = next(i for i in range(near, len(ids)) if max(ids[i : i + size]) < 128)  # ids are then characters
        window = text.decode(ids[start : start + size])
        lines.append(json.dumps({"prompt": window[:PROMPT], "answer": window[PROMPT:], "masked": spans}))
    return lines


def train(
    name: str,
    steps: int,
    out: Path,
    optimise: Callable[..., Any],
    log: Callable[[str], None],
    tune: Callable[[CanvasLM, Tensor], dict[str, Any]],
) -> dict[str, Any]:
    """Trains the model, writes its checkpoint into out and returns its record but for the measurements.

    text-bd starts from the weights of text-mdlm: it has the same layers, and what it may see is new to them.
    `tune` follows for text-mdlm; with no other steps it starts from the shipped checkpoint.
    """
    from safetensors.torch import save_file

    docs = text.split()[0]
    stream = torch.tensor(text.stream(docs))
    block = 0 if name == "text-mdlm" else BLOCK
    model = CanvasLM() if steps and not block else load(CHECKPOINTS / "text-mdlm.safetensors", block)
    pretrain(name, model.train(), stream, steps, optimise, log)
    record = {} if block else tune(model, stream)
    save_file({n: v.bfloat16() for n, v in model.state_dict().items()}, out / f"{name}.safetensors")
    return record | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"documents of Python {platform.python_version()}",
        "documents": len(docs),
        "ids": len(stream),
        "data_sha256": text.digest(docs),
    }


def pretrain(
    name: str, model: CanvasLM, stream: Tensor, steps: int, optimise: Callable[..., Any], log: Callable[[str], None]
) -> None:
    """Lowers the bound on windows of the corpus; the last fifth of the steps reads windows of the whole capacity."""
    generator = torch.Generator().manual_seed(SEED)
    for step, _ in optimise(model, steps, peak=2e-3, decay=0.1):
        if step % 250 == 0:
            found = measure(model.eval(), 16384)
            model.train()
            log(f"{name} step {step}/{steps}: {found['nll']:.3f} nats/byte, {found['accuracy_half_masked']:.1%} right")
        rows, length = (12, 256) if step < steps * 4 // 5 else (6, CAPACITY)
        rows = rows if name == "text-mdlm" else rows // 2  # noisy and clean: twice the rows, four times the pairs
        starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
        clean = stream[starts + torch.arange(length)]
        torch.autograd.backward(bound(model, clean, shares(model, (rows, length), generator), generator))


if __name__ == "__main__":  # the examples that quality is measured on
    (CHECKPOINTS / "infilling.jsonl").write_text("\n".join(infilling()) + "\n", encoding="utf-8")
