"""The shipped reference models: shapes, sizes, quality on held-out data, causality and the text tokenizer."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from aropt.errors import UsageError
from aropt.models import REFERENCES, canvas, digits, load, text, train, train_canvas, train_digits


@pytest.fixture(scope="module")
def digits_model() -> nn.Module:
    return load("digits-ar")


@pytest.fixture(scope="module")
def text_model() -> nn.Module:
    pytest.importorskip("transformers", reason="needs aropt[hf]")
    return load("text-ar")


DIGITS = [name for name, reference in REFERENCES.items() if reference.modality == "image"]
CANVAS = [name for name, reference in REFERENCES.items() if reference.mask is not None]


@pytest.fixture(scope="module")
def digits_heldout() -> tuple[Tensor, Tensor]:
    """(labels int64 [N], pixels int64 [N, 64]) kept out of training."""
    pytest.importorskip("sklearn", reason="needs aropt[models]")
    return train_digits.data()[2]


@pytest.fixture(scope="module")
def forwards(digits_model: nn.Module, text_model: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """ids to logits, by model name."""
    known: dict[str, Callable[[Tensor], Tensor]] = {
        "digits-ar": digits_model,
        "text-ar": lambda ids: text_model(input_ids=ids, use_cache=False).logits,
    }
    models = {name: load(name) for name in REFERENCES if name not in known}
    others = {name: partial(train.logits_of, model) for name, model in models.items() if name in text.BUILDS}
    return {**models, **others, **known}


def example(name: str, rows: int, length: int) -> Tensor:
    """ids int64 [rows, length], or [rows, length, W] of windows: an example prompt of the model, then random ids."""
    generator, reference = torch.Generator().manual_seed(0), REFERENCES[name]
    shape = (rows, length, reference.unit) if reference.unit > 1 else (rows, length)
    ids = torch.randint(reference.vocab, shape, generator=generator)
    prompt = torch.tensor(reference.prompts[0])[:length]
    ids[:, : len(prompt)] = prompt[:, None] if reference.unit > 1 else prompt
    return ids


@pytest.mark.parametrize("name", REFERENCES)
def test_forward_is_float32_without_gradients_up_to_capacity(
    name: str, forwards: dict[str, Callable[[Tensor], Tensor]]
) -> None:
    reference = REFERENCES[name]
    for rows, length in ((1, 1), (3, 4), (1, reference.capacity)):
        ids = example(name, rows, length)
        logits = forwards[name](ids)
        assert logits.shape == (*ids.shape, reference.vocab)
        assert logits.dtype == torch.float32
        assert not logits.requires_grad
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", [name for name in REFERENCES if name not in CANVAS])
def test_later_ids_leave_earlier_logits_alone(name: str, forwards: dict[str, Callable[[Tensor], Tensor]]) -> None:
    length = min(40, REFERENCES[name].capacity)
    before = example(name, 2, length)
    for position in (1, length * 17 // 40, length - 1):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % 17
        moved = (forwards[name](before) - forwards[name](after)).abs().flatten(2).amax(dim=(0, 2))
        assert moved[:position].max() < 1e-5
        assert moved[position] > 1e-3


@pytest.mark.parametrize("name", CANVAS)
def test_what_a_canvas_shows(name: str, forwards: dict[str, Callable[[Tensor], Tensor]]) -> None:
    """text-mdlm sees everything, text-bd its block of 16 and those before it."""
    before, block = example(name, 2, 40), REFERENCES[name].block
    for position in (1, 17, 39):
        after = before.clone()
        after[:, position] = (after[:, position] + 1) % 17
        moved = (forwards[name](before) - forwards[name](after)).abs().amax(dim=(0, 2))
        first = position // block * block if block else 0
        assert first == 0 or moved[:first].max() < 1e-5
        assert moved[first:].min() > 1e-5


def test_a_canvas_is_denoised_given_the_clean_blocks_before() -> None:
    """One forward of noisy and clean rows equals a forward for each block."""
    model = load("text-bd")
    assert isinstance(model, canvas.CanvasLM)
    clean = example("text-bd", 2, 48)
    noisy, _ = train_canvas.corrupted(clean, torch.full(clean.shape, 0.5), torch.Generator().manual_seed(1))
    both = model.denoise(noisy, clean)
    for block in range(3):
        rows = slice(block * 16, block * 16 + 16)
        alone = model(torch.cat([clean[:, : block * 16], noisy[:, rows]], 1))[:, rows]
        torch.testing.assert_close(both[:, rows], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CANVAS)
def test_canvas_bound_is_as_recorded(name: str) -> None:
    model = load(name)
    assert isinstance(model, canvas.CanvasLM)
    recorded, found = REFERENCES[name].heldout, train_canvas.measure(model, 16384)
    assert found["nll"] == pytest.approx(recorded["nll"], abs=0.2)  # a slice, fewer levels of noise
    assert found["accuracy_half_masked"] == pytest.approx(recorded["accuracy_half_masked"], abs=0.06)
    assert recorded["nll"] < REFERENCES["text-ar"].heldout["unigram_nll"] - 0.6


@pytest.mark.parametrize("name", REFERENCES)
def test_checkpoint_is_small(name: str) -> None:
    checkpoint = REFERENCES[name].checkpoint
    weights = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    assert 0 < weights.stat().st_size <= 4_000_000


@pytest.mark.parametrize("name", DIGITS)
def test_digits_heldout_nll_is_as_recorded(name: str, digits_heldout: tuple[Tensor, Tensor]) -> None:
    recorded = REFERENCES[name].heldout
    assert train_digits.nll(load(name), *digits_heldout) == pytest.approx(recorded["nll"], abs=1e-3)
    assert recorded["nll"] < recorded["unigram_nll"] - 0.6


@pytest.mark.parametrize("name", DIGITS)
def test_digits_model_uses_its_class(name: str, digits_heldout: tuple[Tensor, Tensor]) -> None:
    model, (labels, pixels) = load(name), (values[:120] for values in digits_heldout)
    right = train_digits.nll(model, labels, pixels)
    assert train_digits.nll(model, (labels + 1) % digits.CLASSES, pixels) > right + 0.05
    assert train_digits.nll(model, torch.full_like(labels, digits.CLASSES), pixels) > right


def test_cca_sharpens_what_guidance_would() -> None:
    """Without guidance the tuned model is read better than digits-ar, by most of what guidance 1.5 adds."""
    record, before = REFERENCES["digits-ar-cca"], REFERENCES["digits-ar-cca"].training["before"]
    assert load("digits-ar-cca").guidance_free is True
    assert record.training["guidance_free"] is True
    assert load("digits-ar").guidance_free is False
    plain, guided = (before[f"guidance_{g}"]["class_accuracy"] for g in ("1", "1.5"))
    assert record.heldout["sampled_class_accuracy"] > (plain + guided) / 2


def test_what_a_window_costs_is_recorded() -> None:
    """Ids of a window are independent of each other: the larger it is, the worse the likelihood."""
    nlls = [REFERENCES[name].heldout["nll"] for name in ("digits-ar", "digits-shuffle2", "digits-shuffle4")]
    assert nlls == sorted(nlls)


def test_text_heldout_nll_is_as_recorded(text_model: nn.Module) -> None:
    _, held = text.split()
    ids = torch.tensor(text.stream(held))
    # One window in eight, so that every kind of document is in the slice.
    windows = ids[: len(ids) // 256 * 256].view(-1, 256)[::8]
    recorded = REFERENCES["text-ar"].heldout
    # The slice is not the whole, and another Python release has slightly other documents.
    assert train.text_nll(text_model, windows.flatten(), 256) == pytest.approx(recorded["nll"], abs=0.1)
    assert recorded["nll"] < recorded["unigram_nll"] - 1.2


def test_text_splits_do_not_share_documents() -> None:
    kept, held = text.split()
    assert set(held) == set(text.HELD_OUT)
    assert not set(kept) & set(held)
    assert not any("site-packages" in name or "_sysconfigdata" in name for name in kept)


def test_digits_exports_with_symbolic_batch_and_length(digits_model: nn.Module) -> None:
    shapes = {"ids": {0: Dim("b"), 1: Dim("s", max=64)}}
    exported = torch.export.export(digits_model, (example("digits-ar", 2, 5),), dynamic_shapes=shapes, strict=False)
    for rows, length in ((1, 1), (3, 64)):
        ids = example("digits-ar", rows, length)
        torch.testing.assert_close(exported.module()(ids), digits_model(ids))


def test_digits_forward_takes_only_ids() -> None:
    assert list(inspect.signature(digits.DigitsAR.forward).parameters) == ["self", "ids"]


def test_digits_prompts_and_images(digits_heldout: tuple[Tensor, Tensor]) -> None:
    assert [digits.prompt(label) for label in (0, 9, None)] == [[17], [26], [27]]
    with pytest.raises(ValueError, match="class 10"):
        digits.prompt(10)
    labels, pixels = digits_heldout
    picture = digits.image(digits.prompt(int(labels[0])) + pixels[0].tolist())
    assert picture.shape == (8, 8)
    assert picture.dtype == np.uint8
    assert picture.flatten().tolist() == pixels[0].tolist()
    with pytest.raises(ValueError, match="64 pixel tokens"):
        digits.image([0] * 63)


def test_tokenizer_maps_each_byte_to_its_value() -> None:
    tokenizer = pytest.importorskip("transformers", reason="needs aropt[hf]").AutoTokenizer.from_pretrained(
        REFERENCES["text-ar"].checkpoint, local_files_only=True
    )
    assert len(tokenizer) == text.VOCAB
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (text.PAD, text.BOS)
    assert (tokenizer.eos_token_id, tokenizer.unk_token_id) == (text.EOS, text.UNKNOWN)
    ascii_text = "".join(map(chr, range(128)))
    for sample in (ascii_text, "naïve café, ü, 日本, 😀", "a\n\n\tb\r\n  c \n", " lead", "def f(x):\n\treturn x  # é"):
        ids = tokenizer(sample).input_ids
        assert ids == list(sample.encode("utf-8")) == text.encode(sample)
        assert tokenizer.decode(ids) == text.decode(ids) == sample
    assert text.decode([text.BOS, 72, 105, 255, text.EOS]) == "Hi\ufffd"


def test_checkpoint_is_a_plain_hugging_face_directory() -> None:
    transformers = pytest.importorskip("transformers", reason="needs aropt[hf]")
    directory = REFERENCES["text-ar"].checkpoint
    assert transformers.AutoConfig.from_pretrained(directory).dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float32


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"digits-ar, .*text-ar"):
        load("nothing")


def test_a_missing_checkpoint_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="text-ar-draft has no checkpoint") as caught:
        load("text-ar-draft", tmp_path)
    assert "aropt.models.train text-ar-draft" in caught.value.hint


def test_registry_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, aropt.models; assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
