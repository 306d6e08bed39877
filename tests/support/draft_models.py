"""Tiny models of ids 0..60 that draft for each other, as factories for `aropt optimize FILE:FACTORY`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

VOCAB, CAPACITY = 61, 48


def made(kind: str, seed: int, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1}
    chosen = getattr(transformers, f"{kind}Config")(**common, eos_token_id=2, **config)
    model: nn.Module = getattr(transformers, f"{kind}ForCausalLM")(chosen)
    return model.eval()


def llama(seed: int = 0, **config: Any) -> nn.Module:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return made("Llama", seed, max_position_embeddings=CAPACITY, **heads, **config)


def mamba2(seed: int = 0) -> nn.Module:
    return made("Mamba2", seed, num_heads=4, head_dim=16, state_size=8, n_groups=1, expand=2, chunk_size=8)


def hybrid(seed: int = 0) -> nn.Module:
    mamba = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "attn_layer_indices": [1]}
    return made("Bamba", seed, mamba_chunk_size=8, max_position_embeddings=CAPACITY, **heads, **mamba)


def nearly(seed: int = 0) -> nn.Module:
    """The model of `llama`, with weights that are a little off."""
    model = llama(seed)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.2 * weight.std(correction=0) * torch.randn(weight.shape, generator=generator)
    return model


def opposite(seed: int = 0) -> nn.Module:
    """The model of `llama`, whose likeliest id is the least likely one."""
    model = llama(seed)
    with torch.no_grad():
        model.lm_head.weight.neg_()  # type: ignore[union-attr, operator]
    return model


class Few(nn.Module):
    """Five ids, whose chances depend on those before: all texts can be counted."""

    vocab = 5

    def __init__(self, seed: int, warmth: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.out = nn.Embedding(self.vocab, 8), nn.Linear(8, self.vocab)
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.warmth = warmth

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids).unsqueeze(1)
        seen = nn.functional.scaled_dot_product_attention(self.key(x), self.key(x), self.value(x), is_causal=True)
        found: torch.Tensor = self.out((x + seen).squeeze(1)) / self.warmth
        return found


def few() -> nn.Module:
    return Few(1, 0.5).eval()


def few_draft() -> nn.Module:
    """Other chances: many drafts are refused."""
    return Few(5).eval()


def other() -> nn.Module:
    """A vocabulary of another size."""
    import transformers

    config = transformers.LlamaConfig(vocab_size=VOCAB + 2, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    return transformers.LlamaForCausalLM(config).eval()


def short() -> nn.Module:
    """Fewer positions."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    return made("Llama", 0, max_position_embeddings=20, **heads)


def sees_all() -> nn.Module:
    """Rows see later ones."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    return transformers.BertForMaskedLM(config).eval()
