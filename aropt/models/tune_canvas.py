"""Tuning text-mdlm to go on from a prompt (called by aropt.models.train).

A model of a whole corpus is sure of blanks and of little else. One writer has fewer ways to go on than a corpus has, so
more ids can be written at once (sequence-level distillation: Kim and Rush 2016; for parallel decoding Gu et al. 2018).
First the writer draws, then it takes its most likely byte, and what is right shall be sure (dParallel, 2509.26488).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.models import CHECKPOINTS, text
from aropt.models.canvas import MASK, CanvasLM
from aropt.models.train_canvas import LEAST, SEED, bound, corrupted, shares

PROMPT, NEW, WINDOW = 64, 128, 32
WRITTEN, BLANKS = 64, 6  # continuations written at a time; how many blanks in a row are too many


@dataclass(frozen=True)
class Stage:
    """How many texts are written, how (0: the most likely byte), how much must be new, and what certainty weighs."""

    count: int
    temperature: float
    distinct: float
    certainty: float


STAGES = (Stage(12288, 0.5, 0.4, 0.0), Stage(8192, 0.0, 0.2, 1.0))


@torch.no_grad()
def continuations(stream: Tensor, stage: Stage, generator: torch.Generator, log: Callable[[str], None]) -> Tensor:
    """ids [N, PROMPT + NEW], N <= stage.count: prompts of the corpus and what text-ar writes after them.

    Texts that run in circles are left out, and those that are indented far: blanks are what is surest in most places,
    so whole answers would become blank.
    """
    writer = text.load(CHECKPOINTS / "text-ar").eval()
    starts = flat(stream, PROMPT)
    kept: list[Tensor] = []
    drawn = {"do_sample": True, "temperature": stage.temperature, "top_k": 0} if stage.temperature else {}
    for done in range(0, stage.count, WRITTEN):
        pick = starts[torch.randint(len(starts), (WRITTEN,), generator=generator)]
        prompt = stream[pick[:, None] + torch.arange(PROMPT)]
        torch.manual_seed(SEED + done)
        ids = writer.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, eos_token_id=None, **drawn
        )
        kept += [row for row in ids if distinct(row[PROMPT:].tolist()) >= stage.distinct and len(flat(row, len(row)))]
        if done % (16 * WRITTEN) == 0:
            log(f"text-mdlm: {done + WRITTEN}/{stage.count} continuations written, {len(kept)} kept")
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


def continued(model: CanvasLM, clean: Tensor, generator: torch.Generator, certainty: float = 0.0) -> Tensor:
    """The bound on one window of each of the continuations clean [B, PROMPT + NEW].

    `certainty` adds the entropy where the most likely id is right, so that rounds with a threshold write more.
    """
    levels, later = fronts(len(clean), generator)
    noisy, masked = corrupted(clean, levels, generator)
    logits = model.denoise(torch.where(later, MASK, noisy), clean)
    loss = F.cross_entropy(logits.transpose(1, 2), clean, reduction="none")
    total = (loss * masked / levels.clamp(min=LEAST)).sum() / (len(clean) * WINDOW)
    if certainty:
        logs = logits[masked & (logits.argmax(-1) == clean)].log_softmax(-1)
        total = total - certainty * (logs.exp() * logs).sum() / masked.sum().clamp(min=1)
    return total


def tune(
    model: CanvasLM, stream: Tensor, steps: int, optimise: Callable[..., Any], log: Callable[[str], None]
) -> dict[str, Any]:
    """Teaches text-mdlm to go on from a prompt as text-ar does, `steps` steps a stage."""
    generator = torch.Generator().manual_seed(SEED)
    counts = []
    for stage in STAGES:
        written = continuations(stream, stage, generator, log)
        counts.append(len(written))
        tune_stage(model, stream, written, stage, steps, generator, optimise, log)
    return {"tuning_steps": steps * len(STAGES), "continuations": counts}


def tune_stage(
    model: CanvasLM,
    stream: Tensor,
    written: Tensor,
    stage: Stage,
    steps: int,
    generator: torch.Generator,
    optimise: Callable[..., Any],
    log: Callable[[str], None],
) -> None:
    """A third of the rows stay text of the corpus."""
    begins = flat(stream, PROMPT + NEW)
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
        real = bound(model, clean, levels, generator)
        torch.autograd.backward(2 / 3 * continued(model, rows, generator, stage.certainty) + real / 3)
