"""Small plain programs of each kind of loop, made once."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aropt
from aropt.ir.program import Program
from aropt.models.canvas import MASK, VOCAB, CanvasLM
from aropt.models.shuffle import Shape, ShuffleAR
from tests.conftest import make_program

LEVELS = 5


class Judge(nn.Module):
    """A causal model over a canvas's ids, to guide it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.capacity, self.vocab = 16, VOCAB
        self.embed, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, VOCAB)
        self.embed.weight.data *= 3

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)[:, None]
        logits: Tensor = self.head((x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0])
        return logits


class Written(nn.Module):
    """A layer as people write it out: a norm, heads that are repeated, and wide enough for groups of eight bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.capacity, self.vocab = 16, 9
        self.embed, self.head, self.out = nn.Embedding(9, 32), nn.Linear(32, 9), nn.Linear(32, 32, bias=False)
        self.query, self.key, self.value = (nn.Linear(32, n, bias=False) for n in (32, 16, 16))
        self.scale = nn.Parameter(torch.rand(32))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        b, t, _ = x.shape
        q, k, v = (p(y).view(b, t, -1, 16).transpose(1, 2) for p in (self.query, self.key, self.value))
        k, v = (z[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, 2, t, 16) for z in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, 32)
        logits: Tensor = self.head(x + self.out(mixed))
        return logits


@cache
def text(*rules: str) -> Program:
    """One id after the other."""
    return make_program(1, rules)


@cache
def written() -> Program:
    """The same, of a model that is written out."""
    return aropt.capture(Written().eval(), prompts=[[1, 2, 1, 2], [3]])


@cache
def canvas(*rules: str, block: int = 0, guided: bool = False) -> Program:
    """A canvas; `block`: its rows see their block and those before it alone."""
    torch.manual_seed(1)
    model = CanvasLM(block, width=32, layers=1, heads=2, hidden=16).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # else all logits are about alike
    model.capacity = 16  # type: ignore[assignment]
    return aropt.capture(model, mask=MASK, rules=rules, guide=Judge() if guided else None)


@cache
def image(*rules: str) -> Program:
    """Windows of 2 x 2 ids."""
    torch.manual_seed(0)
    shape = Shape(side=4, levels=LEVELS, classes=3, width=16, layers=1, heads=2, hidden=16, blocks=0)
    return aropt.capture(ShuffleAR(shape), rules=rules)


@cache
def raster(*rules: str) -> Program:
    """An image, one id after the other."""
    program = text(*rules)
    return program.replace(meta={**program.meta, "side": 4, "modality": "image"})
