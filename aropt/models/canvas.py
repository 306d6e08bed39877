"""text-mdlm and text-bd: byte-level masked diffusion models of the same text as text-ar.

A canvas is a sequence of ids of which some are MASK; row i of the logits predicts id i. text-mdlm sees the whole canvas
from every row (LLaDA, Nie et al. 2025); text-bd sees its own block and the blocks before it (BD3-LM, Arriola et al.
2025). The layers are those of LLaDA: RMS norm, rotary positions, SwiGLU, no biases. Ids are those of text-ar, with MASK
in the place of "unknown", which bytes never need.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.models.digits import RMSNorm
from aropt.models.text import UNKNOWN, VOCAB

MASK = UNKNOWN
CAPACITY = 512
BLOCK = 16  # of text-bd
BASE = 10000.0  # of the rotary angles


class Layer(nn.Module):
    """Pre-norm attention and a pre-norm SwiGLU: float32 [B, T, width] to the same shape."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.feed_norm = RMSNorm(width), RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        (b, t, width), y = x.shape, self.attention_norm(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v, attn_mask=mask)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, width))
        y = self.feed_norm(x)
        fed: Tensor = self.down(F.silu(self.gate(y)) * self.up(y))
        return x + fed


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D], cos and sin [T, D/2]; feature i is paired with i + D/2."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class CanvasLM(nn.Module):
    """Predicts every masked id of a canvas from the others. `block`: 0 sees everything, else block-causal."""

    cos: Tensor
    sin: Tensor

    def __init__(self, block: int = 0, width: int = 192, layers: int = 4, heads: int = 6, hidden: int = 512) -> None:
        super().__init__()
        self.block = block
        self.embed = nn.Embedding(VOCAB, width)
        self.layers = nn.ModuleList(Layer(width, heads, hidden) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        half = width // heads // 2
        angles = torch.arange(CAPACITY)[:, None] / BASE ** (torch.arange(half) / half)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Smaller where a layer writes to the residual stream, so that depth does not grow its variance.
                scale = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] with 1 <= T <= 512 to logits float32 [B, T, 260], whose row t predicts id t."""
        t = ids.shape[1]
        rows = torch.arange(t, device=ids.device)
        mask = rows[:, None] // self.block >= rows // self.block if self.block else None
        return self.run(ids, self.cos[:t], self.sin[:t], mask)

    def run(self, ids: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """The forward with given angles [T, D/2] and what each row sees, bool [T, T] (None: everything)."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def denoise(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Logits [B, T, 260] of a noisy canvas, each of whose blocks sees itself and the clean blocks before it.

        Both in one forward of 2T rows (BD3-LM, section 3.3); without blocks the clean canvas is not looked at.
        """
        if not self.block:
            return self.forward(noisy)
        t = noisy.shape[1]
        rows = torch.arange(2 * t, device=noisy.device)
        block, is_clean = (rows % t) // self.block, rows >= t
        own = (block[:, None] == block) & (is_clean[:, None] == is_clean)
        mask = own | (is_clean & (block[:, None] > block))
        cos, sin = self.cos[:t].repeat(2, 1), self.sin[:t].repeat(2, 1)
        return self.run(torch.cat([noisy, clean], 1), cos, sin, mask)[:, :t]


class CausalLM(CanvasLM):
    """Row t of the logits predicts id t + 1; rows of blocks beside the text may see each other."""

    capacity = CAPACITY

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] with 1 <= T <= 512 to logits float32 [B, T, 260]."""
        return self.active(ids, ids.shape[1])

    def active(self, ids: Tensor, start: int) -> Tensor:
        """The same, where the rows from `start` on see each other."""
        t = ids.shape[1]
        rows = torch.arange(t, device=ids.device)
        return self.run(ids, self.cos[:t], self.sin[:t], (rows[:, None] >= rows) | (rows[:, None] >= start))

    def beside(self, clean: Tensor, noisy: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """Logits [B, T, 260] of a text and of blocks of a noisy one; T is a multiple of the block.

        Of 2T rows the first half is the text, causal. A row of the second sees its own block and the text before it.
        """
        t = clean.shape[1]
        rows = torch.arange(t, device=clean.device)
        blocks, causal = rows // block, rows[:, None] >= rows
        own, before = blocks[:, None] == blocks, blocks[:, None] > blocks
        mask = torch.cat([torch.cat([causal, torch.zeros_like(causal)], 1), torch.cat([before, own], 1)])
        cos, sin = self.cos[:t].repeat(2, 1), self.sin[:t].repeat(2, 1)
        logits = self.run(torch.cat([clean, noisy], 1), cos, sin, mask)
        return logits[:, :t], logits[:, t:]


def load(path: Path, block: int) -> CanvasLM:
    """The model saved at path (safetensors, bfloat16), widened to float32."""
    from safetensors.torch import load_file

    model = CanvasLM(block)
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model
