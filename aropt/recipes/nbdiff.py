"""NBDiff (Tian et al. 2025, 2512.06776): a causal model adapted to blocks; only the block being written sees ahead.

Rows predict the next id, as before. A block begins with an id that the causal pass before it predicted. Each round then
writes the masked row that is surest, and all that are surer than a threshold. A block that is full is computed once
more with a causal mask: these are the keys and values that later blocks see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.bench.drafted import TIE, difference, unchecked
from aropt.bench.ratios import over
from aropt.ir.program import Graph, Program
from aropt.loops.tree_control import general
from aropt.models import text
from aropt.models.canvas import MASK, CausalLM
from aropt.models.optimise import SEED, log, optimise, windows
from aropt.passes.tree_draft import prepared
from aropt.recipes import Recipe, Row, Say, trained
from aropt.rewriting.tree import Nodes, forms

LENGTH, BATCH = 128, 12
STAGES = {1: 1500, 2: 200, 4: 300, 8: 900}  # size of a block: steps
BLOCK, THRESHOLD = 8, 0.9
PROMPTS, PROMPT, NEW = 16, 64, 200
MEASURED = 256  # windows of held-out text
SURE = 2.0  # no probability reaches it: one id a round


class NBDiff(CausalLM):
    """A causal model of bytes: row t predicts id t + 1, also among the rows of a block that see each other."""

    def __init__(self) -> None:
        super().__init__(width=128, layers=2, heads=4, hidden=320)

    def loss(self, clean: Tensor, block: int, generator: torch.Generator) -> Tensor:
        """The loss on masked ids of blocks, never their first ones, plus that of the text, which is causal (section 3).

        With blocks of one id it is that of the text alone.
        """
        if block == 1:
            return F.cross_entropy(self.forward(clean)[:, :-1].transpose(1, 2), clean[:, 1:])
        shape = len(clean), clean.shape[1] // block
        share = torch.rand(*shape, 1, generator=generator).clamp(min=0.1)
        masked = torch.rand(*shape, block, generator=generator) < share
        masked[..., 0] = False
        masked = masked.flatten(1)
        following, noisy = self.beside(clean, torch.where(masked, MASK, clean), block)
        each = F.cross_entropy(noisy[:, :-1].transpose(1, 2), clean[:, 1:], reduction="none")
        counted = masked[:, 1:]
        ahead = F.cross_entropy(following[:, :-1].transpose(1, 2), clean[:, 1:])
        return ahead + (each * counted).sum() / counted.sum().clamp(min=1)


Rows = Callable[[list[int], int], Tensor]  # ids so far, where the active block begins: its rows' logits [R, V]


@dataclass
class Written:
    """An answer, and how many forwards wrote it: rounds of a block, and causal passes."""

    ids: list[int]
    rounds: int = 0
    passes: int = 0

    @property
    def forwards(self) -> int:
        return self.rounds + self.passes


def generate(active: Rows, causal: Rows, prompt: list[int], new: int, block: int, threshold: float) -> Written:
    """The loop of a block after the other. `active`: rows of a block that see each other; `causal`: that are kept."""
    found = Written(list(prompt))
    logits, kept = causal(found.ids, 0), len(prompt)
    found.passes += 1
    while len(found.ids) - len(prompt) < new:
        found.ids += [int(logits[-1].argmax()), *[MASK] * (block - 1)]
        while MASK in found.ids[kept:]:
            chances, picks = active(found.ids, kept)[:-1, :MASK].softmax(-1).max(-1)
            chances[torch.tensor(found.ids[kept + 1 :]) != MASK] = -1
            for row in {int(chances.argmax()), *(chances > threshold).nonzero().flatten().tolist()}:
                found.ids[kept + 1 + row] = int(picks[row])
            found.rounds += 1
        logits, kept = causal(found.ids, kept), len(found.ids)
        found.passes += 1
    found.ids = found.ids[len(prompt) :][:new]
    return found


def whole(model: NBDiff) -> tuple[Rows, Rows]:
    """`active` and `causal` by forwards of all ids."""

    def rows(ids: list[int], start: int, block: int) -> Tensor:
        with torch.no_grad():
            return model.active(torch.tensor([ids]), block)[0, start:]

    return lambda ids, start: rows(ids, start, start), lambda ids, start: rows(ids, start, len(ids))


@dataclass
class Stored:
    """`active` and `causal` by aropt's step for rows beside stored keys and values, and what keeps some of them."""

    step: Graph
    settle: Graph
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    clean: bool = True  # else a full block is kept as its last round computed it: the control
    latest: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, clean: bool = True) -> Stored:
        made = prepared(program)
        both = forms(made.graphs[general(made)[0].step.graph], dict(made.weights), Nodes(ahead=True))
        sizes = {"B": 1, "S": int(program.meta["capacity"])}
        state = {n: made.state[n].create(sizes) for n in both.settle.outputs}
        return cls(both.tree, both.settle, dict(made.weights), state, clean)

    def call(self, graph: Graph, **values: Tensor) -> dict[str, Tensor]:
        given = self.state | values
        with torch.no_grad():
            results = graph.bind(self.weights)(*(given[name] for name in graph.inputs))
        return dict(zip(graph.outputs, results, strict=True))

    def rows(self, ids: list[int], start: int, pairs: Tensor) -> Tensor:
        """Logits [R, V] of the rows from `start` on; what they would store is `latest`."""
        positions = torch.arange(start, len(ids)).unsqueeze(0)
        self.latest = self.call(self.step, ids=torch.tensor([ids[start:]]), positions=positions, pairs=pairs[None])
        return self.latest.pop("logits")[0]

    def active(self, ids: list[int], start: int) -> Tensor:
        count = len(ids) - start
        return self.rows(ids, start, torch.ones(count, count, dtype=torch.bool))

    def causal(self, ids: list[int], start: int) -> Tensor:
        count, unclean = len(ids) - start, self.latest
        logits = self.rows(ids, start, torch.ones(count, count, dtype=torch.bool).tril())
        kept = self.latest if self.clean or not unclean else unclean
        at = torch.tensor([start])
        self.state |= self.call(self.settle, path=torch.arange(count).unsqueeze(0), start=at, origin=at, **kept)
        self.latest = {}
        return logits


