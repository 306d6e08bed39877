"""Mesa-optimization (Zheng et al. 2024, 2405.16845): linear attention learns a step of gradient descent in its context.

Sequences are x[t + 1] = W x[t] in C^d, W diagonal with entries of length 1, drawn anew for each. A token is
e[t] = (0, x[t], x[t - 1]); one layer of causal linear attention writes its prediction into the first d entries of

    e[t] + PV sum_{i <= t} e[i] (e[i]^* KQ e[t]) / max(t - 1, 1)

Only the blocks that read something matter, so e[t] is (x[t], x[t - 1]) below. Gradient flow begins at multiples of the
identity in two blocks (section 3) and is descent in small steps on fresh sequences here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.models.optimise import SEED
from aropt.passes.kv_cache import KvCache
from aropt.recipes import Recipe, Row, Say

SIZE, LENGTH = 3, 12  # d, T
STEPS, BATCH, RATE, BEGIN = 800, 256, 0.1, 0.1
PHASES = 8  # of the entries of W and of tokens, where tokens are ids
TESTED = 2000  # fresh sequences
NEW = 12  # ids after a prompt of two
NEAR = 0.99  # the cosine with a step of gradient descent


def signs(count: int, generator: torch.Generator) -> Tensor:
    """Entries 1 or -1, each drawn by itself: their odd moments are 0 (assumption 4.1 holds)."""
    return torch.randint(2, (count, SIZE), generator=generator).double() * 2 - 1


def ones(count: int, generator: torch.Generator) -> Tensor:
    """All entries 1: products of two of them have no mean of 0 (it is broken)."""
    return torch.ones(count, SIZE, dtype=torch.float64)


def single(count: int, generator: torch.Generator) -> Tensor:
    """One entry is 1, the others 0 (the stronger condition holds, under which x[t + 1] is recovered)."""
    return F.one_hot(torch.randint(SIZE, (count,), generator=generator), SIZE).double()


def sequences(first: Tensor, generator: torch.Generator) -> Tensor:
    """complex128 [N, T, d] from x[1] [N, d]."""
    turns = 2 * math.pi * torch.rand(first.shape, generator=generator, dtype=torch.float64)
    steps = torch.arange(LENGTH).view(1, -1, 1) * turns.unsqueeze(1)
    return torch.polar(first.abs().unsqueeze(1).expand_as(steps).contiguous(), steps) * first.sign().unsqueeze(1)


def tokens(x: Tensor) -> Tensor:
    """(x[t], x[t - 1]): [.., T, d] to [.., T, 2 d]."""
    return torch.cat([x, F.pad(x[..., :-1, :], (0, 0, 1, 0))], -1)


def parallel(x: Tensor, PV: Tensor, KQ: Tensor) -> Tensor:
    """The predictions [N, T, d] of x [N, T, d], all rows at once; PV [d, 2 d], KQ [2 d, 2 d]."""
    e = tokens(x)
    scores = (e @ KQ.to(e.dtype).T) @ e.mH  # [t, i]
    return scores.tril() / divisor(x.shape[1]) @ (e @ PV.to(e.dtype).T)


def recurrent(x: Tensor, PV: Tensor, KQ: Tensor) -> Tensor:
    """The same from a state S[t] = S[t - 1] + (PV e[t]) e[t]^*, a row at a time."""
    e, found = tokens(x), []
    state = x.new_zeros(len(x), SIZE, 2 * SIZE)
    for t in range(x.shape[1]):
        row = e[:, t]
        state = state + (row @ PV.to(e.dtype).T).unsqueeze(2) * row.conj().unsqueeze(1)
        found.append((state @ (row @ KQ.to(e.dtype).T).unsqueeze(2)).squeeze(2) / max(t, 1))
    return torch.stack(found, 1)


def divisor(rows: int) -> Tensor:
    return torch.arange(rows).clamp(min=1).unsqueeze(1)


def gradient_step(x: Tensor) -> Tensor:
    """What least squares on the pairs (x[i], x[i + 1]), i < t, predicts after a step of size 1 from W = 0."""
    found = []
    for t in range(1, x.shape[1]):
        W = x[:, 1 : t + 1].mT @ x[:, :t].conj() / t
        found.append((W @ x[:, t].unsqueeze(2)).squeeze(2))
    return torch.stack(found, 1)


def trained(draw: Any, quick: bool) -> tuple[Tensor, Tensor]:
    """PV and KQ after the flow from sequences whose first token `draw` draws."""
    generator = torch.Generator().manual_seed(SEED)
    PV, KQ = torch.zeros(SIZE, 2 * SIZE).double(), torch.zeros(2 * SIZE, 2 * SIZE).double()
    PV[:, :SIZE] = BEGIN * torch.eye(SIZE)
    KQ[SIZE:, :SIZE] = BEGIN * torch.eye(SIZE)
    for _ in range(STEPS):
        x = sequences(draw(BATCH // (4 if quick else 1), generator), generator)
        loss = (parallel(x, PV.requires_grad_(), KQ.requires_grad_())[:, 1:-1] - x[:, 2:]).abs().square()
        grads = torch.autograd.grad(loss.sum((1, 2)).mean() / 2 / (LENGTH - 2), (PV, KQ))
        PV, KQ = (p.detach() - RATE * g for p, g in zip((PV, KQ), grads, strict=True))
    return PV, KQ


def beside_step(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Predictions beside the gradient's: the cosine, the size of step that is nearest, and the best one for x."""
    step, y = gradient_step(x)[:, :-1], y[:, 1:-1]

    def nearest(to: Tensor) -> float:
        return float((step.conj() * to).sum().real / step.abs().square().sum())

    cosine = float((step.conj() * y).sum().real / step.norm() / y.norm())
    return cosine, nearest(y), nearest(x[:, 2:])


