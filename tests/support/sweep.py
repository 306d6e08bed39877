"""Restricts tiny random models of many transformers architectures: `python -m tests.support.sweep [names...]`.

Each row is `ok` (cached equals full within the noise floor), `refused` (with the reason), `WRONG` (silently different:
what must never happen) or `error` (transformers can't build it from these sizes). Exit status 1 if any is WRONG, if
anything but an Unsupported came out of aropt, or if fewer than 17 are ok (only when run without names).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from aropt.errors import Unsupported

VOCAB, CAPACITY = 97, 40
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 64, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "sliding_window": 6,
}  # fmt: skip
HALF_ROTARY = {"rotary_dim": 4}
DECODER = {"is_decoder": True}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
GROUPED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
MLA = {**GROUPED, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
       "n_group": 2, "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"state_size": 4, "time_step_rank": 4, "num_attention_heads": None, "head_dim": None}
MAMBA2 = {"state_size": 8, "chunk_size": 8, "num_attention_heads": None}
MAMBA_HEADS = {"mamba_expand": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 8,
               "mamba_chunk_size": 8}  # fmt: skip
HYBRID = {"layers_block_type": ["mamba", "hybrid", "mamba"],
          "layer_types": ["linear_attention", "hybrid", "linear_attention"],
          "num_hidden_layers": 3, "attention_hidden_size": 64, "attention_head_dim": 16,
          "num_key_value_heads": 4, "mamba_expand": 2}  # fmt: skip
DELTA = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
# sizes by the names that a config gives them; None drops one
OVERRIDES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4}, "codegen": HALF_ROTARY, "gptj": HALF_ROTARY, "falcon": {"head_dim": None},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 6, "num_heads": 4},
    "mpt": {"max_seq_len": 64, "d_model": 32, "n_heads": 4, "n_layers": 2},
    "deepseek_v3": MLA, "glm4_moe": GROUPED, "dots1": GROUPED, "gemma3_text": MIXED,
    "exaone4": {"sliding_window_pattern": 2, **MIXED}, "lfm2": {"layer_types": ["conv", "full_attention"]},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 64, "scale_embedding": True},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}, "gpt_bigcode": {"n_inner": 64}, "roberta": DECODER,
    "bert-generation": DECODER, "olmoe": {"num_key_value_heads": 4},
    "mamba": MAMBA, "falcon_mamba": MAMBA, "mamba2": {**MAMBA2, "num_heads": 4, "head_dim": 16, "n_groups": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "mamba_d_state": 4, "mamba_dt_rank": 4, "layer_types": None},
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]}, "falcon_h1": {**MAMBA_HEADS, "mamba_d_ssm": 64},
    "granitemoehybrid": {**MAMBA_HEADS, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 64},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
                   "layers_block_type": ["mamba", "attention"]},
    "zamba": {**HYBRID, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
              "layer_types": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_d_state": 4,
              "mamba_dt_rank": 4},
    "zamba2": {**HYBRID, "n_mamba_heads": 4, "mamba_headdim": 16, "mamba_ngroups": 2, "mamba_d_state": 8,
               "hybrid_layer_ids": [1], "num_mem_blocks": 1, "chunk_size": 8},
    "qwen3_next": DELTA, "qwen3_5_text": DELTA, "olmo_hybrid": {**DELTA, "linear_num_key_heads": 4},
    "kimi_linear": {**DELTA, **MLA, "linear_head_dim": 8, "linear_num_heads": 4},
    "bailing_hybrid": {**DELTA, **MLA, "layer_group_size": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "minimax": {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
    "rwkv": {"attention_hidden_size": 32}, "recurrent_gemma": {"block_types": ["recurrent", "attention"],
                                                              "lru_width": 32, "attention_window_size": 6},
}  # fmt: skip
RECURRENT = [
    "mamba", "mamba2", "falcon_mamba", "jamba", "bamba", "zamba", "zamba2", "granitemoehybrid", "nemotron_h",
    "falcon_h1", "qwen3_next", "qwen3_5_text", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2", "lfm2_moe",
    "lfm3", "rwkv", "recurrent_gemma", "minimax",
]  # fmt: skip
NAMES = [
    "llama", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "phi3", "gemma", "gemma2", "gemma3_text",
    "qwen2", "qwen3", "qwen3_moe", "mixtral", "olmo", "olmo2", "stablelm", "starcoder2", "cohere", "cohere2", "mpt",
    "gpt_bigcode", "gpt_neo", "gpt_oss", "granite", "granitemoe", "codegen", "xglm", "biogpt", "glm", "glm4",
    "nemotron", "persimmon", "smollm3", "mistral", "deepseek_v3", "ernie4_5", "exaone4", "helium", "hunyuan_v1_dense",
    "arcee", "apertus", "phimoe", "olmoe", "qwen2_moe", "diffllama", "doge", "nanochat", "modernbert-decoder",
    "vaultgemma", "openai-gpt", "ctrl", "bert-generation", "glm4_moe", "dots1",
    *RECURRENT,
    # to be refused: bidirectional, positions from tokens
    "bert", "roformer", "roberta",
]  # fmt: skip


def build(name: str) -> nn.Module:
    """A tiny random model, every weight perturbed so that no scale is 1, no bias 0 and attention is not uniform."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {k: v for k, v in {**SIZES, **OVERRIDES.get(name, {})}.items() if v is not None}
    config = AutoConfig.for_model(name, **sizes)
    config.use_cache = False
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    for value in model.parameters():
        value.data = value.data + 0.1 * torch.randn_like(value) if value.dim() == 1 else value.data * 3
    return model.eval()


def row(name: str) -> tuple[str, str]:
    """(verdict, details) of one architecture."""
    from tests.support.equivalence import check

    try:
        model = build(name)
    except Exception as error:  # of transformers, for a shape that it doesn't take
        return "error", f"transformers: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
    try:
        result, restricted = check(model, VOCAB, CAPACITY)
    except Unsupported as error:
        return "refused", f"{error.what}; {error.where}: {error.why}".replace("\n", " ")[:260]
    except Exception as error:  # a line of the result
        traceback.print_exc()
        return "RAISED", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
    numbers = f"{result.error:9.2e} {result.floor:9.2e} {result.ratio:6.2f} {result.reach:8.1e}  "
    if result.reach < 100 * result.floor:
        return "WRONG", numbers + "the test is blind: the first token changes nothing"
    facts = restricted.facts
    verdict = "ok" if result.ok else "WRONG"
    return verdict, f"{numbers}{facts['attentions']} attentions, masks: {', '.join(facts['masks'])}"


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    counts: dict[str, int] = {}
    print(f"{'name':20} {'verdict':8} {'seconds':>7}     error     floor  ratio    reach  found, or why not")
    for name in names or NAMES:
        start = time.time()
        verdict, details = row(name)
        counts[verdict] = counts.get(verdict, 0) + 1
        print(f"{name:20} {verdict:8} {time.time() - start:7.1f} {details}", flush=True)
    print(counts)
    bad = counts.get("WRONG", 0) + counts.get("RAISED", 0)
    return int(bad > 0 or (not names and counts.get("ok", 0) < 17))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
