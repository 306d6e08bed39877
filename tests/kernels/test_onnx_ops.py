"""Translations of our own for torch's ops, as ONNX Runtime computes them: against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aropt.exporters.onnx import export
from aropt.frontend.trace import capture_function
from aropt.ir.dims import resolve
from aropt.ir.program import Spec

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


def test_log1p_keeps_what_is_small(tmp_path: Path) -> None:
    """Float32 accuracy everywhere: log(1 + x) would give 0 below 6e-8."""
    import onnxruntime

    graph = capture_function("log1p", torch.log1p, {"x": Spec(torch.float32, ("N",))}, ["y"])
    export(graph, {}, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    near = torch.logspace(-38, 0, 2000)
    x = torch.cat([near, -near[near < 1], near * 1e30, torch.tensor([0.0, -1.0, torch.inf, torch.nan])])
    (got,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), x.log1p(), rtol=1e-6, atol=0, equal_nan=True)