class Turns(nn.Module):
    """The trained layer over ids: id j * 8 + p is x with entry j exp(2 pi i p / 8), and others 0.

    `scan`: by the op of a recurrence, else as products of all rows. Complex numbers are pairs of real ones: the real
    part of a score takes the values as they are, its imaginary part takes them turned by 90 degrees.
    """

    codes: Tensor
    PV: Tensor
    KQ: Tensor
    capacity = 64

    def __init__(self, PV: Tensor, KQ: Tensor, scan: bool) -> None:
        super().__init__()
        turns = torch.polar(torch.ones(PHASES), 2 * math.pi * torch.arange(PHASES) / PHASES)
        codes = torch.block_diag(*[turns.unsqueeze(1).real] * SIZE), torch.block_diag(*[turns.unsqueeze(1).imag] * SIZE)
        self.register_buffer("codes", torch.cat(codes, 1))  # [V, 2 d]: real parts, then imaginary ones
        self.register_buffer("PV", torch.block_diag(PV, PV).float())
        self.register_buffer("KQ", torch.block_diag(KQ, KQ).float())
        self.scan = scan

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] to logits float32 [B, T, 24]: how far the prediction points to each id's x."""
        x = F.embedding(ids, self.codes)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        (real, imag), (real_before, imag_before) = x.chunk(2, -1), before.chunk(2, -1)
        real, imag = torch.cat([real, real_before], -1), torch.cat([imag, imag_before], -1)
        e, turned = torch.cat([real, imag], -1), torch.cat([-imag, real], -1)
        query, value = F.linear(e, self.KQ), F.linear(e, self.PV)
        values = torch.stack([value, F.linear(turned, self.PV)], 2)  # [B, T, 2, 2 d]
        keys = torch.stack([e, turned], 2)
        queries = torch.stack([query, query], 2)
        if self.scan:
            steps, none = torch.ones_like(keys[..., 0]), self.PV.new_zeros(2)
            y = ops.load("ssd_scan").overload(values, steps, none, keys, queries, None, None, None)[0].sum(2)
        else:
            scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
            y = (scores.tril() @ values.transpose(1, 2)).sum(1)
        logits: Tensor = y / torch.arange(ids.shape[1]).clamp(min=1).unsqueeze(1) @ self.codes.T
        return logits


