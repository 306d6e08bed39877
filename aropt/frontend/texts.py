"""Texts and ids: a model's tokenizer as transformers' AutoTokenizer gives it, and saved so in the artifact.

What a tokenizer.json stores of truncation and padding is for training: transformers sets both anew for each call, and
neither belongs to a prompt. Added tokens, and ids put before and after a text, are in tokenizer_config.json as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aropt.errors import MissingTool, UsageError

FAST, CONFIG = "tokenizer.json", "tokenizer_config.json"
SLOW = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.model")


@dataclass(frozen=True)
class Texts:
    """A tokenizer: of the package tokenizers (`fast`), or one of transformers that is written in Python (`whole`)."""

    fast: Any = None
    whole: Any = None  # transformers' own, which also saves what lies beside: its configuration, the chat template

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text, with those that the tokenizer puts around it where `special` is set."""
        if self.fast is not None:
            return list(self.fast.encode(text, add_special_tokens=special).ids)
        return list(self.whole(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        if self.fast is not None:
            return str(self.fast.decode(list(ids)))
        return str(self.whole.decode(list(ids), skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Writes the tokenizer's files into a folder."""
        if self.whole is not None:
            self.whole.save_pretrained(folder)
        else:
            self.fast.save(str(folder / FAST))


def stored_tokenizer(file: Path) -> Texts:
    """The tokenizer of a tokenizer.json. Raises UsageError for a file that is none."""
    from tokenizers import Tokenizer

    try:
        return without_lengths(Tokenizer.from_file(str(file)))
    except BaseException as error:  # tokenizers has no kind of its own, and a panic is no Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise UsageError(
            what=f"'{file.name}' can't be read",
            where=str(file),
            why=(str(error).splitlines() or [type(error).__name__])[0][:300],
            hint="get the file again, or give prompts as token ids without it",
        ) from error


def without_lengths(fast: Any, whole: Any = None) -> Texts:
    """A tokenizer that neither cuts nor pads."""
    fast.no_truncation()
    fast.no_padding()
    return Texts(fast, whole)


def model_tokenizer(path: Path, trusted: bool = False) -> tuple[Texts | None, str]:
    """The tokenizer of a model directory, or None and why there is none."""
    there = [name for name in (FAST, CONFIG, *SLOW) if (path / name).is_file()]
    if not there:
        return None, "the directory has no tokenizer"
    from transformers import AutoTokenizer

    try:
        whole = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # its own code, or a package that it needs, may raise anything
        return None, f"{there[0]} can't be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    fast = getattr(whole, "backend_tokenizer", None)
    return (Texts(None, whole) if fast is None else without_lengths(fast, whole)), ""


def read_texts(folder: Path) -> Texts | None:
    """The tokenizer of an artifact, or of a model directory; None where there is none.

    Raises MissingTool for one that needs transformers where that is not installed.
    """
    if (folder / "manifest.json").is_file() and (folder / FAST).is_file():
        return stored_tokenizer(folder / FAST)
    if not any((folder / name).is_file() for name in (FAST, CONFIG, *SLOW)):
        return None
    try:
        return model_tokenizer(folder)[0]
    except ImportError as error:
        raise MissingTool(
            what="the tokenizer needs transformers", where=str(folder), why=str(error), hint="pip install 'aropt[hf]'"
        ) from error


def decoder(texts: Texts | None) -> Callable[[list[int]], str]:
    """Text of token ids; the ids themselves where there is no tokenizer."""
    return (lambda ids: " ".join(map(str, ids))) if texts is None else texts.decode
