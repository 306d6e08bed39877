"""A grammar of small causal language models: `models()` draws (module, vocab, capacity, description).

The models are plain `forward(ids) -> logits` without cache code. They vary in what a restriction must get right: where
positions enter, what masks look like, how attention is laid out, where norms and residual additions are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

LOW = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Shape:
    """The choices that make a model; `str` gives those that differ from the default."""

    seed: int = 0
    vocab: int = 17
    capacity: int = 12
    layers: int = 1
    heads: int = 2
    kv_heads: int = 2
    size: int = 4  # of a head
    norm: str = "rms"  # rms | layer
    place: str = "pre"  # pre | post | sandwich
    positions: str = "rotary"  # rotary | partial | learned | alibi | none
    window: int = 0  # 0: sees all of the past
    alternate: bool = False  # the window applies to every other layer
    parallel: bool = False  # attention and MLP side by side
    tied: bool = False
    bias: bool = False
    attention: str = "sdpa"  # sdpa | masked (SDPA with a mask) | written | flat (bmm over batch x heads) | einsum
    mask: str = "add"  # add | where | fill | product: how written attention masks
    cap: float = 0.0  # soft-cap on scores
    sinks: bool = False
    gated: bool = True
    qk_norm: bool = False
    fused: bool = False  # one projection for q, k and v
    scaled: bool = False  # embeddings times sqrt(width)
    final_cap: float = 0.0

    def __str__(self) -> str:
        default = asdict(Shape())
        return " ".join(f"{k}={v}" for k, v in asdict(self).items() if v != default[k]) or "default"


class Norm(nn.Module):
    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(1 + 0.3 * torch.randn(size))
        self.shift = nn.Parameter(0.3 * torch.randn(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.shift)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    def __init__(self, s: Shape, layer: int) -> None:
        super().__init__()
        self.s, width = s, s.heads * s.size
        self.window = s.window if layer % 2 == 0 or not s.alternate else 0
        sizes = [width, s.kv_heads * s.size, s.kv_heads * s.size]
        self.sizes = sizes
        self.projections = nn.ModuleList(nn.Linear(width, n, s.bias) for n in ([sum(sizes)] if s.fused else sizes))
        self.out = nn.Linear(width, width, s.bias)
        self.norms = nn.ModuleList(Norm(s.norm, s.size) for _ in range(2)) if s.qk_norm else None
        self.sinks = nn.Parameter(torch.randn(s.heads))

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        s, (batch, length, _) = self.s, x.shape
        parts = self.projections[0](x).split(self.sizes, -1) if s.fused else [p(x) for p in self.projections]
        q, k, v = (p.view(batch, length, -1, s.size).transpose(1, 2) for p in parts)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        if s.positions in ("rotary", "partial"):
            q, k = rotate(q, table), rotate(k, table)
        if s.kv_heads != s.heads:
            times = s.heads // s.kv_heads
            k, v = (t[:, :, None].expand(-1, -1, times, -1, -1).reshape(batch, s.heads, length, s.size) for t in (k, v))
        y = self.attend(q, k, v, self.sees(length), self.slope_bias(length))
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def sees(self, length: int) -> Tensor:
        """bool [T, T]"""
        at = torch.arange(length)
        past = at[None] <= at[:, None]
        return past & (at[None] > at[:, None] - self.window) if self.window else past

    def slope_bias(self, length: int) -> Tensor | None:
        """ALiBi: float [H, T, T]"""
        if self.s.positions != "alibi":
            return None
        at = torch.arange(length)
        return 2.0 ** -torch.arange(1, self.s.heads + 1)[:, None, None] * (at[None] - at[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, sees: Tensor, bias: Tensor | None) -> Tensor:
        s = self.s
        if s.attention == "sdpa" and bias is None and not self.window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if s.attention in ("sdpa", "masked"):
            mask = sees if bias is None else bias.masked_fill(~sees, -math.inf)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=s.size**-0.5)
        probs = self.probabilities(self.scores(q, k), sees, bias)
        if s.attention == "einsum":
            return torch.einsum("bhij,bhjd->bhid", probs, v)
        if s.attention == "flat":
            return torch.bmm(probs.flatten(0, 1), v.flatten(0, 1)).view(q.shape)
        return probs @ v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.s.attention == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k)
        elif self.s.attention == "flat":
            scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], -1)
        else:
            scores = q @ k.transpose(-1, -2)
        return scores * self.s.size**-0.5

    def probabilities(self, scores: Tensor, sees: Tensor, bias: Tensor | None) -> Tensor:
        s = self.s
        if s.cap:
            scores = torch.tanh(scores / s.cap) * s.cap
        scores = scores if bias is None else scores + bias
        if s.mask == "add":
            scores = scores + torch.zeros(sees.shape).masked_fill(~sees, LOW)
        elif s.mask == "where":
            scores = torch.where(sees, scores, torch.full((), LOW))
        elif s.mask == "fill":
            scores = scores.masked_fill(~sees, -math.inf)
        else:
            scores = scores - 1e9 * (1 - sees.float())
        if not s.sinks:
            return torch.softmax(scores, -1)
        sink = self.sinks.view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of [B, H, T, d] by (cos, sin) [T, r / 2]; features from r on are left alone."""
    half = table[0].shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * table[0] - b * table[1], b * table[0] + a * table[1], rest], -1)


