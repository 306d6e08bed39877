"""The shuffled model: shapes, what a row's logits depend on, the order of ids in an image, layouts, export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.export import Dim

from aropt.errors import UsageError
from aropt.models import shuffle
from aropt.models.shuffle import Layout, Shape, ShuffleAR

LAYOUTS: tuple[Layout, ...] = ("compress", "concat")


def small(side: int = 8, window: int = 2, layout: Layout = "compress", blocks: int = 1) -> ShuffleAR:
    """A narrow model of seed 0."""
    torch.manual_seed(0)
    width = {"width": 32, "layers": 2, "heads": 2, "hidden": 48, "mixing": 40}
    model = ShuffleAR(Shape(side=side, window=window, layout=layout, blocks=blocks, **width))
    return model.eval().requires_grad_(False)


def example(model: ShuffleAR, batch: int, length: int, seed: int = 0) -> Tensor:
    """ids int64 [batch, length, W]: a class row each, then random windows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.shape.levels, (batch, length, model.unit), generator=generator)
    ids[:, 0] = model.single + torch.randint(model.shape.classes + 1, (batch, 1), generator=generator)
    return ids


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(8, 1), (8, 2), (8, 4), (6, 3), (4, 4)]),
    st.sampled_from(LAYOUTS),
    st.integers(0, 2),
    st.integers(1, 64),
)
def test_a_row_predicts_the_ids_of_a_window(cut: tuple[int, int], layout: Layout, blocks: int, length: int) -> None:
    side, window = cut
    if layout == "compress" and 32 % window**2:
        return
    model = small(side, window, layout, blocks)
    length = min(length, model.capacity)
    logits = model(example(model, 2, length))
    assert logits.shape == (2, length, window**2, 17)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_what_capture_reads() -> None:
    model = ShuffleAR()
    assert (model.unit, model.single, model.input_vocab, model.null, model.capacity) == (4, 17, 28, 27, 16)
    assert (model.side, model.window) == (8, 2)
    assert model.prompts == [[17 + label] for label in range(10)]
    assert not model.guidance_free
    large = Shape(side=32, width=512, heads=8, hidden=1408, levels=1024, classes=4)
    with torch.device("meta"):
        model = ShuffleAR(large)
        logits = model(torch.zeros(2, 256, 4, dtype=torch.long))
    assert logits.shape == (2, 256, 4, 1024)
    assert (model.single, model.input_vocab, model.null, model.capacity) == (1024, 1029, 1028, 256)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [1, 2, 4])
def test_later_rows_leave_earlier_logits_alone(window: int, layout: Layout) -> None:
    model = small(window=window, layout=layout)
    before = example(model, 2, model.capacity)
    for row in range(1, model.capacity, 3):
        for place in range(model.unit):
            after = before.clone()
            after[:, row, place] = (after[:, row, place] + 1) % 17
            moved = (model(before) - model(after)).abs().amax(dim=(0, 2, 3))
            assert moved[:row].max() < 1e-6
            assert moved[row] > 1e-5  # every id of a window is read


def test_ids_of_a_window_are_drawn_from_one_row_of_the_past() -> None:
    """The logits of a window are a function of the rows before it: none of its own ids goes in."""
    model = small()
    ids, other = example(model, 1, 9), example(model, 1, 9, seed=1)
    mixed = torch.cat([ids[:, :5], other[:, 5:]], 1)
    torch.testing.assert_close(model(mixed)[:, :5], model(ids)[:, :5])


def test_a_class_fills_a_row() -> None:
    """Only the first id of a class row counts, and each class has a row of its own."""
    model = small()
    ids = example(model, 1, 1)
    messy = ids.clone()
    messy[..., 1:] = 3
    torch.testing.assert_close(model(ids), model(messy))
    rows = torch.stack([model(torch.full((1, 1, 4), i)).flatten() for i in range(17, 28)])
    assert torch.pdist(rows).min() > 1e-4


@given(st.sampled_from([(8, 1), (8, 2), (8, 4), (6, 3), (4, 4)]), st.integers(0, 9))
def test_an_image_comes_back_from_its_rows(cut: tuple[int, int], seed: int) -> None:
    side, window = cut
    pixels = torch.randint(17, (2, side * side), generator=torch.Generator().manual_seed(seed))
    rows = shuffle.rows(pixels, side, window)
    assert rows.shape == (2, (side // window) ** 2, window**2)
    for picture, ids in zip(pixels, rows, strict=True):
        assert shuffle.image([17, *ids.flatten().tolist()], side, window).tolist() == picture.view(side, side).tolist()
    first = pixels[0].view(side, side)[:window, :window]
    assert rows[0, 0].tolist() == first.flatten().tolist()
    if window < side:
        assert rows[0, 1, 0] == pixels[0, window]  # the second block lies to the right of the first


def test_an_image_needs_all_its_ids() -> None:
    with pytest.raises(ValueError, match="64 ids"):
        shuffle.image([0] * 63)


def test_shapes_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="window of 3 does not divide an image of side 8") as refused:
        ShuffleAR(Shape(window=3))
    assert "1, 2, 4, 8" in refused.value.hint
    with pytest.raises(UsageError, match="can't be shared by the 9 ids"):
        ShuffleAR(Shape(side=6, window=3))
    with pytest.raises(UsageError, match="window of 0"):
        ShuffleAR(Shape(window=0))
    with pytest.raises(UsageError, match="no layout 'both'"):
        ShuffleAR(Shape(layout="both"))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exports_with_symbolic_batch_and_length(layout: Layout) -> None:
    model = small(layout=layout)
    shapes = {"ids": {0: Dim("b"), 1: Dim("s", max=16)}}
    exported = torch.export.export(model, (example(model, 2, 5),), dynamic_shapes=shapes, strict=False)
    for batch, length in ((1, 1), (3, 16)):
        ids = example(model, batch, length)
        torch.testing.assert_close(exported.module()(ids), model(ids))


def test_a_saved_model_keeps_its_shape(tmp_path: Path) -> None:
    model = small(side=4, layout="concat", blocks=2)
    shuffle.save(model, tmp_path / "model.safetensors")
    found = shuffle.load(tmp_path / "model.safetensors").eval()
    assert found.shape == model.shape
    ids = example(model, 2, 4)
    torch.testing.assert_close(found(ids), model(ids), rtol=0.05, atol=0.02)  # bfloat16 weights
