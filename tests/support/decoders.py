"""Plain decoders as people write them: one layer of attention each, written out in the ways that are found."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 40


class Attention(nn.Module):
    """A mask of -inf that is added to the scores; subclasses change a part of this."""

    capacity, heads, size = 32, 2, 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.heads * self.size
        self.embed, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)
        self.qkv = nn.Linear(width, 3 * width)

    def hidden(self, length: int) -> Tensor:
        """What is added to the scores [.., T, T]."""
        return torch.triu(torch.full((length, length), float("-inf")), 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) / self.size**0.5

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scores(q, k) + self.hidden(q.shape[-2])).softmax(-1) @ v

    def mixed(self, ids: Tensor, x: Tensor) -> Tensor:
        b, t = ids.shape
        q, k, v = (y.view(b, t, self.heads, self.size).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.mixed(ids, x))


class Filled(Attention):
    """A mask of numbers that no name can hold."""

    def hidden(self, length: int) -> Tensor:
        return torch.triu(torch.full((length, length), -1e9), 1)


class Given(Filled):
    """The mask goes to SDPA."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden(q.shape[-2]))


class Buffered(Attention):
    """nanoGPT: a mask and a table of positions as long as the capacity."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(self.capacity, self.heads * self.size)
        self.register_buffer("bias", torch.ones(1, 1, self.capacity, self.capacity).tril())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = self.bias[:, :, : q.shape[-2], : q.shape[-2]] == 0
        return self.scores(q, k).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(x + self.mixed(ids, x))


class Alibi(Attention):
    """Slopes times distances."""

    def slopes(self) -> Tensor:
        return torch.tensor([2.0 ** (-4 * (i + 1)) for i in range(self.heads)])[:, None, None]

    def hidden(self, length: int) -> Tensor:
        at = torch.arange(length)
        return super().hidden(length) + self.slopes() * (at[None] - at[:, None])


class AlibiFromTheEnd(Alibi):
    """Distances to the last token: with another length they are others, and the softmax is the same."""

    def hidden(self, length: int) -> Tensor:
        return Attention.hidden(self, length) + self.slopes() * torch.arange(1 - length, 1)


class AlibiFilled(AlibiFromTheEnd):
    """MPT's: the bias, then a mask."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[-2]
        scores = self.scores(q, k) + self.slopes() * torch.arange(1 - t, 1)
        later = torch.ones(t, t, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, torch.finfo(torch.float32).min).softmax(-1) @ v


class Bucketed(Attention):
    """T5's buckets of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, self.heads)

    def hidden(self, length: int) -> Tensor:
        at = torch.arange(length)
        distance = (at[:, None] - at[None]).clamp(min=0)
        far = 4 + (torch.log(distance.float().clamp(min=1) / 4) / math.log(4) * 4).long()
        bucket = torch.where(distance < 4, distance, far.clamp(max=7))
        return super().hidden(length) + self.table(bucket).permute(2, 0, 1)


class Continuous(Attention):
    """An MLP of the distance, over all pairs of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, self.heads))

    def hidden(self, length: int) -> Tensor:
        at = torch.arange(length)
        distance = (at[:, None] - at[None]).float()
        return super().hidden(length) + self.mlp((distance.sign() * distance.abs().log1p())[..., None]).permute(2, 0, 1)


class Gathered(Continuous):
    """The same over 2T - 1 distances, gathered."""

    def hidden(self, length: int) -> Tensor:
        at = torch.arange(length)
        table = self.mlp(torch.arange(1 - length, length).float()[:, None])
        return Attention.hidden(self, length) + table[at[:, None] - at[None] + length - 1].permute(2, 0, 1)