@dataclass
class Both:
    """Computes rows in both ways, goes on with the first, and keeps how far apart they ever were."""

    one: tuple[Rows, Rows]
    other: tuple[Rows, Rows]
    apart: float = 0.0

    def rows(self, which: int, ids: list[int], start: int) -> Tensor:
        mine, theirs = self.one[which](ids, start), self.other[which](ids, start)
        self.apart = max(self.apart, float((mine - theirs).abs().max()))
        return mine

    def active(self, ids: list[int], start: int) -> Tensor:
        return self.rows(0, ids, start)

    def causal(self, ids: list[int], start: int) -> Tensor:
        return self.rows(1, ids, start)


@cache
def loaded() -> NBDiff:
    return trained("nbdiff", NBDiff())


def check(say: Say, quick: bool) -> Iterator[Row]:
    """Blocks of one id, the cache and its control, ids a forward, and held-out text."""
    import aropt

    model, prompts = loaded(), text.heldout(4 if quick else PROMPTS, PROMPT)
    program = aropt.capture(model)
    say("optimizing")
    fast = unchecked(program, [])

    def answers(block: int, threshold: float) -> list[Written]:
        found: list[Written] = []
        for prompt in prompts:
            say(f"blocks of {block}, threshold {threshold}: {len(found)} of {len(prompts)} prompts")
            stored = Stored.of(program)
            found.append(generate(stored.active, stored.causal, prompt, NEW, block, threshold))
        return found

    plain = [fast.generate([prompt], NEW, plain=True)[0] for prompt in prompts]
    ties = [difference(model, p, want, one.ids) for p, want, one in zip(prompts, plain, answers(1, SURE), strict=True)]
    count = sum(tie is not None for tie in ties)
    yield Row(
        "blocks of one id are plain greedy decoding",
        f"all {NEW} ids of each answer are the same" + (f", but for {count} ties of logits" if count else ""),
        len(prompts), "prompts", True,
    )  # fmt: skip
    yield exact(model, program, prompts[:2], say)
    written = {threshold: answers(BLOCK, threshold) for threshold in (THRESHOLD, SURE)}
    yield a_forward(written)
    yield right(model, 32 if quick else MEASURED, say)
    yield quality(model, 32 if quick else MEASURED)


