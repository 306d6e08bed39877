"""Systems of the literature in small: one a file, with a check that measures what it claims.

A recipe is a file of this folder, named as the system, that holds `RECIPE`; files whose names begin with an underscore
are none. What was measured is in `results.json`, from which `docs/systems.md` is written (`python -m aropt.recipes`).
Checkpoints are safetensors of at most 1 MB, in bfloat16, and are made by the recipe's own training.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aropt.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

M = TypeVar("M", bound="nn.Module")

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"
Say = Callable[[str], None]  # takes a line of progress


@dataclass(frozen=True)
class Row:
    """A claim, and what was found: in words and figures, on `n` things of a kind."""

    claim: str
    measured: str
    n: int
    of: str
    holds: bool


@dataclass(frozen=True)
class Recipe:
    """A system. `check(say, quick)` measures it, on fewer examples if quick, and yields a row for each claim."""

    title: str
    paper: str
    """Authors, year, number of arXiv."""
    runs: str
    """What aropt compiles of the system, and what it does not."""
    proxy: str
    """What stands for the paper's models and data."""
    check: Callable[[Say, bool], Iterator[Row]]
    train: Callable[[], nn.Module] | None = None
    """Makes the checkpoint, where the recipe has one of its own."""


def names() -> list[str]:
    """All recipes; nothing is imported."""
    files = (module.name for module in pkgutil.iter_modules([str(FOLDER)]))
    return sorted(file.replace("_", "-") for file in files if not file.startswith("_"))


def recipe(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError for an unknown one."""
    if name not in names():
        raise UsageError(what=f"unknown recipe '{name}'", hint=f"aropt recipes lists them: {', '.join(names())}")
    found: Recipe = import_module(f"aropt.recipes.{name.replace('-', '_')}").RECIPE
    return found


def checkpoint(name: str) -> Path:
    return FOLDER / "checkpoints" / f"{name}.safetensors"


def trained(name: str, model: M) -> M:
    """The model with the weights of the recipe's checkpoint, in float32."""
    from safetensors.torch import load_file

    model.load_state_dict({n: v.float() for n, v in load_file(checkpoint(name)).items()})
    return model.eval().requires_grad_(False)


def results() -> dict[str, dict[str, Any]]:
    """What was measured: {name: {"versions": {package: version}, "rows": [the fields of each Row]}}."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    return found
