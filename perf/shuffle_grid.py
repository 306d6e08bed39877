"""Draws digits of windows 1, 2 and 4 below each other: python -m perf.shuffle_grid [--guidance 2] [-o FILE]."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from aropt.models import load, train_digits

NAMES = {
    "digits-ar": "window 1, 64 steps",
    "digits-shuffle2": "window 2, 16 steps",
    "digits-shuffle4": "window 4, 4 steps",
}
EACH, SCALE, SIDE, SEED = 2, 4, 8, 0  # rows of a model, pixels of a pixel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent.parent / "docs" / "digits.png")
    args = parser.parse_args()
    labels = torch.arange(10).repeat_interleave(2).repeat(EACH)
    panels = []
    for name, title in NAMES.items():
        drawn = train_digits.sample(load(name), labels, args.guidance, torch.Generator().manual_seed(SEED))
        panels.append(panel(drawn.view(EACH, -1, SIDE, SIDE).numpy(), f"{title} ({name})"))
    Image.fromarray(np.concatenate(panels)).save(args.out, optimize=True)


def panel(pictures: np.ndarray, title: str) -> np.ndarray:
    """Pictures [rows, columns, 8, 8] of levels 0..16 under a title: uint8 [height, width]."""
    framed = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=4)
    sheet = framed.swapaxes(1, 2).reshape(framed.shape[0] * framed.shape[2], -1)
    grey = (sheet * 255 // 16).astype(np.uint8).repeat(SCALE, 0).repeat(SCALE, 1)
    head = Image.new("L", (grey.shape[1], 14), 255)
    ImageDraw.Draw(head).text((2, 1), title, fill=0)
    return np.concatenate([np.array(head), grey])


if __name__ == "__main__":
    main()
