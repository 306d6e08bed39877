"""Small causal models that mix rows in ways that are easy to miss, and a few that only look as if they did.

Each entry of CASES is (name, verdict, changes): the changes replace a step of `Tiny`; the verdict is "refused" (aropt
must say no) or "exact" (the restricted forward must be right). None may be silently wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, CAPACITY, D, H = 23, 12, 16, 2
LOW = torch.finfo(torch.float32).min
Step = Callable[..., Any]


def heads(x: Tensor) -> Tensor:
    """[B, T, D] -> [B, H, T, D / H]"""
    return x.view(x.shape[0], x.shape[1], H, D // H).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], D)


def causal(n: Any) -> Tensor:
    """bool [n, n], True: sees."""
    at = torch.arange(n)
    return at[None] <= at[:, None]


class Tiny(nn.Module):
    """Embedding, one attention, a head; each step may be replaced."""

    def __init__(self, **changes: Step) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, D), nn.Embedding(CAPACITY, D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.head = nn.Linear(D, 2 * D), nn.Linear(D, VOCAB)
        self.conv = nn.Conv1d(D, D, 3, padding=2)
        self.changes = changes

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.shape[1]))
        x = self.step("embed", x, ids)
        q, k, v = (heads(t) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(merge(self.step("attend", q, k, v)))
        x = self.step("mix", x, ids)
        return self.step("logits", self.head(x), ids)  # type: ignore[no-any-return]

    def step(self, name: str, *values: Any) -> Any:
        if name in self.changes:
            return self.changes[name](self, *values)
        return attend(self, *values) if name == "attend" else values[0]


def attend(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked(mask: Callable[[Any], Tensor]) -> Step:
    """SDPA with a mask of the length, of the query's type: a float32 mask beside float64 is misread from 8 rows on."""

    def attend(m: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        given = mask(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, given.to(q.dtype) if given.is_floating_point() else given)

    return attend


def written(weigh: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """Written-out attention: weigh(scores, sees) -> probabilities."""

    def step(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return weigh(q @ k.transpose(-1, -2) / math.sqrt(D // H), causal(q.shape[2])) @ v

    return step


def mix(change: Callable[[Tensor], Tensor]) -> dict[str, Step]:
    return {"mix": lambda m, x, ids: x + change(x)}


def with_ids(change: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Step]:
    return {"mix": lambda m, x, ids: change(x, ids)}


def attention(step: Step) -> dict[str, Step]:
    return {"attend": step}


def bias(scores: Tensor, sees: Tensor, low: float = LOW) -> Tensor:
    return scores + torch.zeros(sees.shape).masked_fill(~sees, low)


def normalized(x: Tensor) -> Tensor:
    return x / x.sum(-1, keepdim=True)


def rope(x: Tensor, scale: Any = 1.0) -> Tensor:
    """Rotary embedding of [B, H, T, d]; `scale` divides the positions."""
    d, n = x.shape[-1], x.shape[2]
    angles = (torch.arange(n) / scale)[:, None] * 10.0 ** -torch.arange(0, d // 2)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def dynamic_scale(n: Any) -> Tensor:
    """Dynamic NTK: grows once the length passes 6."""
    total = torch.ones(1, n).sum(-1)
    return torch.clamp(total / 6, min=1.0)


def two_heads(n: Any) -> Tensor:
    """The second head sees a window of 3."""
    at = torch.arange(n)
    window = at[None] > at[:, None] - 3
    return torch.stack([causal(n), causal(n) & window])[None]


def window(n: Any) -> Tensor:
    at = torch.arange(n)
    return at[None] > at[:, None] - 4


def block_causal(n: Any) -> Tensor:
    block = torch.arange(n) // 4
    return block[None] <= block[:, None]


def prefix(n: Any) -> Tensor:
    return causal(n) | (torch.arange(n) < 3)[None]


def one_ahead(n: Any) -> Tensor:
    at = torch.arange(n)
    return at[None] <= at[:, None] + 1


def sinks(scores: Tensor, sees: Tensor) -> Tensor:
    scores = scores.masked_fill(~sees, LOW)
    sink = torch.tensor([0.3, -0.7]).view(1, H, 1, 1).expand(scores.shape[0], H, scores.shape[2], 1)
    wide = torch.cat([scores, sink], -1)
    return torch.softmax(wide - wide.amax(-1, keepdim=True), -1)[..., :-1]


def time_first(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA on [B, T, H, d]: attends over heads."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


def remembering(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three learned keys, which every third row does not see at all."""
    n, fixed = q.shape[2], m.up.weight.view(2, 1, H, -1, D // H)[:, :, :, :3]
    memory, stored = (x.expand(q.shape[0], -1, -1, -1).to(q.dtype) for x in fixed)
    hidden = (torch.arange(n) % 3 == 2)[:, None].expand(n, 3)
    mask = torch.zeros(n, 3 + n).masked_fill(torch.cat([hidden, ~causal(n)], -1), -math.inf)
    k, v = torch.cat([memory, k], 2), torch.cat([stored, v], 2)
    return F.scaled_dot_product_attention(q, k, v, mask.to(q.dtype))


def flat_heads(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """bmm and baddbmm over B * H, as Bloom does."""
    b, h, t, d = q.shape
    q, k, v = (x.reshape(b * h, t, d) for x in (q, k, v))
    slopes = torch.tensor([0.5, 0.25]).view(1, H, 1, 1).expand(b, H, 1, 1) * torch.arange(t)
    scores = torch.baddbmm(slopes.reshape(b * h, 1, t), q, k.transpose(1, 2), beta=1.0, alpha=0.3)
    scores = scores.view(b, h, t, t).masked_fill(~causal(t), LOW)
    return torch.bmm(torch.softmax(scores, -1).view(b * h, t, t), v).view(b, h, t, d)


def mixture(m: Tiny, x: Tensor, ids: Tensor) -> Tensor:
    """Experts chosen token by token, batch and sequence flattened."""
    flat = x.reshape(-1, D)
    weight, chosen = torch.softmax(flat[:, :4], -1).topk(2, -1)
    tokens = flat.repeat_interleave(2, 0)
    experts = m.up.weight.view(2, D, D).repeat(2, 1, 1)[chosen.reshape(-1)]
    out = torch.bmm(experts, tokens.unsqueeze(-1)).squeeze(-1) * weight.reshape(-1, 1)
    return x + out.view(-1, 2, D).sum(1).view(x.shape)


def within(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT, -1) @ x


def talk(scores: Tensor) -> Tensor:
    """Mixes heads."""
    return torch.einsum("bhij,hg->bgij", scores, torch.tensor([[0.5, 0.5], [0.2, 0.8]]))


def log_n(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(m, q * torch.log(torch.arange(1, q.shape[2] + 1) + 1.0)[:, None], k, v)


def log_total(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(m, q * torch.log(torch.ones(q.shape[2]).sum() + 1.0), k, v)


REFUSED: dict[str, dict[str, Step]] = {
    "shift by two and one cut off": mix(lambda x: F.pad(x[:, :-1], (0, 0, 2, 0))[:, 1:]),
    "shift by slice of ones": mix(lambda x: F.pad(x[:, :-1], (0, 0, 1, 0), value=1.0)),
    "shift by cat of ones": mix(lambda x: torch.cat([torch.ones_like(x[:, :1]), x[:, :-1]], 1)),
    "shift back": mix(lambda x: F.pad(x, (0, 0, -1, 1))),
    "convolution": {"mix": lambda m, x, ids: x + m.conv(x.transpose(1, 2))[..., 1:-1].transpose(1, 2)},
    "shift by roll": mix(lambda x: x.roll(1, 1)),
    "cumsum": mix(lambda x: x.cumsum(1)),
    "cummax": mix(lambda x: x.cummax(1).values),
    "mean over time": mix(lambda x: x.mean(1, keepdim=True)),
    "max over time": mix(lambda x: x.max(1, keepdim=True).values),
    "norm over time": mix(lambda x: x / x.norm(dim=1, keepdim=True)),
    "vector norm over time": mix(lambda x: x / torch.linalg.vector_norm(x, 2, (1,), True)),
    "variance over everything": mix(lambda x: x / x.var()),
    "layer norm over time": mix(lambda x: F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2)),
    "group norm": mix(lambda x: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)),
    "softmax over time": mix(lambda x: torch.softmax(x, 1)),
    "length as a number": mix(lambda x: x / x.shape[1]),
    "root of the length": mix(lambda x: x * x.shape[1] ** -0.5),
    "batch as a number": mix(lambda x: x * x.shape[0]),
    "length as a tensor": mix(lambda x: x * torch.ones(x.shape[1]).sum()),
    "positions from tokens": with_ids(lambda x, ids: x + (ids != 1).long().cumsum(1)[..., None]),
    "future token": with_ids(lambda x, ids: x + F.pad(ids[:, 1:], (0, 1))[..., None]),
    "last token": with_ids(lambda x, ids: x + ids[:, -1:, None]),
    "first row": mix(lambda x: x[:, :1].expand(-1, x.shape[1], -1)),
    "first row by broadcast": mix(lambda x: x[:, :1]),
    "first row by select": mix(lambda x: x.select(1, 0)[:, None]),
    "flip": mix(lambda x: x.flip(1)),
    "sort": mix(lambda x: x.sort(1).values),
    "topk": mix(lambda x: x.topk(1, 1).values),
    "gather by time": mix(lambda x: x.gather(1, torch.zeros_like(x, dtype=torch.int64))),
    "index by position": mix(lambda x: x[:, torch.arange(x.shape[1]) // 2]),
    "index reversed": mix(lambda x: x[:, x.shape[1] - 1 - torch.arange(x.shape[1])]),
    "index by token": with_ids(lambda x, ids: x + x[torch.arange(x.shape[0])[:, None], ids % x.shape[1]]),
    "pairs of rows": mix(lambda x: F.pad(x, (0, 0, 0, x.shape[1])).view(x.shape[0], x.shape[1], 2 * D)[..., :D]),
    "reshape for transpose": mix(lambda x: x.reshape(x.shape[0], D, x.shape[1]).transpose(1, 2)),
    "batch and time swapped": mix(lambda x: x.reshape(x.shape[1], x.shape[0], D).transpose(0, 1)),
    "mean over batch": mix(lambda x: x.mean(0, keepdim=True)),
    "batch attention": mix(lambda x: (x.transpose(0, 1) @ x.permute(1, 2, 0) @ x.transpose(0, 1)).transpose(0, 1)),
    "batch flip": mix(lambda x: x.flip(0)),
    "time mixing matrix": mix(lambda x: torch.softmax(torch.ones(x.shape[1], x.shape[1]).tril(), -1) @ x),
    "fft": mix(lambda x: torch.fft.fft(x, dim=1).real),
    "repeat over time": mix(lambda x: x.repeat(1, 2, 1)[:, : x.shape[1]]),
    "dropout": mix(lambda x: F.dropout(x, 0.5, training=True)),
    "noise": mix(lambda x: x + torch.randn_like(x)),
    "gram of rows": mix(lambda x: torch.tanh(x @ x.transpose(1, 2)) @ x),
    "time as features": mix(lambda x: (x.transpose(1, 2) @ x).mean(1, keepdim=True)),
    "logits of the last row": {"logits": lambda m, x, ids: x[:, -1:].expand(-1, x.shape[1], -1)},
    "no mask": attention(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v)),
    "mask one ahead": attention(masked(one_ahead)),
    "block causal": attention(masked(block_causal)),
    "prefix": attention(masked(prefix)),
    "transposed mask": attention(masked(lambda n: causal(n).T)),
    "own position hidden": attention(masked(
        lambda n: causal(n) & ~torch.eye(n, dtype=torch.bool) | (torch.arange(n) == 0))),
    "weak mask": attention(masked(lambda n: torch.where(causal(n), 0.0, -5.0))),
    "mask by columns": attention(masked(lambda n: (torch.arange(n) < 5)[None])),
    "time first": attention(time_first),
    "rolled keys": attention(lambda m, q, k, v: attend(m, q, k.roll(1, 2), v)),
    "flipped values": attention(lambda m, q, k, v: attend(m, q, k, v.flip(2))),
    "shifted query": attention(lambda m, q, k, v: attend(m, F.pad(q[:, :, 1:], (0, 0, 0, 1)), k, v)),
    "keys as rows": attention(written(
        lambda s, sees: torch.softmax(bias(s.transpose(-1, -2), sees), -1).transpose(-1, -2))),
    "scores from the keys' side": attention(lambda m, q, k, v: (
        torch.softmax(bias((k @ q.mT).mT, causal(q.shape[2])), -1) @ v)),
    "softmax over queries": attention(written(lambda s, sees: torch.softmax(bias(s, sees), -2))),
    "mask after softmax": attention(written(lambda s, sees: torch.softmax(s, -1) * sees)),
    "mask before soft-cap": attention(written(lambda s, sees: torch.softmax(20 * torch.tanh(bias(s, sees) / 20), -1))),
    "mask then clamp": attention(written(lambda s, sees: torch.softmax(bias(s, sees).clamp(min=-3.0), -1))),
    "mask then relu": attention(written(lambda s, sees: torch.softmax(bias(s, sees).relu(), -1))),
    "mask times zero": attention(written(lambda s, sees: torch.softmax(bias(s, sees) * 0.0, -1))),
    "mask negated": attention(written(lambda s, sees: torch.softmax(-bias(s, sees), -1))),
    "mask undone": attention(written(lambda s, sees: torch.softmax(bias(s, sees) - bias(torch.zeros(()), sees), -1))),
    "probabilities plus one": attention(written(lambda s, sees: torch.softmax(bias(s, sees), -1) + 1.0)),
    "probabilities filled": attention(written(
        lambda s, sees: torch.softmax(bias(s, sees), -1).masked_fill(~sees, 0.1))),
    "mean over columns": attention(written(
        lambda s, sees: torch.softmax(bias(s, sees), -1) - (s * sees).mean(-1, True))),
    "argmax over columns": attention(written(
        lambda s, sees: torch.softmax(bias(s, sees), -1) * bias(s, sees).max(-1, keepdim=True).indices)),
    "count of columns": attention(written(lambda s, sees: torch.softmax(bias(s, sees), -1) * (s > 0).sum(-1, True))),
    "scores of tokens masked by key": attention(written(
        lambda s, sees: torch.softmax(bias(s, sees), -1) * (s.diagonal(dim1=-2, dim2=-1) > 0)[..., None, :])),
    "dynamic rotary scaling": attention(lambda m, q, k, v: attend(
        m, rope(q, dynamic_scale(q.shape[2])), rope(k, dynamic_scale(q.shape[2])), v)),
    "positions from the end": attention(lambda m, q, k, v: attend(
        m, q * torch.arange(q.shape[2]).flip(0)[:, None], k, v)),
    "scale by total length": attention(log_total),
    "softmax by hand": attention(written(
        lambda s, sees: normalized(torch.exp(bias(s, sees) - bias(s, sees).amax(-1, True))))),
    "sigmoid attention": attention(written(lambda s, sees: torch.sigmoid(bias(s, sees)))),
    "linear attention": attention(written(lambda s, sees: s * sees)),
    "talking heads before softmax": attention(written(lambda s, sees: torch.softmax(bias(talk(s), sees), -1))),
    "mask on probabilities too": attention(written(
        lambda s, sees: normalized(torch.softmax(bias(s, sees), -1) * sees))),
}  # fmt: skip

EXACT: dict[str, dict[str, Step]] = {
    "plain": {},
    "feature shift": mix(lambda x: torch.cat([x[..., 1:], x[..., :1]], -1)),
    "norms of rows": mix(lambda x: x / x.norm(dim=-1, keepdim=True)),
    "feature cumsum": mix(lambda x: x.cumsum(-1)),
    "flattened batch": mix(lambda x: F.gelu(x.reshape(-1, D)).view(x.shape)),
    "time first in memory": mix(lambda x: F.gelu(x.transpose(0, 1).contiguous()).transpose(0, 1)),
    "row position": mix(lambda x: x * torch.arange(1, x.shape[1] + 1)[:, None]),
    "position as feature": {"mix": lambda m, x, ids: x + torch.cat(
        [x[..., 1:], (torch.arange(x.shape[1]) / 9.0)[None, :, None].expand(x.shape[0], -1, -1)], -1)},
    "token embedding again": {"mix": lambda m, x, ids: x + m.embedding(ids)},
    "pad token": with_ids(lambda x, ids: torch.where((ids == 1)[..., None], 0.0, x)),
    "matrix from the left": {"mix": lambda m, x, ids: x + (m.out.weight @ x.transpose(1, 2)).transpose(1, 2)},
    "attention within a row": mix(lambda x: within(x.unflatten(-1, (4, 4))).flatten(-2)),
    "mixture of experts": {"mix": mixture},
    "boolean mask": attention(masked(causal)),
    "float mask": attention(masked(lambda n: torch.where(causal(n), 0.0, LOW))),
    "infinite mask": attention(masked(lambda n: torch.where(causal(n), 0.0, -math.inf))),
    "mask by head": attention(masked(two_heads)),
    "biased mask": attention(masked(lambda n: torch.where(causal(n), torch.arange(n) * 0.1, LOW))),
    "chunked": attention(masked(lambda n: causal(n) & (torch.arange(n)[None] // 4 == torch.arange(n)[:, None] // 4))),
    "shift by slice": mix(lambda x: F.pad(x[:, :-1], (0, 0, 1, 0))),
    "shift by cat": mix(lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)),
    "causal convolution": {"mix": lambda m, x, ids: x + m.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)},
    "shift by padding": mix(lambda x: F.pad(x, (0, 0, 1, -1))),
    "shift of channels and rows": mix(lambda x: F.pad(x.transpose(1, 2), (1, -1)).transpose(1, 2)),
    "window": attention(masked(lambda n: causal(n) & (torch.arange(n)[None] > torch.arange(n)[:, None] - 3))),
    "dilated": attention(masked(lambda n: causal(n) & ((torch.arange(n)[:, None] - torch.arange(n)[None]) % 2 == 0))),
    "first columns kept": attention(masked(
        lambda n: causal(n) & ((torch.arange(n)[None] > torch.arange(n)[:, None] - 3) | (torch.arange(n) < 2)[None]))),
    "written bias": attention(written(lambda s, sees: torch.softmax(bias(s, sees), -1))),
    "written where": attention(written(lambda s, sees: torch.softmax(torch.where(sees, s, torch.full((), LOW)), -1))),
    "written fill": attention(written(lambda s, sees: torch.softmax(s.masked_fill(~sees, -math.inf), -1))),
    "written product": attention(written(lambda s, sees: torch.softmax(s - 1e9 * (1 - sees.float()), -1))),
    "mask clamped at the lowest": attention(written(
        lambda s, sees: torch.softmax(torch.max(bias(s, sees), torch.tensor(LOW)), -1))),
    "two masks": attention(written(
        lambda s, sees: torch.softmax(bias(s.masked_fill(~window(sees.shape[0]), LOW), sees), -1))),
    "soft-cap": attention(written(lambda s, sees: torch.softmax(bias(5 * torch.tanh(s / 5), sees), -1))),
    "sinks": attention(written(sinks)),
    "flattened heads": attention(flat_heads),
    "memory that some rows do not see": attention(remembering),
    "rotary": attention(lambda m, q, k, v: attend(m, rope(q), rope(k), v)),
    "rotary scaled": attention(lambda m, q, k, v: attend(m, rope(q, 4.0), rope(k, 4.0), v)),
    "log-length scale of each row": attention(log_n),
    "keys and values swapped": attention(lambda m, q, k, v: attend(m, q, v, k)),
    "one head of keys": attention(lambda m, q, k, v: attend(m, q, k[:, :1].expand(-1, H, -1, -1), v)),
    "repeated heads": attention(
        lambda m, q, k, v: attend(m, q, k[:, :1].repeat_interleave(H, 1), v[:, 1:].repeat(1, H, 1, 1))),
}  # fmt: skip
CASES = [(name, "refused", c) for name, c in REFUSED.items()] + [(name, "exact", c) for name, c in EXACT.items()]
