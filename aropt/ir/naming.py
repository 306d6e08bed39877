"""Names of weights: words joined by dots, which the verifier asks for and every target takes."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

WEIGHT = re.compile(r"\w+(\.\w+)*", re.ASCII)


def weight_name(text: str, value: Tensor, weights: Mapping[str, Tensor]) -> str:
    """The text as the name of a weight with that value, numbered where `weights` has another value of that name."""
    words = [re.sub(r"\W", "_", word, flags=re.ASCII) for word in text.split(".")]
    first = name = ".".join(word or "_" for word in words)
    count = 1
    while name in weights and not equal(weights[name], value):
        count += 1
        name = f"{first}_{count}"
    return name


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights hold the same bits, as far as == tells."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b))
