"""Pictures of generated image tokens: grey levels in raster order, or in windows (see aropt.ir.units)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aropt.errors import UsageError
from aropt.pipeline.interrupts import held

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FRAME = 64  # grey between pictures
SOFTWARE = "aropt"  # what pictures say of themselves


def pixels(tokens: Sequence[int], meta: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    """The picture [side, side] of so many grey levels; what was not generated is 0.

    Windows come in raster order, and within a window its pixels.
    """
    import numpy as np

    side, window = int(meta.get("side") or 8), int(meta.get("window") or 1)
    given = [t for t in tokens[: side * side] if t >= 0]
    flat = np.zeros(side * side, np.uint8)
    flat[: len(given)] = given
    blocks = flat.reshape(side // window, side // window, window, window)
    return blocks.transpose(0, 2, 1, 3).reshape(side, side)


def grid(pictures: Sequence[npt.NDArray[np.uint8]], columns: int, levels: int) -> npt.NDArray[np.uint8]:
    """All pictures [side, side] in rows of so many, a frame around each: uint8 [height, width], 0 black, 255 white."""
    import numpy as np

    side = pictures[0].shape[0]
    cell, rows = side + 2, -(-len(pictures) // columns)
    sheet = np.full((rows * cell, columns * cell), FRAME, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * cell + 1, i % columns * cell + 1
        sheet[y : y + side, x : x + side] = picture.astype(np.float32) * 255 / (levels - 1)
    return sheet


def layout(text: str | None, count: int) -> tuple[int, int]:
    """Columns and rows of "8x5", or rows of ten. Raises UsageError unless `count` pictures fit."""
    if text is None:
        columns = max(1, min(10, count))
        return columns, -(-count // columns)
    given = [int(part) if part.isdigit() else 0 for part in text.split("x")]
    if len(given) != 2 or min(given) < 1:
        raise UsageError(what=f"'{text}' is no grid", where="--grid", hint="give COLUMNSxROWS, such as 8x5")
    if given[0] * given[1] < count:
        raise UsageError(
            what=f"{count} pictures don't fit a grid of {text}", where="--grid",
            hint=f"ask for {given[0] * given[1]}: -n {given[0] * given[1]}",
        )  # fmt: skip
    return given[0], given[1]


def check_free(path: Path, force: bool) -> None:
    """Raises UsageError where something is there that aropt didn't draw; with `force` any file may be."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_file():
        raise UsageError(what=f"'{path}' is no file", why="aropt follows no link", hint="choose another place: -o FILE")
    if not force and not drawn(path):
        raise UsageError(
            what=f"'{path}' exists", why="aropt didn't draw it",
            hint="choose another place with -o FILE, or overwrite it with --force",
        )  # fmt: skip


def drawn(path: Path) -> bool:
    """Whether the file is a picture that says that aropt drew it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # no picture
        return False


def write(sheet: npt.NDArray[np.uint8], path: Path, force: bool = False, scale: int = 16) -> None:
    """A PNG, each pixel enlarged; there whole or not at all. Raises UsageError where it can't be written."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    size = sheet.shape[1] * scale, sheet.shape[0] * scale
    mark, aside = PngInfo(), path.with_name(f".{os.getpid()}.{path.name}")
    mark.add_text("Software", SOFTWARE)
    try:
        with held():
            try:
                Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(aside, pnginfo=mark)
                check_free(path, force)
                aside.replace(path)
            finally:
                aside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UsageError(
            what=f"can't write '{path}'", why=str(error), hint="choose another place, such as digits.png"
        ) from error
