"""LLaDA as a plain module, with the parameter names of its public code: what aropt and its peers run on one checkpoint.

A folder holds config.json (LLaDA's own names) and model.safetensors. AROPT_LLADA names the one that `factory` loads;
without it, random weights of the size "bench" are written under build/ on first use.

    python -m perf.llada FOLDER [--size bench|test | --model text-mdlm] [--seed 0]
    AROPT_LLADA=FOLDER aropt optimize perf/llada.py:factory --loop unmask --mask 259 --rule threshold -o out

`--model` writes the trained weights of a reference model, which has the same layers, under LLaDA's names.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "build" / "models" / "llada-bench"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
# Standard deviations of random weights, those of matrices times the root of their inputs. With LLaDA's 0.02 all logits
# would be about alike; with these, of 64 ids some 20 to 40 differ, and a threshold of 0.9 takes some 15 rounds.
EMBED, LAYER, HEAD = 1.0, 2.5, 8.0
ALWAYS, NEVER = 0.02, -1e7  # a feature that every row has, and its weight in the mask's logit
PROMPTS = [[35, 12, 99, 7], [1], [100, 3, 3, 57, 8, 21, 64]]
# of text-mdlm's modules, in LLaDA's names
NAMES = {
    "embed": "wte",
    "head": "ff_out",
    "layers": "blocks",
    "norm": "ln_f",
    "attention_norm": "attn_norm",
    "feed_norm": "ff_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "attn_out",
    "gate": "ff_proj",
    "up": "up_proj",
    "down": "ff_out",
}


class Config(NamedTuple):
    """The part of LLaDA's config.json that differs between checkpoints; other values are those of LLaDA-8B."""

    d_model: int
    n_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    mask_token_id: int
    max_sequence_length: int = 512
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False


SIZES = {
    "test": Config(64, 4, 2, 128, 128, 127, 256),
    "bench": Config(192, 6, 4, 512, 260, 259),
}


class RMSNorm(nn.Module):
    """Scales [..., width] to a mean square of 1, then by a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Block(nn.Module):
    """Attention of every row to every row, then SwiGLU: float32 [B, T, d_model] to the same shape."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width, hidden, self.heads = config.d_model, config.mlp_hidden_size, config.n_heads
        self.attn_norm, self.ff_norm = (RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.q_proj, self.k_proj, self.v_proj, self.attn_out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.ff_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.ff_out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        (b, t, width), y = x.shape, self.attn_norm(x)
        q, k, v = (f(y).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(turned(q, cos, sin), turned(k, cos, sin), v)
        x = x + self.attn_out(y.transpose(1, 2).reshape(b, t, width))
        y = self.ff_norm(x)
        fed: Tensor = self.ff_out(F.silu(self.ff_proj(y)) * self.up_proj(y))
        return x + fed


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: x [B, H, T, D], cos and sin [T, D]; feature i is paired with i + D/2."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LLaDA(nn.Module):
    """ids int64 [B, T] -> logits float32 [B, T, vocab], whose row t predicts id t."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config  # aropt reads vocab_size and max_sequence_length
        self.mask, self.prompts = config.mask_token_id, PROMPTS
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.vocab_size, config.d_model),
            "blocks": nn.ModuleList(Block(config) for _ in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.model = nn.ModuleDict({"transformer": nn.ModuleDict(parts)})
        size = config.d_model // config.n_heads
        rates = 1.0 / config.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        angles = torch.arange(config.max_sequence_length, dtype=torch.float32)[:, None] * torch.cat([rates, rates])
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        parts, t = self.model["transformer"], ids.shape[1]
        x = parts["wte"](ids)  # type: ignore[index]
        for block in parts["blocks"]:  # type: ignore[index]
            x = block(x, self.cos[:t], self.sin[:t])
        x = parts["ln_f"](x)  # type: ignore[index]
        head = parts["wte" if self.config.weight_tying else "ff_out"]  # type: ignore[index]
        return F.linear(x, head.weight)


def write_weights(path: Path, config: Config, seed: int = 0) -> None:
    """Random weights. Raises ValueError for a tied head.

    The peers take the argmax over all ids and write the mask if it wins, while aropt never writes it. So that all
    compute the same, the mask's probability is 0: feature 0 is the same in all embeddings, no layer writes to it, and
    the head reads it for the mask alone.
    """
    from safetensors.torch import save_file

    if config.weight_tying:
        raise ValueError("a tied head can't keep the mask from being the most likely id")
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in LLaDA(config).state_dict().items():
        if value.ndim == 2:
            embed, head = (name.endswith(f"transformer.{part}.weight") for part in ("wte", "ff_out"))
            std = EMBED if embed else (HEAD if head else LAYER) * value.shape[1] ** -0.5
            value = std * torch.randn(value.shape, generator=draw)
            if embed:
                value[:, 0] = ALWAYS
            elif head:
                value[:, 0], value[config.mask_token_id] = 0, 0
                value[config.mask_token_id, 0] = NEVER
            elif name.endswith(("attn_out.weight", "ff_out.weight")):
                value[0] = 0
        weights[name] = value.contiguous()
    save_file(weights, path)


def trained(name: str) -> tuple[Config, dict[str, Tensor]]:
    """A reference model that sees its whole canvas, under LLaDA's names."""
    from aropt.models import REFERENCES, load

    found, weights = REFERENCES[name], {}
    for key, value in load(name).state_dict().items():
        weights["model.transformer." + ".".join(NAMES.get(part, part) for part in key.split("."))] = value
    config = SIZES["bench"]._replace(vocab_size=found.vocab, mask_token_id=found.mask or 0)
    return config._replace(max_sequence_length=found.capacity, rope_theta=10000.0, rms_norm_eps=1e-6), weights


def folder(path: Path, size: str = "bench", seed: int = 0, model: str = "") -> Path:
    """The folder at `path`; written if it isn't there, whole or not at all."""
    from safetensors.torch import save_file

    if path.is_dir():
        return path
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    if model:
        config, weights = trained(model)
        save_file({k: v.contiguous() for k, v in weights.items()}, aside / WEIGHTS)
    else:
        config = SIZES[size]
        write_weights(aside / WEIGHTS, config, seed)
    (aside / CONFIG).write_text(json.dumps(config._asdict(), indent=1) + "\n")
    aside.rename(path)
    return path


def load_folder(path: Path) -> LLaDA:
    """The model of a folder, in float32."""
    from safetensors.torch import load_file

    model = LLaDA(Config(**json.loads((path / CONFIG).read_text())))
    model.load_state_dict({name: value.float() for name, value in load_file(path / WEIGHTS).items()})
    return model.eval().requires_grad_(False)


def factory() -> LLaDA:
    """The model source perf/llada.py:factory; its mask id is not known to aropt, which takes it from the caller."""
    given = os.environ.get("AROPT_LLADA")
    return load_folder(Path(given) if given else folder(DEFAULT))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="bench")
    parser.add_argument("--model", default="", help="a reference model of the same layers: text-mdlm")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(folder(args.folder, args.size, args.seed, args.model))
