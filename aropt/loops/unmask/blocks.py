"""Blocks of a canvas: where its rows stand, and which block each sequence is at."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = 2**20  # a block that no canvas reaches


def places(canvas: Tensor, lengths: Tensor) -> Tensor:
    """The position of each row, counted from the first id; negative in padding: int64 [B, T]."""
    return torch.arange(canvas.shape[1]) - (canvas.shape[1] - lengths.unsqueeze(1))


def block_of(at: Tensor, origin: Tensor, block: Tensor) -> Tensor:
    """The block of each row; rows before the first count to it: int64 [B, T]."""
    return torch.div((at - origin.unsqueeze(1)).clamp(min=0), block, rounding_mode="floor")


def current_block(tokens: Tensor, lengths: Tensor, origin: Tensor, block: Tensor, mask: int) -> tuple[Tensor, Tensor]:
    """The first block with masks of each canvas, int64 [B] (FAR: none), and its masked rows, bool [B, T]."""
    at = places(tokens, lengths)
    masked = (tokens == mask) & (at >= 0)
    index = block_of(at, origin, block)
    current = torch.where(masked, index, FAR).amin(1)
    return masked & (index == current.unsqueeze(1)), current