class Talking(Attention):
    """Heads that talk: convolutions over them, before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(self.heads, self.heads, 1)
        self.after = nn.Conv2d(self.heads, self.heads, 1, bias=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before(self.scores(q, k)) + self.hidden(q.shape[-2])
        return self.after(scores.softmax(-1)) @ v


class TalkingByProduct(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = (nn.Parameter(torch.randn(self.heads, self.heads)) for _ in range(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhij,hg->bgij", self.scores(q, k), self.before) + self.hidden(q.shape[-2])
        return torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.after) @ v


class Leaking(Talking):
    """A bias after the softmax: every row sees all columns."""

    def __init__(self) -> None:
        super().__init__()
        self.after = nn.Conv2d(self.heads, self.heads, 1)


class Memory(Attention):
    """Learned keys and values before those of the tokens."""

    before = True

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = (nn.Parameter(torch.randn(self.heads, 3, self.size)) for _ in range(2))

    def joined(self, memory: Tensor, x: Tensor) -> Tensor:
        memory = memory.expand(x.shape[0], -1, -1, -1)
        return torch.cat([memory, x] if self.before else [x, memory], 2)

    def beside(self, length: int) -> Tensor:
        return F.pad(self.hidden(length), (3, 0) if self.before else (0, 3))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.scores(q, self.joined(self.keys, k)) + self.beside(q.shape[-2])
        return scores.softmax(-1) @ self.joined(self.values, v)


class MemoryAfter(Memory):
    before = False


class MemoryGiven(Memory):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.joined(self.keys, k), self.joined(self.values, v)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.beside(q.shape[-2]))


class Shared(Attention):
    """One key head for all, by einsum."""

    form = ("bhid,bjd->bhij", "bhij,bjd->bhid")

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * self.size)

    def mixed(self, ids: Tensor, x: Tensor) -> Tensor:
        b, t = ids.shape
        q, (k, v) = self.q(x).view(b, t, self.heads, self.size), self.kv(x).chunk(2, -1)
        first = self.form[0].startswith("bh")
        scores = torch.einsum(self.form[0], q.transpose(1, 2) if first else q, k) / self.size**0.5 + self.hidden(t)
        y = torch.einsum(self.form[1], scores.softmax(-1), v)
        return (y.transpose(1, 2) if first else y).reshape(b, t, -1)


class SharedLate(Shared):
    form = ("bihd,bjd->bhij", "bhij,bjd->bihd")


class SharedBroadcast(Shared):
    def mixed(self, ids: Tensor, x: Tensor) -> Tensor:
        b, t = ids.shape
        q, (k, v) = self.q(x).view(b, t, self.heads, self.size).transpose(1, 2), self.kv(x).unsqueeze(1).chunk(2, -1)
        return self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1)


class Shifted(Attention):
    """A token shift: each row needs the one before."""

    def shift(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 1, -1))

    def mixed(self, ids: Tensor, x: Tensor) -> Tensor:
        return super().mixed(ids, x + self.shift(x))


class Rolled(Shifted):
    def shift(self, x: Tensor) -> Tensor:
        return x.roll(1, 1)


class Joined(Shifted):
    def shift(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


class Convolved(Shifted):
    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        self.conv = nn.Conv1d(width, width, 2, padding=1)

    def shift(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., :-1].transpose(1, 2)


class Depthwise(Shifted):
    """Padding before the first row, in a convolution of each channel."""

    def __init__(self) -> None:
        super().__init__()
        width = self.heads * self.size
        self.conv = nn.Conv1d(width, width, 3, groups=width)

    def shift(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


CACHED = [
    Attention, Filled, Given, Buffered, Alibi, AlibiFromTheEnd, AlibiFilled, Bucketed, Continuous, Gathered, Memory,
    MemoryAfter, MemoryGiven, Shared, SharedLate, SharedBroadcast,
]  # fmt: skip
TALKING = [Talking, TalkingByProduct, Leaking]
SHIFTS = [Shifted, Joined, Convolved, Depthwise]


class Branching(Attention):
    """Another function for more than 20 tokens."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.mixed(ids, x) + (2 * x if ids.shape[1] > 20 else x))
