"""Does a restricted forward compute what the full forward computes? Used by the sweep and by the property tests."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aropt.frontend.export import batched_experts
from aropt.frontend.trace import capture_model
from aropt.ir.torch_compat import looped_scans
from aropt.restrict.rewrite import Restricted, restrict

# The floor is one sample of the rounding error of one order of summation. The restricted forward sums in another
# order, over all slots, so its error may be a few times that: 16 leaves room (the sweep's largest is 1.1). A wrong row,
# mask or position is thousands of times it.
MULTIPLE = 16.0


@dataclass
class Result:
    """`error` and `floor` are absolute, on logits; `ties` counts argmax differences that the floor explains."""

    error: float = 0.0
    floor: float = 0.0
    flips: int = 0
    ties: int = 0
    reach: float = 0.0  # how much the first token changes later logits: a test that sees nothing proves nothing

    @property
    def ratio(self) -> float:
        return self.error / self.floor if self.floor else 0.0

    @property
    def ok(self) -> bool:
        return self.ratio <= MULTIPLE and not self.flips


class Subject:
    """A model, its restriction, and the same model in double precision."""

    def __init__(self, model: nn.Module, vocab: int, capacity: int) -> None:
        self.model, self.vocab = model.eval(), vocab
        self.double = copy.deepcopy(model).double().eval()
        graph, weights = capture_model(model, vocab, capacity)
        self.restricted = restrict(graph, weights, capacity)
        self.module = self.restricted.graph.bind({**weights, **self.restricted.constants})
        last = restrict(graph, weights, capacity, "last")
        self.last_module = last.graph.bind({**weights, **last.constants})

    def full(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits [T, V] of one sequence [T] by the plain forward."""
        with torch.no_grad(), batched_experts(model), looped_scans():
            output = model(ids[None], use_cache=False) if hasattr(model, "config") else model(ids[None])
        return getattr(output, "logits", output)[0].double()

    def precise(self, ids: Tensor) -> Tensor:
        """The same in double precision; in single precision where the model itself can't (its floor is then 8 eps)."""
        try:
            return self.full(self.double, ids)
        except RuntimeError:
            return self.full(self.model, ids)

    def stepped(self, sequences: Sequence[Tensor], splits: Sequence[int], slots: int) -> list[Tensor]:
        """Logits [T, V] of each sequence by the restricted forward: left-padded, in chunks of `splits` rows."""
        longest = max(map(len, sequences))
        pads = torch.tensor([longest - len(s) for s in sequences])
        batch = torch.stack([torch.cat([torch.randint(0, self.vocab, (longest - len(s),)), s]) for s in sequences])
        sizes = {"B": len(sequences), "S": slots}
        state = {name: spec.create(sizes) for name, spec in self.restricted.state.items()}
        chunks, start = [], 0
        for rows in splits:
            at = torch.arange(start, start + rows)
            positions = (at - pads[:, None]).clamp(min=-1)
            with torch.no_grad():
                out = self.module(batch[:, start : start + rows], at, positions, *state.values())
            chunks.append(out[0].double())
            state = dict(zip(state, out[1:], strict=True))
            start += rows
        logits = torch.cat(chunks, 1)
        return [row[pad:] for row, pad in zip(logits, pads.tolist(), strict=True)]

    def compare_last(self, lengths: Sequence[int], result: Result) -> None:
        """The same for a restriction to the last row: one prefill."""
        sequences = [torch.randint(0, self.vocab, (n,)) for n in lengths]
        longest = max(lengths)
        pads = torch.tensor([longest - n for n in lengths])
        batch = torch.stack([torch.cat([torch.zeros(longest - len(s), dtype=torch.int64), s]) for s in sequences])
        state = {n: s.create({"B": len(lengths), "S": longest}) for n, s in self.restricted.state.items()}
        at = torch.arange(longest)
        with torch.no_grad():
            logits = self.last_module(batch, at, (at - pads[:, None]).clamp(min=-1), *state.values())[0].double()
        for ids, got in zip(sequences, logits, strict=True):
            result.error = max(result.error, float((got[-1] - self.full(self.model, ids)[-1]).abs().max()))

    def compare(self, lengths: Sequence[int], splits: Sequence[int], slots: int, result: Result) -> None:
        """Adds the comparison of random sequences of `lengths`, run in chunks of `splits`, to the result."""
        sequences = [torch.randint(0, self.vocab, (n,)) for n in lengths]
        for ids, got in zip(sequences, self.stepped(sequences, splits, slots), strict=True):
            want, exact = self.full(self.model, ids), self.precise(ids)
            least = 8 * torch.finfo(torch.float32).eps * float(exact.abs().max())
            floor = max(float((want - exact).abs().max()), least)
            error = float((got - want).abs().max())
            result.error = max(result.error, error) if error == error else float("inf")
            result.floor = max(result.floor, floor)
            top = want.topk(2, -1).values
            differs = got.argmax(-1) != want.argmax(-1)
            tie = top[:, 0] - top[:, 1] <= 2 * MULTIPLE * floor
            result.flips += int((differs & ~tie).sum())
            result.ties += int((differs & tie).sum())

    def measure_reach(self, length: int, result: Result) -> None:
        ids = torch.randint(0, self.vocab, (length,))
        other = ids.clone()
        other[0] = (ids[0] + 1) % self.vocab
        result.reach = float((self.full(self.model, ids) - self.full(self.model, other))[1:].abs().max())


def random_splits(total: int, rng: random.Random) -> list[int]:
    """A prefill, then single and multi-row chunks, that sum to `total`."""
    splits = [rng.randint(1, total)]
    while sum(splits) < total:
        left = total - sum(splits)
        splits.append(1 if rng.random() < 0.5 else rng.randint(1, min(5, left)))
    return splits


def check(model: nn.Module, vocab: int, capacity: int, seed: int = 0, rounds: int = 4) -> tuple[Result, Restricted]:
    """Compares at length 1, at capacity, and for ragged left-padded batches of random lengths and splits."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    subject = Subject(model, vocab, capacity)
    result = Result()
    subject.measure_reach(min(5, capacity), result)
    subject.compare([1], [1], 1, result)
    subject.compare([capacity] * 2, random_splits(capacity, rng), capacity, result)
    for _ in range(rounds):
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 3))]
        subject.compare(lengths, random_splits(max(lengths), rng), rng.randint(max(lengths), capacity + 3), result)
    subject.compare_last([rng.randint(1, capacity) for _ in range(3)], result)
    return result, subject.restricted