def exact(model: NBDiff, program: Program, prompts: list[list[int]], say: Say) -> Row:
    """Each call beside a forward of all ids; and the same where no causal pass keeps a block."""
    apart = {}
    for clean in (True, False):
        found: list[float] = []
        for prompt in prompts:
            say(f"beside forwards of all ids, causal pass: {clean}, {len(found)} of {len(prompts)} prompts")
            stored = Stored.of(program, clean=clean)
            both = Both((stored.active, stored.causal), whole(model))
            generate(both.active, both.causal, prompt, NEW // 2, BLOCK, THRESHOLD)
            found.append(both.apart)
        apart[clean] = max(found)
    return Row(
        "with keys and values that a causal pass keeps, each round is exact; kept as a round left them it is not",
        f"logits differ by at most {apart[True]:.1g}; without the causal pass (the control) by {apart[False]:.2g}",
        len(prompts), "prompts", apart[True] < TIE < apart[False],
    )  # fmt: skip


def a_forward(written: dict[float, list[Written]]) -> Row:
    """How many ids a forward gives, by the threshold."""
    ids = {t: over([(NEW, one.forwards) for one in found]) for t, found in written.items()}
    mine = ids[THRESHOLD]
    return Row(
        f"blocks of {BLOCK} with a threshold of {THRESHOLD} give more than one id a forward, causal passes counted",
        f"{mine['all']:.2f} ids (95 %: {mine['low']:.2f} to {mine['high']:.2f}); one id a round {ids[SURE]['all']:.2f}",
        len(written[THRESHOLD]), "prompts", mine["low"] > 1,
    )  # fmt: skip


def right(model: NBDiff, count: int, say: Say) -> Row:
    """How many ids of the block that follows a piece of held-out text are those of the text."""
    ways = {"threshold": (BLOCK, THRESHOLD), "one id a round": (BLOCK, SURE), "plain": (1, SURE)}
    hits: dict[str, list[int]] = {way: [] for way in ways}
    for number, window in enumerate(text.heldout(count, LENGTH)):
        if number % 32 == 0:
            say(f"after held-out text: {number} of {count} windows")
        for way, (block, threshold) in ways.items():
            ids = generate(*whole(model), window[:-BLOCK], BLOCK, block, threshold).ids
            hits[way].append(sum(a == b for a, b in zip(ids, window[-BLOCK:])))
    share = {way: sum(each) / count / BLOCK for way, each in hits.items()}
    more = torch.tensor(hits["threshold"]).sub(torch.tensor(hits["plain"])).double() / BLOCK
    mean, error = float(more.mean()), float(more.std() / count**0.5)
    return Row(
        "blocks cost nothing that shows in how many ids are right of those that follow held-out text",
        f"{share['threshold']:.1%} with the threshold, {share['one id a round']:.1%} one id a round,"
        f" {share['plain']:.1%} by plain decoding: with the threshold {mean * 100:+.1f} points"
        f" (standard error {error * 100:.1f})",
        count, f"windows of {LENGTH} bytes", mean > -2 * error,
    )  # fmt: skip


@torch.no_grad()
def quality(model: NBDiff, count: int) -> Row:
    """Of held-out text: the loss of causal rows, and of a block all masked but its first id."""
    ids = torch.tensor(text.heldout(count, LENGTH))
    causal = float(F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:]))
    start = LENGTH - BLOCK
    masked = torch.cat([ids[:, : start + 1], torch.full((count, BLOCK - 1), MASK)], 1)
    right = (model.active(masked, start)[:, start:-1].argmax(-1) == ids[:, start + 1 :]).float().mean(0).tolist()
    return Row(
        "it is a causal model still, and foresees a block, the nearest ids best",
        f"{causal:.2f} nats a byte; right of a block that is masked but for its first id: "
        + ", ".join(f"{share:.0%}" for share in right),
        count, f"windows of {LENGTH} bytes", right[0] > right[1] > right[-1],
    )  # fmt: skip


def train() -> NBDiff:
    """The model: causal at first, then by blocks of 2, 4 and 8, in about ten minutes of a core."""
    stream = torch.tensor(text.stream(text.split()[0]))
    torch.manual_seed(SEED)
    model, generator = NBDiff().train(), torch.Generator().manual_seed(SEED)
    sizes = [block for block, steps in STAGES.items() for _ in range(steps)]
    for step, _ in optimise(model, len(sizes), peak=3e-3, decay=0.1):
        loss = model.loss(windows(stream, BATCH, LENGTH, generator), sizes[step], generator)
        torch.autograd.backward(loss)
        if step % 200 == 0:
            log(f"nbdiff step {step}/{len(sizes)}: {loss.item():.3f} nats, blocks of {sizes[step]}")
    return model.eval()


RECIPE = Recipe(
    title="blocks by a causal model",
    paper="NBDiff, Tian et al. 2025, 2512.06776",
    runs="aropt derives the rows of a block beside stored keys and values, and what keeps them; the loop over blocks "
    "and rounds is plain Python, as no kind of loop has an active block that later sees itself otherwise. Blocks of "
    "one id are compiled whole",
    proxy="a model of bytes of 0.44 million parameters, causal for 1500 steps and then adapted to blocks of 2, 4 and 8 "
    "in 1400; the weights of losses are ours.",
    check=check,
    train=train,
)
