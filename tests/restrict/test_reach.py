"""Which passes apply to models that nobody here wrote: architectures of transformers, and plain modules."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported
from aropt.frontend.export import torch_reason
from aropt.frontend.trace import capture_model
from aropt.ir.naming import WEIGHT
from aropt.loops.positions import autoregressive
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make
from aropt.restrict.excluded import counted
from tests.support.decoders import (
    CACHED,
    SHIFTS,
    TALKING,
    VOCAB,
    AlibiFilled,
    Attention,
    Branching,
    Buffered,
    Filled,
    Gathered,
    Given,
    Memory,
    MemoryGiven,
    Rolled,
    Shared,
)  # fmt: skip
from tests.support.run import generate


def reached(model: nn.Module, passes: tuple[str, ...] = ("canonicalize", "kv-cache"), new: int = 6) -> dict[str, str]:
    """{pass: status} of a model, after holding its greedy tokens against a whole forward for each token."""
    capacity = getattr(model, "capacity", 24)
    graph, weights = capture_model(model, VOCAB, capacity)
    meta = {"name": "reach", "vocab": VOCAB, "input_vocab": VOCAB, "capacity": capacity, "never": counted(graph)}
    program = autoregressive(graph, weights, meta)
    program, results, _ = run_passes(program, [make(n) for n in passes], "eager", Instruments(check=False))
    ids = prompts = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(new):
            output = model(ids)
            ids = torch.cat([ids, getattr(output, "logits", output)[:, -1:].argmax(-1)], 1)
    made = torch.as_tensor(generate(program, prompts.tolist(), new)).reshape(2, -1)[:, -new:]
    assert torch.equal(made, ids[:, -new:]), (made, ids[:, -new:])
    return {r.name: r.status for r in results}


SMALL: dict[str, Any] = dict(
    vocab_size=VOCAB, hidden_size=32, n_embd=32, d_model=32, num_hidden_layers=1, n_layer=1, n_layers=1, num_layers=1,
    num_attention_heads=4, n_head=4, n_heads=4, attention_heads=4, num_key_value_heads=2, head_dim=8,
    intermediate_size=32, ffn_dim=32, intermediate_size_mlp=32, max_position_embeddings=32, n_positions=32,
    max_seq_len=32, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=8,
    qk_nope_head_dim=8, v_head_dim=16, sliding_window=4, rotary_dim=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    is_decoder=True, tie_word_embeddings=False,
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {},  # learned positions
    "openai-gpt": {},  # a mask as long as the capacity, multiplied and added
    "bloom": {},  # ALiBi in an additive mask
    "mpt": {},  # ALiBi counted from the end
    "gemma2": {},  # soft caps, and a window
    "gpt_oss": {},  # sinks, experts, windows
    "granite_swa": {},  # sinks by a logsumexp
    "mistral": {},  # a window
    "mixtral": {},  # experts
    "llama4_text": {"num_hidden_layers": 2},  # complex rotary, repeated rows, layers without positions
    "falcon": {"multi_query": True, "parallel_attn": True},  # one key head, attention beside the MLP
    "gptj": {},  # rotary of a part of the features, interleaved
    "cohere": {},  # parallel blocks, interleaved rotary
    "deepseek_v2": {"num_key_value_heads": 4},  # latent attention
    "xglm": {},  # sinusoids after an offset
    "roberta": {},  # positions that are counted from the tokens
}

CANONICAL = {"gpt2", "falcon", "roberta"}  # as they are


def tiny(kind: str, changes: dict[str, Any]) -> nn.Module:
    """A random model of an architecture of transformers."""
    transformers = pytest.importorskip("transformers")
    make_config = transformers.CONFIG_MAPPING[kind]
    known = vars(make_config())
    config = make_config(**{k: v for k, v in SMALL.items() if k in known or k in make_config.attribute_map} | changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


# What these have others have among several things.
SELDOM = {"openai-gpt", "bloom", "granite_swa", "mistral", "mixtral", "gptj"}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.exhaustive] * (k in SELDOM)) for k in KINDS])
def test_architectures_are_cached(kind: str) -> None:
    canonical = "skipped" if kind in CANONICAL else "applied"
    assert reached(tiny(kind, KINDS[kind])) == {"canonicalize": canonical, "kv-cache": "applied"}


QUICK = {Given, Buffered, AlibiFilled, Gathered, Memory, MemoryGiven, Shared}  # both ways in one
SPREAD = [pytest.param(k, id=k.__name__, marks=[pytest.mark.exhaustive] * (k not in QUICK)) for k in CACHED]


@pytest.mark.parametrize("kind", SPREAD)
def test_plain_modules_are_cached(kind: Any) -> None:
    assert reached(kind())["kv-cache"] == "applied"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", CACHED, ids=lambda kind: kind.__name__)
def test_plain_modules_are_cached_as_written(kind: Any) -> None:
    assert reached(kind(), ("kv-cache",))["kv-cache"] == "applied"


BESIDES = {"Joined", "Depthwise"}  # test_convolved has the like


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.exhaustive] * (k.__name__ in BESIDES)) for k in SHIFTS]
)
def test_shifts_and_convolutions_are_cached(kind: Any) -> None:
    assert reached(kind(), ("kv-cache",))["kv-cache"] == "applied"


def test_rows_that_move_in_a_circle_are_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="along the sequence") as refusal:
        reached(Rolled(), ("kv-cache",))
    assert "recurrent state" in refusal.value.why


@pytest.mark.parametrize("kind", TALKING, ids=lambda kind: kind.__name__)
def test_attention_in_another_form_is_refused_by_name(kind: Any) -> None:
    """Heads that talk mix scores, or weights, in a way that no attention op has."""
    with pytest.raises(Unsupported, match="written out in a form that is not known") as refusal:
        reached(kind(), ("kv-cache",))
    assert re.search(r"aten::(conv2d|bmm|permute|view).* lies between|are laid out", refusal.value.why), (
        refusal.value.why
    )


def test_weights_of_any_name_have_legal_ones() -> None:
    class Named(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.scales = nn.ParameterDict(
                {"a-b": torch.rand(VOCAB), "a_b": torch.rand(VOCAB), "é 1e-5": torch.rand(1)}
            )

        def forward(self, ids: Tensor) -> Tensor:
            scales = self.scales
            return super().forward(ids) * scales["a-b"] * (1 + scales["a_b"]) + scales["é 1e-5"]

    model = Named()
    program = aropt.capture(model)
    assert all(WEIGHT.fullmatch(name) for name in program.weights), list(program.weights)
    held = [w for n, w in program.weights.items() if "scales" in n]
    assert len(held) == 3 and all(any(w is p or torch.equal(w, p) for w in held) for p in model.scales.values())
    assert reached(model)["kv-cache"] == "applied"


def test_a_program_without_a_cache_says_so_first() -> None:
    passes = [make(n) for n in ("canonicalize", "kv-cache")]
    without = aropt.optimize(aropt.capture(Filled()), target="eager", passes=passes[:1], check=False).report
    assert without["notes"][0] == without["uncached"] and without["uncached"].startswith("NO CACHE")
    assert "kv-cache was left out" in without["uncached"]
    assert not aropt.optimize(aropt.capture(Filled()), target="eager", passes=passes, check=False).report["uncached"]


def test_a_branch_on_the_length_bounds_the_capacity() -> None:
    with pytest.raises(Unsupported, match="more than 20 tokens") as refusal:
        aropt.capture(Branching(), capacity=32)
    assert "--capacity 20" in refusal.value.hint
    program = aropt.capture(Branching())
    assert program.meta["capacity"] == 20 and "20 tokens" in program.meta["limit"]


@pytest.mark.exhaustive
def test_rotary_that_depends_on_the_length_is_taken_up_to_it() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    assert reached(tiny("llama", {"rope_parameters": dynamic}))["kv-cache"] == "applied"
    scaled = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    long = {"rope_type": "longrope", "rope_theta": 10000.0, **scaled}
    model = tiny("phi3", {"rope_parameters": long, "original_max_position_embeddings": 16})
    passes = [make("canonicalize"), make("kv-cache")]
    with pytest.raises(Unsupported, match="use --capacity 16 or less"):
        aropt.optimize(aropt.capture(model, capacity=32), target="eager", passes=passes)
    program = aropt.optimize(aropt.capture(model, capacity=16), target="eager", passes=passes)
    assert not program.report["uncached"]


def test_torch_says_why_in_words() -> None:
    text = "RuntimeError when making fake tensor call\n  failed on FakeTensor(..., device='meta', size=(s26, 4)) * 2"
    assert torch_reason(text, "failed") == "failed on [s26, 4] * 2"
    guard = (
        "Constraints violated (T)!\n  - Not all values of T = L['ids'].size()[1] in the specified range satisfy 2 <= T"
    )
    assert torch_reason(guard, "- ") == "Not all values of T in the range satisfy 2 <= T"
