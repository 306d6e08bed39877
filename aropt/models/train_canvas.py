"""Training and measuring text-mdlm and text-bd (called by aropt.models.train)."""

from __future__ import annotations

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
LEAST = 0.02  # least share of masked ids: fewer make the weight 1/t too large
# Of the continuations that text-mdlm is tuned on.
PROMPT, NEW, WINDOW = 64, 128, 32
CONTINUATIONS, WRITTEN = 12288, 64  # in all, and at a time
TEMPERATURE, DISTINCT, BLANKS = 0.5, 0.4, 6


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


@torch.no_grad()
def continuations(stream: Tensor, count: int, generator: torch.Generator, log: Callable[[str], None]) -> Tensor:
    """ids [N, PROMPT + NEW], N <= count: prompts of the corpus and what text-ar writes after them.

    One writer has fewer ways to go on than a corpus has, so more ids can be written at once (sequence-level
    distillation: Kim and Rush 2016; for parallel decoding Gu et al. 2018).  Texts that run in circles are left out,
    and those that are indented far: blanks are what is surest in most places, so whole answers would become blank.
    """
    writer = text.load(CHECKPOINTS / "text-ar").eval()
    starts = flat(stream, PROMPT)
    kept: list[Tensor] = []
    for done in range(0, count, WRITTEN):
        pick = starts[torch.randint(len(starts), (WRITTEN,), generator=generator)]
        prompt = stream[pick[:, None] + torch.arange(PROMPT)]
        torch.manual_seed(SEED + done)
        options = {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0, "eos_token_id": None}
        ids = writer.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, **options)
        kept += [row for row in ids if distinct(row[PROMPT:].tolist()) >= DISTINCT and len(flat(row, len(row)))]
        if done % (16 * WRITTEN) == 0:
            log(f"text-mdlm: {done + WRITTEN}/{count} continuations written, {len(kept)} kept")
    return torch.stack(kept)


def flat(ids: Tensor, length: int) -> Tensor:
    """Where windows of `length` ids begin that hold no run of BLANKS blanks: int64 [N]."""
    blank = torch.cat([torch.zeros(1, dtype=torch.long), (ids == ord(" ")).cumsum(0)])
    run = (blank[BLANKS:] - blank[:-BLANKS] == BLANKS).long()  # one begins here
    before = torch.cat([torch.zeros(1, dtype=torch.long), run.cumsum(0)])
    last = length - BLANKS + 1
    return (before[last:] == before[:-last]).nonzero()[:, 0]


def distinct(ids: list[int]) -> float:
    """The share of the 8-grams of ids that are the first of their kind."""
    grams = [tuple(ids[i : i + 8]) for i in range(len(ids) - 7)]
    return len(set(grams)) / len(grams)


def fronts(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels [rows, PROMPT + NEW] of canvases on their way, and which ids lie after the window written now.

    Before the window all is written (level 0); behind it all is masked and says nothing.
    """
    starts = PROMPT + torch.randint(NEW - WINDOW + 1, (rows, 1), generator=generator)
    place = torch.arange(PROMPT + NEW)
    now = (place >= starts) & (place < starts + WINDOW)
    levels = LEAST + (1 - LEAST) * torch.rand(rows, 1, generator=generator)
    return torch.where(now, levels, 0.0), place >= starts + WINDOW


def continued(model: CanvasLM, clean: Tensor, generator: torch.Generator) -> Tensor:
    """The bound on one window of each of the continuations clean [B, PROMPT + NEW]."""
    levels, later = fronts(len(clean), generator)
    noisy, masked = corrupted(clean, levels, generator)
    logits = model.denoise(torch.where(later, MASK, noisy), clean)
    loss = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    return (loss * masked / levels.clamp(min=LEAST)).sum() / (len(clean) * WINDOW)


def tune(
    model: CanvasLM, stream: Tensor, steps: int, optimise: Callable[..., Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """Teaches text-mdlm to go on from a prompt as text-ar does; a third of the rows stay text of the corpus."""
    generator = torch.Generator().manual_seed(SEED)
    written, begins = continuations(stream, CONTINUATIONS, generator, log), flat(stream, PROMPT + NEW)
    held, written = written[:128], written[128:]
    for step, _ in optimise(model.train(), steps, peak=1e-3, decay=0.1):
        if step % 250 == 0:
            model.eval()
            with torch.no_grad():
                loss = continued(model, held, torch.Generator().manual_seed(SEED))
            log(f"text-mdlm tuning {step}/{steps}: {loss:.3f} nats/byte on held-out continuations")
            model.train()
        rows = written[torch.randint(len(written), (12,), generator=generator)]
        pick = begins[torch.randint(len(begins), (6,), generator=generator)]
        clean = stream[pick[:, None] + torch.arange(rows.shape[1])]
        levels = shares(model, (len(clean), clean.shape[1]), generator)
        loss = 2 / 3 * continued(model, rows, generator) + bound(model, clean, levels, generator) / 3
        torch.autograd.backward(loss)
    return {"tuning_steps": steps, "continuations": len(written)}


def train(
    name: str, steps: int, out: Path, optimise: Callable[..., Any], log: Callable[[str], None], tuned: int = 0
) -> dict[str, Any]:
    """Trains the model, writes its checkpoint into out and returns its record but for the measurements.

    text-bd starts from the weights of text-mdlm: it has the same layers, and what it may see is new to them.
    `tuned` steps of tuning follow for text-mdlm; with no other steps they start from the shipped checkpoint.
    """
    from safetensors.torch import save_file

    docs = text.split()[0]
    stream = torch.tensor(text.stream(docs))
    block = 0 if name == "text-mdlm" else BLOCK
    model = CanvasLM() if steps and not block else load(CHECKPOINTS / "text-mdlm.safetensors", block)
    pretrain(name, model.train(), stream, steps, optimise, log)
    record = tune(model, stream, tuned, optimise, log) if tuned and not block else {}
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
