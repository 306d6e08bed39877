"""TiDAR (Liu et al. 2025, 2511.08923): one forward checks the drafts of the last round and writes those of the next."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.bench.drafted import counted, rounds, unchecked
from aropt.bench.ratios import over
from aropt.loops.own_masks import pairs, places
from aropt.models import text
from aropt.models.canvas import MASK, CausalLM
from aropt.models.optimise import SEED, log, optimise, windows
from aropt.recipes import Recipe, Row, Say, trained

BLOCK = 8  # masked rows that are predicted at a time
LENGTH, BATCH, STEPS = 128, 12, 3600
PROMPTS, PROMPT, NEW = 16, 64, 200
REFERRED = 2  # prompts of the plain loop, which has no cache
MEASURED = 256  # windows of held-out text


class TiDAR(CausalLM):
    """A causal model of bytes whose rows of MASK predict themselves, a block of them at a time."""

    draft_mask = MASK

    def __init__(self) -> None:
        super().__init__(width=128, layers=2, heads=4, hidden=320)

    def both(self, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, 260] of the text, row t for id t + 1, and of masks, row t for id t; T a multiple of BLOCK."""
        return self.beside(clean, torch.full_like(clean, MASK), BLOCK)

    def loss(self, clean: Tensor) -> Tensor:
        """The mean of both losses (section 3.1, alpha = 1): ids int64 [B, T], T a multiple of BLOCK."""
        following, masked = self.both(clean)
        ahead = F.cross_entropy(following[:, :-1].transpose(1, 2), clean[:, 1:])
        return (ahead + F.cross_entropy(masked.transpose(1, 2), clean)) / 2


@torch.no_grad()
def plain_loop(model: TiDAR, prompt: list[int], new: int, nodes: int) -> tuple[list[int], int]:
    """Greedy, without a cache: the ids, and how many forwards wrote them. The first one reads the prompt alone."""
    ids = [*prompt, int(model(torch.tensor([prompt]))[0, -1].argmax())]
    drafts, forwards = [0] * (nodes - 1), 1
    while len(ids) - len(prompt) < new:
        chain = len(ids) - 1  # rows before the newest id
        rows = torch.tensor([*ids, *drafts, *[MASK] * nodes**2])
        at = torch.cat([torch.arange(chain + nodes), chain + places(nodes)])
        mask = torch.ones(len(rows), len(rows), dtype=torch.bool).tril()
        mask[chain:, chain:] = pairs(nodes)
        logits = model.run(rows[None], model.cos[at], model.sin[at], mask)[0, chain:]
        picks = logits[:nodes].argmax(-1).tolist()
        right = next((i for i, (a, b) in enumerate(zip(picks, drafts)) if a != b), nodes - 1)
        ids += picks[: right + 1]
        drafts = logits[nodes + right * nodes :][1:nodes].argmax(-1).tolist()
        forwards += 1
    return ids[len(prompt) : len(prompt) + new], forwards


@cache
def load() -> TiDAR:
    return trained("tidar", TiDAR())


def check(say: Say, quick: bool) -> Iterator[Row]:
    """Equal ids, ids a forward beside prompt lookup, the plain loop's forwards, and quality on held-out text."""
    import aropt

    model, made = load(), {}
    program = aropt.capture(model)
    shape = f"shape=chain:{BLOCK - 1}"
    for way, chosen in {"none": [], "masks": [f"tree-draft:draft=masks,{shape}"],
                        "text": [f"tree-draft:draft=text,{shape}"]}.items():  # fmt: skip
        say(f"drafts by {way}: optimizing")
        made[way] = unchecked(program, chosen)
    prompts, rows = text.heldout(4 if quick else PROMPTS, PROMPT), list[dict[str, Any]]()
    for row in counted(made, model, prompts, NEW):
        rows.append(row)
        say(f"generating, {len(rows)} of {len(prompts)} prompts")
    ties = sum(row["differs"]["masks"] is not None for row in rows)
    yield Row(
        "drafts by masks give the ids of plain greedy decoding by the same weights",
        f"all {NEW} ids of each answer are the same" + (f", but for {ties} ties of logits" if ties else ""),
        len(rows), "prompts", True,
    )  # fmt: skip
    ids = {way: over([(NEW - 1, row["checks"][way]) for row in rows]) for way in ("masks", "text")}
    mine, other = ids["masks"], ids["text"]
    yield Row(
        "a forward gives more than one id",
        f"{mine['all']:.2f} ids (95 %: {mine['low']:.2f} to {mine['high']:.2f}), of {BLOCK + BLOCK**2} rows;"
        f" drafts from the text itself: {other['all']:.2f}, of {BLOCK} rows",
        len(rows), "prompts", mine["low"] > 1,
    )  # fmt: skip
    yield same_as_the_loop(model, made["masks"], prompts[:REFERRED], say)
    yield quality(model, 32 if quick else MEASURED)


def same_as_the_loop(model: TiDAR, program: Any, prompts: list[list[int]], say: Say) -> Row:
    """aropt's rounds beside the plain loop's forwards."""
    found: list[Any] = []
    for prompt in prompts:
        say(f"the plain loop: {len(found)} of {len(prompts)} prompts")
        found.append((plain_loop(model, prompt, NEW, BLOCK), rounds(program, prompt, NEW)))
    counts = ", ".join(f"{mine[1]} and {his[1]}" for his, mine in found)
    return Row(
        "the compiled loop is the plain one: the same ids in as many forwards",
        f"forwards, compiled and plain: {counts}", len(found), "prompts", all(his == mine for his, mine in found),
    )  # fmt: skip


@torch.no_grad()
def quality(model: TiDAR, count: int) -> Row:
    """Of held-out text: the loss of the text's rows, and how many masks of a block are right."""
    ids = torch.tensor(text.heldout(count, LENGTH))
    following, masked = model.both(ids)
    loss = float(F.cross_entropy(following[:, :-1].transpose(1, 2), ids[:, 1:]))
    right = (masked.argmax(-1) == ids).view(count, -1, BLOCK)[:, 1:].float().mean((0, 1))
    each = ", ".join(f"{share:.0%}" for share in right.tolist())
    return Row(
        "masks foresee what comes, the nearest best",
        f"{loss:.2f} nats a byte; of the masks of a block are right: {each}; of the text's rows"
        f" {float((following[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()):.0%}",
        count, f"windows of {LENGTH} bytes", float(right[0]) > float(right[1]) > float(right[-1]),
    )  # fmt: skip


def train() -> TiDAR:
    """The model, from scratch, in about ten minutes of a core."""
    stream = torch.tensor(text.stream(text.split()[0]))
    torch.manual_seed(SEED)
    model, generator = TiDAR().train(), torch.Generator().manual_seed(SEED)
    for step, _ in optimise(model, STEPS, peak=3e-3, decay=0.1):
        loss = model.loss(windows(stream, BATCH, LENGTH, generator))
        torch.autograd.backward(loss)
        if step % 200 == 0:
            log(f"tidar step {step}/{STEPS}: {loss.item():.3f} nats, the mean of both losses")
    return model.eval()


RECIPE = Recipe(
    title="drafts by masks in the call that checks",
    paper="TiDAR, Liu et al. 2025, 2511.08923",
    runs="aropt compiles greedy and drawn generation with `tree-draft:draft=masks`, by keys and values of the causal "
    "prefix; a draft counts where the rule picks it itself, and nothing mixes the logits of masks and text",
    proxy="a model of bytes of 0.44 million parameters, blocks of 8, trained from scratch; the paper adapts models of "
    "1.5 and 8 billion.",
    check=check,
    train=train,
)
