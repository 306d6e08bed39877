"""Tokenizers: ids of a text as AutoTokenizer gives them, from a model directory and from an artifact of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aropt.cli.run import encode, tokenizer
from aropt.frontend.sources import resolve
from aropt.frontend.texts import model_tokenizer, read_texts
from aropt.models import CHECKPOINTS
from tests.support.directories import directory, said

transformers = pytest.importorskip("transformers", reason="needs aropt[hf]")
TEXT = "def __init__(self, name):<|new|> x"


def tokenized(path: Path, change: str) -> Path:
    """A directory with the bytes' tokenizer, saved with something that only AutoTokenizer minds."""
    from tokenizers import Tokenizer, processors

    path.mkdir(exist_ok=True)
    made = Tokenizer.from_file(str(CHECKPOINTS / "text-ar/tokenizer.json"))
    more: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin|>"}
    if change == "truncation":
        made.enable_truncation(8)
    if change == "padding":
        made.enable_padding(length=64, pad_id=0, pad_token="\x00")
    if change == "a token put before":
        begin = made.token_to_id("<|begin|>")
        made.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [("<|begin|>", begin)])
    if change == "a token of the configuration":
        new = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        more["added_tokens_decoder"] = {str(made.get_vocab_size()): {**new, "single_word": False}}
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(more))
    return path


@pytest.mark.parametrize(
    "change", ["truncation", "padding", "a token put before", "a token of the configuration", "nothing"]
)
def test_ids_are_those_of_autotokenizer(change: str, tmp_path: Path) -> None:
    path = tokenized(tmp_path / "model", change)
    want = transformers.AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"]
    assert encode(TEXT, None, tokenizer(path)) == want  # type: ignore[arg-type]
    made, _ = model_tokenizer(path)
    assert made is not None
    out = tmp_path / "out"
    out.mkdir()
    made.save(out)
    (out / "manifest.json").write_text("{}")
    again = read_texts(out)
    assert again is not None and again.encode(TEXT) == want and again.decode(want) == made.decode(want)
    assert transformers.AutoTokenizer.from_pretrained(out)(TEXT)["input_ids"] == want
    plain = transformers.AutoTokenizer.from_pretrained(path)(TEXT, add_special_tokens=False)["input_ids"]
    assert again.encode(TEXT, special=False) == plain


def test_files_of_a_slow_tokenizer_and_a_chat_template(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "##c"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    said(tmp_path, "tokenizer_config.json", tokenizer_class="BertTokenizer", chat_template="{{ messages[0].content }}")
    want = transformers.AutoTokenizer.from_pretrained(tmp_path)("a bc")["input_ids"]
    made, why = model_tokenizer(tmp_path)
    assert made is not None and made.encode("a bc") == want and want[0] == 2, why
    (tmp_path / "out").mkdir()
    made.save(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages[0].content }}"
    assert read_texts(tmp_path / "out").encode("a bc") == want  # type: ignore[union-attr]


def test_a_directory_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    source = resolve(str(directory(tmp_path)))
    assert source.texts is None and source.meta["modality"] == "tokens"
    assert "Prompts are token ids: the directory has no tokenizer." in source.meta["left_out"]
    (tmp_path / "tokenizer.json").write_text("{")
    source = resolve(str(tmp_path))
    assert source.texts is None and any("tokenizer.json can't be read" in note for note in source.meta["left_out"])


@pytest.mark.parametrize(
    ("config", "generation", "prompt"),
    [
        ({"bos_token_id": 7}, {}, [[7]]),
        ({"bos_token_id": 7}, {"bos_token_id": 9}, [[9]]),
        ({"bos_token_id": None, "eos_token_id": 5}, {}, [[5]]),
        ({"bos_token_id": 99}, {}, [[1]]),
        ({"bos_token_id": None}, {}, [[1]]),
    ],
)
def test_a_model_without_prompts_begins_as_its_texts_do(
    config: dict[str, Any], generation: dict[str, Any], prompt: list[list[int]], tmp_path: Path
) -> None:
    directory(tmp_path, **config)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation:
        said(tmp_path, "generation_config.json", **generation)
    assert resolve(str(tmp_path)).meta["prompts"] == prompt


def test_the_tokenizer_says_what_begins_a_text(tmp_path: Path) -> None:
    path = tokenized(directory(tmp_path / "model", vocab_size=300, bos_token_id=None), "nothing")
    (path / "generation_config.json").unlink(missing_ok=True)
    begin = transformers.AutoTokenizer.from_pretrained(path).bos_token_id
    assert begin > 1 and resolve(str(path)).meta["prompts"] == [[begin]]
