"""Rules of acceptance by the texts that they give: their distribution is the target's, and lossy ones say so."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from aropt.loops.accept import ACCEPT, DRAFTS, Accepted, Tree, beside
from aropt.loops.rules import draw, gumbel_noise
from tests.support.chances import VOCAB, chain, tree

# ids that depend on the one before; id 3 ends a text
TARGET = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.15, 0.45, 0.0, 0.4], [0.05, 0.35, 0.4, 0.2], [0.25] * 4])
DRAFT = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0.3, 0.2, 0.4, 0.1], [0.6, 0.3, 0.1, 0.0], [0.25] * 4])
STOP, LENGTH = 3, 4
SHAPES = {"chain": chain(3), "forks": [-1, 0, 0, 1, 1, 2], "wide": [-1, 0, 0, 0]}  # parents
LOSSY = {
    "epsilon": torch.tensor(0.09), "delta": torch.tensor(0.3), "near": torch.tensor(0.15),
    "embeddings": torch.zeros(1, 1), "distance": torch.tensor(0.5),
}  # fmt: skip
Text = tuple[int, ...]


def chances() -> dict[Text, float]:
    """The chance of each text that begins after id 0; -1 after its end."""
    found = {}
    for ids in itertools.product(range(VOCAB), repeat=LENGTH):
        end = ids.index(STOP) + 1 if STOP in ids else LENGTH
        if not any(ids[end:]):
            steps = zip((0, *ids), ids[:end])
            found[(*ids[:end], *[-1] * (LENGTH - end))] = math.prod(float(TARGET[a, b]) for a, b in steps)
    return found


@dataclass(frozen=True)
class Run:
    """Many texts, each of a noise stream of its own."""

    rule: str
    shape: str
    drafts: str = "iid"  # how children are drawn: iid, apart (without replacement), top (the likeliest)
    said: str = "so"  # what is said of the draft: so, or another one, or drawn in another way
    warmth: float = 1.0  # of the target's picks
    count: int = 20_000
    seed: int = 11

    def __str__(self) -> str:
        said = self.said if self.warmth == 1 else "warmer"
        return f"{self.rule}-{self.shape}-{self.drafts}-{said}-{self.count}-{self.seed}"

    def noise(self, places: Tensor, use: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return beside(torch.tensor(self.seed), use), torch.arange(self.count), places

    def drafted(self, before: Tensor, rank: int, places: Tensor) -> Tensor:
        """The child of that rank of nodes with these ids."""
        scores = DRAFT.log()[before]
        if self.drafts == "iid":
            return draw(scores, *self.noise(places, DRAFTS + rank))
        scores = scores if self.drafts == "top" else scores - gumbel_noise(VOCAB, *self.noise(places, DRAFTS))
        return scores.topk(rank + 1).indices[:, rank]

    def picks(self, before: Tensor, places: Tensor) -> Tensor:
        """What the target draws after ids, all of them [B]."""
        return draw(TARGET.log()[before] / self.warmth, *self.noise(places))

    def round(self, newest: Tensor, count: Tensor) -> Accepted:
        """One round after `count` [B] ids."""
        parents = SHAPES[self.shape]
        shape, ids = tree([parents], [parents], [STOP], [0]), [newest]
        depth = shape.depth[0].tolist()
        for i, parent in enumerate(parents[1:], 1):
            ids.append(self.drafted(ids[parent], parents[:i].count(parent), count + depth[parent]))
        tokens = torch.stack(ids, 1)
        row = [x.expand(self.count, *x.shape[1:]) for x in (shape.parents, shape.pairs, shape.depth)]
        (seed, streams, _), said = self.noise(count), DRAFT.roll(1, 1) if self.said == "another" else DRAFT
        values = {
            "picks": torch.stack([self.picks(x, count + d) for x, d in zip(ids, depth, strict=True)], 1),
            "logits": TARGET.log()[tokens], "drafted": said.log()[tokens], "seed": seed, "streams": streams,
            "position": count, **LOSSY,
        }  # fmt: skip
        rule = ACCEPT[self.rule]
        options = {"replaced": (self.drafts == "apart") == (self.said == "otherwise")} if "seed" in rule.inputs else {}
        return rule.apply(
            Tree(tokens, *row, shape.stop, LENGTH - count), max(depth), **{n: values[n] for n in rule.inputs}, **options
        )

    def texts(self) -> Tensor:
        """int64 [B, LENGTH], -1 after a stop id."""
        newest, count = torch.zeros(2, self.count, dtype=torch.int64)
        texts = torch.full((self.count, LENGTH + 1), -1)
        while (count < LENGTH).any():
            found = self.round(newest, count)
            places = count.unsqueeze(1) + torch.arange(found.emitted.shape[1])
            texts = texts.scatter(1, torch.where(found.emitted < 0, LENGTH, places), found.emitted)
            newest = found.emitted.gather(1, (found.taken - 1).clamp(min=0).unsqueeze(1)).squeeze(1).clamp(min=0)
            count = torch.where(found.ended, LENGTH, count + found.taken)
        return texts[:, :LENGTH]

    def counts(self) -> dict[Text, int]:
        """How often each text comes: none that is impossible."""
        found, counts = self.texts().unique(dim=0, return_counts=True)
        got = {tuple(text): n for text, n in zip(found.tolist(), counts.tolist(), strict=True)}
        assert all(chances()[text] > 0 for text in got)
        return got


def p_value(counts: dict[Text, int]) -> float:
    """The chance of such counts, or of ones further off, if texts are the target's (chi-square).

    Texts of which fewer than five are expected count as one.
    """
    total = sum(counts.values())
    expected = {text: chance * total for text, chance in chances().items() if chance}
    cells = [(counts.get(text, 0), n) for text, n in expected.items() if n >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(n for _, n in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((n - wanted) ** 2 / wanted for n, wanted in cells)
    half = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


def variation(counts: dict[Text, int]) -> float:
    """The total variation between what was drawn and the target."""
    total = sum(counts.values())
    return sum(abs(counts.get(text, 0) / total - chance) for text, chance in chances().items()) / 2


EXACT = [
    Run("match", "forks"), Run("rejection", "chain"), Run("rejection", "forks"), Run("rejection", "wide"),
    Run("rejection", "forks", "apart"), Run("rejection", "wide", "apart"),
]  # fmt: skip
WRONG = [
    Run("match", "forks", warmth=1.3), Run("rejection", "chain", said="another"),
    Run("rejection", "forks", said="another"), Run("rejection", "wide", "apart", "otherwise"),
    Run("rejection", "wide", "iid", "otherwise"), Run("rejection", "wide", "top"),
]  # fmt: skip


def thorough(runs: list[Run], *seeds: int) -> list[Any]:
    """The runs, and others with more texts that only `make test-all` makes."""
    more = [replace(run, count=100_000, seed=seed) for run in runs for seed in seeds]
    return [*runs, *(pytest.param(run, marks=pytest.mark.exhaustive) for run in more)]


@pytest.mark.parametrize("run", thorough(EXACT, 11, 12, 13), ids=str)
def test_texts_have_the_target_s_distribution(run: Run) -> None:
    assert p_value(run.counts()) > 1e-3


@pytest.mark.parametrize("run", thorough(WRONG, 11), ids=str)
def test_a_wrong_word_on_the_draws_is_seen(run: Run) -> None:
    """Else the test above would not tell much: drafts of another distribution, drawn in another way, or not at all."""
    assert p_value(run.counts()) < 1e-6


@pytest.mark.parametrize("drafts", ["iid", "top"])
def test_match_gives_the_texts_of_plain_decoding(drafts: str) -> None:
    run = Run("match", "forks", drafts, count=2000)
    before, plain = torch.zeros(run.count, dtype=torch.int64), torch.full((run.count, LENGTH), -1)
    ended = torch.zeros(run.count, dtype=torch.bool)
    for i in range(LENGTH):
        before = run.picks(before, torch.full((run.count,), i))
        plain[:, i] = torch.where(ended, -1, before)
        ended |= before == STOP
    assert torch.equal(run.texts(), plain)


def test_lossy_rules_say_so() -> None:
    """Their total variation is far above what as many draws of the target have (pytest -s shows it)."""
    assert {n: r.label for n, r in ACCEPT.items()} == {
        "match": "rounding", "rejection": "distribution", "typical": "lossy", "grouped": "lossy",
    }  # fmt: skip
    found = {name: variation(Run(name, "chain", count=5000).counts()) for name in ACCEPT}
    print("total variation:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for name, rule in ACCEPT.items():
        assert (found[name] > 0.1) == (rule.label == "lossy") and (found[name] < 0.06) == (rule.label != "lossy"), found
