"""digits-ar: a class-conditional raster autoregressive model of scikit-learn's 8x8 digit images.

An image is 64 pixels of 17 grey levels (0 paper, 16 ink), in raster order.  The model reads the class token followed
by the pixels so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8
CAPACITY = SIDE * SIDE
LEVELS = 17
CLASSES = 10
NULL = LEVELS + CLASSES  # "no class": the unconditional half of classifier-free guidance
TOKENS = NULL + 1


def prompt(label: int | None) -> list[int]:
    """The ids that start an image of class label (0..9), or of no class in particular (None)."""
    if label is None:
        return [NULL]
    if not 0 <= label < CLASSES:
        raise ValueError(f"class {label} is not in 0..{CLASSES - 1}")
    return [LEVELS + label]


def image(tokens: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """The uint8 [8, 8] picture, grey levels 0..16, of 64 pixel tokens; a leading class token is dropped."""
    pixels = np.asarray(tokens, dtype=np.int64)[-CAPACITY:]
    if pixels.shape != (CAPACITY,) or pixels.min() < 0 or pixels.max() >= LEVELS:
        raise ValueError(f"expected {CAPACITY} pixel tokens in 0..{LEVELS - 1}, got shape {pixels.shape}: {pixels}")
    return pixels.astype(np.uint8).reshape(SIDE, SIDE)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, eps=1e-6)


class Block(nn.Module):
    """Pre-norm causal attention followed by a pre-norm SwiGLU: float32 [B, T, width] to the same shape."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.norm1 = RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = RMSNorm(width)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def drop(self, x: Tensor) -> Tensor:
        # Not nn.Dropout: that leaves an identity call in every exported graph.
        return F.dropout(x, self.dropout) if self.training else x

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, float32 [B, heads, T, width / heads], of x float32 [B, T, width]."""
        b, t, width = x.shape
        rows: Tensor = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads)
        return rows.permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        return self.mixed(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def mixed(self, x: Tensor, attended: Tensor) -> Tensor:
        """x and what its rows attended to, float32 [B, heads, T, width / heads], through the rest of the block."""
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(x.shape)))
        gate, value = self.up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.drop(self.down(F.silu(gate) * value))


class DigitsAR(nn.Module):
    """Predicts each pixel of an image from its class and the pixels before it in raster order."""

    input_vocab, null, side = TOKENS, NULL, SIDE
    guidance_free = False  # True of weights whose own distribution is what guidance would make of it

    def __init__(
        self, width: int = 128, layers: int = 4, heads: int = 4, hidden: int = 352, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, width)
        self.row = nn.Embedding(SIDE, width)
        self.column = nn.Embedding(SIDE, width)
        self.blocks = nn.ModuleList(Block(width, heads, hidden, dropout) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, LEVELS, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Smaller where a block writes to the residual stream, so that depth does not grow its variance.
                scale = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T] with 1 <= T <= 64 to logits float32 [B, T, 17], whose row t predicts pixel t.

        The first id is a class token, 17 + class or 27 for none; the others are pixels 0..16 in raster order.
        """
        # Positions are those of the pixel to predict, not of the one read.
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.token(ids) + self.row(position // SIDE) + self.column(position % SIDE)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def save(model: DigitsAR, path: Path) -> None:
    """Write the weights (bfloat16) as safetensors, and whether they are guidance-free."""
    from safetensors.torch import save_file

    weights = {name: value.bfloat16() for name, value in model.state_dict().items()}
    save_file(weights, path, metadata={"guidance_free": str(model.guidance_free)})
    path.chmod(0o644)  # the writer leaves it unreadable to other users


def load(path: Path) -> DigitsAR:
    """The model saved at path (safetensors, bfloat16), widened to float32."""
    from safetensors import safe_open

    model = DigitsAR()
    with safe_open(path, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        model.guidance_free = (file.metadata() or {}).get("guidance_free") == "True"
    return model