class Block(nn.Module):
    def __init__(self, s: Shape, layer: int) -> None:
        super().__init__()
        width = s.heads * s.size
        self.s, self.attention = s, Attention(s, layer)
        self.up, self.down = nn.Linear(width, 2 * width, s.bias), nn.Linear(2 * width, width, s.bias)
        self.gate = nn.Linear(width, 2 * width, s.bias) if s.gated else None
        self.norms = nn.ModuleList(Norm(s.norm, width) for _ in range(4))

    def mlp(self, x: Tensor) -> Tensor:
        y = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        return self.down(y)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        place, n = self.s.place, self.norms
        if self.s.parallel:
            y = n[0](x)
            return x + self.attention(y, table) + self.mlp(y)  # type: ignore[no-any-return]
        if place == "post":
            x = n[0](x + self.attention(x, table))
            return n[1](x + self.mlp(x))  # type: ignore[no-any-return]
        y = self.attention(n[0](x), table)
        x = x + (n[2](y) if place == "sandwich" else y)
        y = self.mlp(n[1](x))
        return x + (n[3](y) if place == "sandwich" else y)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        torch.manual_seed(s.seed)
        width = s.heads * s.size
        self.s = s
        self.embedding, self.position = nn.Embedding(s.vocab, width), nn.Embedding(s.capacity, width)
        self.blocks = nn.ModuleList(Block(s, i) for i in range(s.layers))
        self.norm, self.head = Norm(s.norm, width), nn.Linear(width, s.vocab, bias=False)
        if s.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        s, at = self.s, torch.arange(ids.shape[1])
        x = self.embedding(ids)
        x = x * (s.heads * s.size) ** 0.5 if s.scaled else x
        if s.positions == "learned":
            x = x + self.position(at)
        half = s.size // (4 if s.positions == "partial" else 2)
        angles = at[:, None] * 10.0 ** -torch.arange(half)
        for block in self.blocks:
            x = block(x, (angles.cos(), angles.sin()))
        logits = self.head(self.norm(x))
        return torch.tanh(logits / s.final_cap) * s.final_cap if s.final_cap else logits


def module(shape: Shape) -> nn.Module:
    """The model of a shape, with weights from its seed."""
    return Model(shape).eval()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """All choices of the grammar; those that only written-out attention has are drawn only with it."""
    heads = draw(st.sampled_from([1, 2, 4]))
    attention = draw(st.sampled_from(["sdpa", "masked", "written", "flat", "einsum"]))
    written = attention not in ("sdpa", "masked")
    return Shape(
        seed=draw(st.integers(0, 999)), vocab=draw(st.sampled_from([5, 17])), capacity=draw(st.integers(2, 14)),
        layers=draw(st.integers(1, 2)), heads=heads,
        kv_heads=draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])), size=draw(st.sampled_from([4, 8])),
        norm=draw(st.sampled_from(["rms", "layer"])), place=draw(st.sampled_from(["pre", "post", "sandwich"])),
        positions=draw(st.sampled_from(["rotary", "partial", "learned", "alibi", "none"])),
        window=draw(st.sampled_from([0, 0, 1, 3, 5])), alternate=draw(st.booleans()), parallel=draw(st.booleans()),
        tied=draw(st.booleans()), bias=draw(st.booleans()), attention=attention,
        mask=draw(st.sampled_from(["add", "where", "fill", "product"])) if written else "add",
        cap=draw(st.sampled_from([0.0, 3.0])) if written else 0.0, sinks=written and draw(st.booleans()),
        gated=draw(st.booleans()), qk_norm=draw(st.booleans()), fused=draw(st.booleans()), scaled=draw(st.booleans()),
        final_cap=draw(st.sampled_from([0.0, 0.0, 4.0])),
    )  # fmt: skip


def models() -> st.SearchStrategy[tuple[nn.Module, int, int, str]]:
    """(module, vocab, capacity, description) of a random causal language model."""
    return shapes().map(lambda s: (module(s), s.vocab, s.capacity, str(s)))
