"""A raster autoregressive image model whose s x s neighbouring ids travel as one row: Token-Shuffle (2504.17789).

An image of side x side ids is (side / s)**2 rows of W = s * s ids: blocks in raster order, raster order inside a block.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.errors import UsageError
from aropt.models.digits import Block, RMSNorm

Layout = Literal["compress", "concat"]


@dataclass(frozen=True)
class Shape:
    """What a ShuffleAR is built of; the defaults are digits-ar's backbone with windows of 2 x 2.

    side: ids along an edge; window: s; levels: values of an image id; classes: of the condition.
    width, layers, heads, hidden: of the backbone; blocks: residual MLP blocks on each side of it; mixing: their width.
    layout: "compress" narrows each id's embedding to width / W, then concatenates; "concat" concatenates, then reduces.
    """

    side: int = 8
    window: int = 2
    levels: int = 17
    classes: int = 10
    width: int = 128
    layers: int = 4
    heads: int = 4
    hidden: int = 352
    blocks: int = 1
    mixing: int = 256
    layout: Layout = "compress"

    def check(self) -> None:
        """Raises UsageError where the window does not divide the side, or its ids the width."""
        if self.window < 1 or self.side % self.window:
            raise UsageError(
                what=f"a window of {self.window} does not divide an image of side {self.side}",
                where="window",
                why="the image is cut into whole windows",
                hint=f"take one of {', '.join(str(s) for s in range(1, self.side + 1) if self.side % s == 0)}",
            )
        if self.layout not in ("compress", "concat"):
            raise UsageError(what=f"there is no layout {self.layout!r}", where="layout", hint="take compress or concat")
        if self.layout == "compress" and self.width % self.window**2:
            raise UsageError(
                what=f"a width of {self.width} can't be shared by the {self.window**2} ids of a window",
                where="width",
                why="layout compress gives each id an equal part of the width",
                hint="take layout concat or another width",
            )


def rows(pixels: Tensor, side: int, window: int) -> Tensor:
    """Ids int64 [B, side * side] in raster order as int64 [B, (side / window)**2, window**2], a row each block."""
    across = side // window
    cut = pixels.view(-1, across, window, across, window)
    return cut.transpose(2, 3).reshape(-1, across * across, window * window)


def raster(ids: Tensor, side: int, window: int) -> Tensor:
    """The inverse of `rows`: int64 [B, (side / window)**2, window**2] to int64 [B, side * side]."""
    across = side // window
    return ids.view(-1, across, across, window, window).transpose(2, 3).reshape(-1, side * side)


def image(tokens: Sequence[int] | npt.NDArray[np.int64], side: int = 8, window: int = 2) -> npt.NDArray[np.int64]:
    """The picture int64 [side, side] of side * side ids in the order of generation; a leading class id is dropped.

    Raises ValueError where there are fewer.
    """
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)[-side * side :]
    if len(ids) != side * side:
        raise ValueError(f"expected {side * side} ids of an image, got {len(ids)}")
    return raster(torch.from_numpy(ids), side, window).view(side, side).numpy()


class MLP(nn.Module):
    """Pre-norm residual MLP: float32 [.., width] to the same shape."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm = RMSNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.down(F.silu(self.up(self.norm(x))))
        return x + (F.dropout(mixed, self.dropout) if self.training else mixed)


