"""Hugging Face directories with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def directory(path: Path, kind: str = "Llama", head: str = "ForCausalLM", **more: Any) -> Path:
    """A saved model with random weights."""
    import transformers

    torch.manual_seed(0)
    config = {**SIZES, "max_position_embeddings": 64, "initializer_range": 0.3, **ENDS, **more}
    getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**config)).save_pretrained(path)
    return path


def said(path: Path, file: str = "config.json", **more: Any) -> None:
    """Adds to a JSON file of a directory."""
    found = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps({**found, **more}))


def small_llama(folder: Path) -> str:
    """A plain Hugging Face directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=131, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
