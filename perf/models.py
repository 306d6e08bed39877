"""Random Llamas of three sizes as Hugging Face directories: where a step's time goes depends on the size alone.

Vocabulary: 256 bytes and four special tokens. The head's rows of the special tokens are zero, so that greedy decoding
never meets one, whatever an engine would do then.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from aropt.models import CHECKPOINTS

VOCAB, PAD, BOS, EOS = 260, 256, 257, 258
SHAPES = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 512},
    "small": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "intermediate_size": 1408},
    "mid": {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816},
}
PROMPT = [220, 4, 101, 170, 31, 173, 29, 90, 218, 229, 172, 27, 30, 95, 19, 112]  # bytes at random


def folder(name: str, root: Path) -> Path:
    """The directory root/name of a model; written on first use, the same weights every time."""
    found = root / name
    if not found.is_dir():
        aside = root / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        write(SHAPES[name], aside)
        aside.rename(found)
    return found


def write(shape: dict[str, int], path: Path) -> None:
    """Weights of seed 0 and the tokenizer of text-ar, whose tokens are bytes too."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=1.5 * shape["hidden_size"] ** -0.5,  # narrower, greedy text falls into a short loop at once
        **shape,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float().eval()
        model.lm_head.weight[256:] = 0
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "text-ar" / file, path / file)