class Shuffle(nn.Module):
    """Embeddings float32 [B, T, W, d] -> rows [B, T, d]; an id that stands alone keeps its own. Of any width."""

    def __init__(self, width: int, unit: int, single: int, blocks: int) -> None:
        super().__init__()
        self.single, self.compress = single, nn.Linear(width, -(-width // unit), bias=False)
        self.join = nn.Linear(unit * -(-width // unit), width, bias=False) if width % unit else nn.Identity()
        self.mix = nn.Sequential(*(MLP(width, 2 * width, 0.0) for _ in range(blocks)))

    def forward(self, known: Tensor, ids: Tensor) -> Tensor:
        fused = self.join(self.compress(known).flatten(2))
        rows: Tensor = self.mix(torch.where(ids[..., :1] >= self.single, known[:, :, 0], fused))
        return rows


class Unshuffle(nn.Module):
    """Rows float32 [B, T, d] -> [B, T, W, d]: what the head reads of each id."""

    def __init__(self, width: int, unit: int, blocks: int) -> None:
        super().__init__()
        part = -(-width // unit)
        self.unit, self.mix = unit, nn.Sequential(*(MLP(width, 2 * width, 0.0) for _ in range(blocks)))
        self.expand, self.lift = nn.Linear(width, unit * part, bias=False), nn.Linear(part, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.lift(self.expand(self.mix(x)).unflatten(2, (self.unit, -1)))
        return parts


class ShuffleAR(nn.Module):
    """Predicts each window of an image from its class and the windows before it, its ids independent of each other."""

    guidance_free = False  # True of weights whose own distribution is what guidance would make of it

    def __init__(self, shape: Shape | None = None, dropout: float = 0.0) -> None:
        """Raises UsageError for shapes that can't be (Shape.check)."""
        super().__init__()
        self.shape = shape = shape or Shape()
        shape.check()
        self.side, self.window = shape.side, shape.window
        self.unit = shape.window**2
        self.single = shape.levels
        self.null = shape.levels + shape.classes
        self.input_vocab = self.null + 1
        self.across = shape.side // shape.window
        self.capacity = self.across**2
        self.prompts = [[shape.levels + label] for label in range(shape.classes)]
        width, ids = shape.width, self.unit
        self.token = nn.Embedding(self.input_vocab, width)
        self.row = nn.Embedding(self.across, width)
        self.column = nn.Embedding(self.across, width)
        if shape.layout == "compress":
            self.compress = nn.Linear(width, width // ids, bias=False)
            self.expand = nn.Linear(width, width, bias=False)
            self.lift = nn.Linear(width // ids, width, bias=False)
        else:
            self.compress = nn.Linear(ids * width, width, bias=False)
            self.expand = nn.Linear(width, ids * width, bias=False)
        self.mix = nn.ModuleList(MLP(width, shape.mixing, dropout) for _ in range(shape.blocks))
        self.blocks = nn.ModuleList(Block(width, shape.heads, shape.hidden, dropout) for _ in range(shape.layers))
        self.norm = RMSNorm(width)
        self.unmix = nn.ModuleList(MLP(width, shape.mixing, dropout) for _ in range(shape.blocks))
        self.head = nn.Linear(width, shape.levels, bias=False)
        self.reset()

    def reset(self) -> None:
        """Draws the weights anew."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Smaller where a block writes to the residual stream, so that depth does not grow its variance.
                deep = name.endswith(("out.weight", "down.weight"))
                std = 0.02 * (2 * max(1, self.shape.layers)) ** -0.5 if deep else 0.02
                if name.startswith(("compress.", "expand.", "lift.")):
                    std = parameter.shape[1] ** -0.5  # what passes through keeps its scale
                nn.init.normal_(parameter, std=std)

    def twin(self, window: int) -> ShuffleAR:
        """A model of the same shape with another window, its weights random. Raises UsageError as Shape.check does."""
        return ShuffleAR(replace(self.shape, window=window)).eval()

    def fuse(self, ids: Tensor) -> Tensor:
        """Ids int64 [B, T, W] to rows float32 [B, T, width]; a class id fills a row and keeps its full width."""
        fused: Tensor
        known = self.token(ids)
        if self.shape.layout == "compress":
            fused = self.compress(known).flatten(2)
        else:
            fused = self.compress(known.flatten(2))
        fused = torch.where(ids[..., :1] >= self.single, known[:, :, 0], fused)
        for block in self.mix:
            fused = block(fused)
        return fused

    def split(self, x: Tensor) -> Tensor:
        """Rows float32 [B, T, width] to logits float32 [B, T, W, levels]."""
        for block in self.unmix:
            x = block(x)
        parts = self.expand(x).unflatten(2, (self.unit, -1))
        logits: Tensor = self.head(self.lift(parts) if self.shape.layout == "compress" else parts)
        return logits

    def forward(self, ids: Tensor) -> Tensor:
        """ids int64 [B, T, W] with 1 <= T <= capacity to logits float32 [B, T, W, levels]; row t predicts window t.

        The first row holds a class id (levels + class, or `null`) W times, the others the windows so far.
        """
        # Positions are those of the window to predict, not of the one read.
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.fuse(ids) + self.row(position // self.across) + self.column(position % self.across)
        for block in self.blocks:
            x = block(x)
        return self.split(self.norm(x))


def save(model: ShuffleAR, path: Path) -> None:
    """Write weights (bfloat16), shape and whether they are guidance-free as safetensors."""
    from safetensors.torch import save_file

    weights = {name: value.bfloat16().contiguous() for name, value in model.state_dict().items()}
    described = {"shape": json.dumps(asdict(model.shape)), "guidance_free": str(model.guidance_free)}
    save_file(weights, path, metadata=described)
    path.chmod(0o644)  # the writer leaves it unreadable to other users


def load(path: Path) -> ShuffleAR:
    """The model saved at path, widened to float32."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        described = file.metadata()
        model = ShuffleAR(Shape(**json.loads(described["shape"])))
        model.guidance_free = described["guidance_free"] == "True"
        model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return model
