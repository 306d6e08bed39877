"""Tuning text-mdlm to go on from a prompt (called by aropt.models.train).

A model of a whole corpus is sure of blanks and of little else. One writer has fewer ways to go on than a corpus has, so
more ids can be written at once (sequence-level distillation: Kim and Rush 2016; for parallel decoding Gu et al. 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.models import CHECKPOINTS, text
from aropt.models.canvas import MASK, CanvasLM
from aropt.models.train_canvas import LEAST, SEED, bound, corrupted, shares

PROMPT, NEW, WINDOW = 64, 128, 32
CONTINUATIONS, WRITTEN = 12288, 64  # in all, and at a time
TEMPERATURE, DISTINCT, BLANKS = 0.5, 0.4, 6


@torch.no_grad()
def continuations(stream: Tensor, count: int, generator: torch.Generator, log: Callable[[str], None]) -> Tensor:
    """ids [N, PROMPT + NEW], N <= count: prompts of the corpus and what text-ar writes after them.

    Texts that run in circles are left out, and those that are indented far: blanks are what is surest in most places,
    so whole answers would become blank.
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
