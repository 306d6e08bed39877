"""A tiny model of rows of several ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from aropt.models.digits import Block, RMSNorm

W, LEVELS, ROWS = 4, 5, 6


class Windows(nn.Module):
    """A tiny image model: rows of four ids, or of a class (ids 5 to 7) alone."""

    unit, single, input_vocab, null, capacity, prompts = W, LEVELS, LEVELS + 3, LEVELS + 2, ROWS, ([LEVELS],)

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.small = nn.Embedding(self.input_vocab, width), nn.Linear(width, width // W)
        self.place = nn.Embedding(ROWS, width)
        self.blocks = nn.ModuleList(Block(width, 2, 24, 0.0) for _ in range(2))
        self.norm, self.grow, self.head = RMSNorm(width), nn.Linear(width, width), nn.Linear(width // W, LEVELS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = torch.where(ids[..., :1] >= self.single, x[:, :, 0], self.small(x).flatten(2))
        x = x + self.place(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.grow(self.norm(x)).unflatten(-1, (W, -1))) * 6
        return logits
