"""A model whose linear layers are wide enough for groups of eight bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import aropt
from aropt.ir.program import Program

WIDTH, VOCAB, CAPACITY = 64, 19, 24


class Layer(nn.Module):
    """Attention of two heads and a gated part, linear layers with a bias and without."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out, self.gate, self.up = (nn.Linear(WIDTH, n, bias=True) for n in (WIDTH, 96, 96))
        self.down = nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))
        h = F.rms_norm(x, (WIDTH,))
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    """ids [B, T] -> logits [B, T, VOCAB]; the small head stays as it is."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(VOCAB, WIDTH), nn.ModuleList(Layer(causal) for _ in range(2))
        self.head = nn.Linear(WIDTH, 15, bias=False)
        self.rest = nn.Linear(WIDTH, 4, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return torch.cat([self.head(x), self.rest(x)], -1)


@cache
def plain() -> Program:
    torch.manual_seed(0)
    return aropt.capture(Model().eval(), capacity=CAPACITY, vocab=VOCAB, prompts=[[1, 2, 3], [4, 5]])
