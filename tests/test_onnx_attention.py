"""Grouped-query attention as ONNX, with masks of every rank: ONNX Runtime against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.exporters.onnx import export
from aropt.program import Spec, resolve
from aropt.trace import capture_function

HEADS, GROUPS, SIZE = 6, 3, 8
MASKS: list[tuple[Any, ...]] = [
    ("R", "S"),
    (1, "S"),
    (1, "R", "S"),
    (HEADS, "R", "S"),
    (HEADS, 1, "S"),
    (1, 1, "R", "S"),
    ("B", 1, "R", "S"),
    ("B", 1, 1, "S"),
    (1, HEADS, "R", "S"),
    ("B", HEADS, "R", "S"),
    ("B", HEADS, 1, "S"),
    ("B", HEADS, "R", 1),
]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=["keep", "add"])
@pytest.mark.parametrize("dims", MASKS, ids=lambda dims: "x".join(map(str, dims)))
def test_masks_of_grouped_queries(dims: tuple[Any, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    import onnxruntime

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)

    stored = Spec(torch.float32, ("B", HEADS // GROUPS, "S", SIZE))
    specs = {"q": Spec(torch.float32, ("B", HEADS, "R", SIZE)), "k": stored, "v": stored, "mask": Spec(dtype, dims)}
    graph = capture_function("attention", function, specs, ["mixed"])
    export(graph, {}, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    torch.manual_seed(0)
    for sizes in ({"B": 2, "R": 5, "S": 7}, {"B": 1, "R": 1, "S": 4}):
        values = {n: torch.randn([resolve(d, sizes) for d in s.dims]) for n, s in specs.items()}
        if dtype is torch.bool:
            values["mask"] = values["mask"] > -1
            values["mask"][..., 0] = True  # every row sees something
        (got,) = session.run(None, {n: x.numpy() for n, x in values.items()})
        torch.testing.assert_close(torch.from_numpy(got), function(**values), rtol=1e-5, atol=1e-5)