def check(say: Say, quick: bool) -> Iterator[Row]:
    """The theory in fp64, and the trained layer through aropt."""
    generator = torch.Generator().manual_seed(SEED + 1)
    weights, said, seen = {}, {}, {}
    for draw in (signs, ones, single):
        say(f"{draw.__name__}: training")
        weights[draw] = trained(draw, quick)
        x = sequences(draw(TESTED, generator), generator)
        y = parallel(x, *weights[draw])
        apart = float((y - recurrent(x, *weights[draw])).abs().max())
        error = float((y[:, 1:-1] - x[:, 2:]).norm() / x[:, 2:].norm())
        said[draw], seen[draw] = beside_step(x, y), (apart, error)
    apart = max(one for one, _ in seen.values())
    yield Row(
        "the products of all rows are the recurrence S[t] = S[t - 1] + v k^*",
        f"they differ by at most {apart:.1g} in fp64", 3 * TESTED, "sequences", apart < 1e-12,
    )  # fmt: skip
    cosine, size, best = said[signs]
    yield Row(
        "trained on first tokens of random signs, it predicts what a step of gradient descent on its context does",
        f"cosine {cosine:.4f}; the step is of size {size:.3f}, the best one {best:.3f}", TESTED, "sequences",
        cosine > NEAR and abs(size / best - 1) < 0.02,
    )  # fmt: skip
    cosine = said[ones][0]
    yield Row(
        "trained on first tokens of ones (the condition is broken), it does not: the control",
        f"cosine {cosine:.4f}; beside the diagonal its blocks are up to {beside_diagonal(weights[ones][0]):.2f}"
        f" of it, with signs {beside_diagonal(weights[signs][0]):.2f}",
        TESTED, "sequences", cosine < NEAR,
    )  # fmt: skip
    yield Row(
        "it recovers x[t + 1] where the stronger condition holds (one entry of the first token), else not (signs)",
        f"relative error {seen[single][1]:.1g}, with signs {seen[signs][1]:.2f}", TESTED, "sequences",
        seen[single][1] < 1e-3 and seen[signs][1] > 0.1,
    )  # fmt: skip
    yield from through_aropt(*weights[single], say)


def beside_diagonal(PV: Tensor) -> float:
    """The largest entry of the block of x[t] beside its diagonal, as a share of the diagonal."""
    block = PV[:, :SIZE]
    return float((block - block.diag().diag()).abs().max() / block.diag().abs().mean())


def through_aropt(PV: Tensor, KQ: Tensor, say: Say) -> Iterator[Row]:
    """The layer over ids: what is refused, and what is derived."""
    import aropt

    say("optimizing the layer")
    products = aropt.capture(Turns(PV, KQ, scan=False))
    try:
        aropt.optimize(products, "eager", [KvCache()])
        refused = ""
    except Unsupported as error:
        refused = error.why
    yield Row(
        "written as products of rows with rows, without a softmax, it is refused a cache by name",
        refused or "it is not refused", 1, "module", bool(refused),
    )  # fmt: skip
    made = aropt.optimize(aropt.capture(Turns(PV, KQ, scan=True)), "eager")
    state = {name: s.spec.dims for name, s in made.program.state.items() if s.kind == "recurrent"}
    ids = [[first, other] for first in range(PHASES * SIZE) for other in range(PHASES * SIZE)
           if first // PHASES == other // PHASES]  # fmt: skip
    right = sum(made.generate([prompt], NEW, plain=True)[0] == continued(*prompt) for prompt in ids)
    status = made.report["verify"]["status"]
    yield Row(
        "written with `aropt::ssd_scan`, a recurrence is derived, which generates x[t + 1] = W x[t] after two tokens",
        f"verified: {status}; recurrent state {', '.join(str(list(dims)) for dims in state.values())};"
        f" {right} of {len(ids)} answers of {NEW} ids are right",
        len(ids), "prompts", status == "pass" and len(state) == 2 and right == len(ids),
    )  # fmt: skip


def continued(first: int, second: int) -> list[int]:
    """The ids that follow two of the same entry: each is turned by as much as the one before."""
    entry, turn = first // PHASES * PHASES, second - first
    return [entry + (second - entry + turn * (i + 1)) % PHASES for i in range(NEW)]


RECIPE = Recipe(
    title="linear attention that learns gradient descent",
    paper="Zheng et al. 2024, 2405.16845, sections 3 and 4",
    runs="Theory, in fp64. aropt compiles the trained layer as a recurrence where it is written with an op for one; it "
    "does not see that products of rows with rows are one",
    proxy="gradient flow is descent in 800 steps on fresh sequences, d = 3, T = 12; ids stand for tokens of one entry.",
    check=check,
)
