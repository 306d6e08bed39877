"""Which passes apply to models that nobody here wrote: architectures of transformers, and plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported
from aropt.naming import WEIGHT
from aropt.passmanager import make
from tests.decoders import (
    CACHED,
    SHIFTS,
    VOCAB,
    AlibiFilled,
    Attention,
    Buffered,
    Filled,
    Gathered,
    Given,
    Leaking,
    Memory,
    MemoryGiven,
    Shared,
    Talking,
)  # fmt: skip


def reached(model: nn.Module, passes: tuple[str, ...] = ("canonicalize", "kv-cache"), new: int = 8) -> dict[str, str]:
    """{pass: status} of a model, after holding its greedy tokens against a whole forward for each token."""
    program = aropt.capture(model)
    program = aropt.optimize(program, target="eager", passes=[make(n) for n in passes], check=False)
    ids = prompts = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for _ in range(new):
            output = model(ids)
            ids = torch.cat([ids, getattr(output, "logits", output)[:, -1:].argmax(-1)], 1)
    made = torch.as_tensor(program.generate(prompts.tolist(), new)).reshape(2, -1)[:, -new:]
    assert torch.equal(made, ids[:, -new:]), (made, ids[:, -new:])
    return {p["name"]: p["status"] for p in program.report["passes"]}


QUICK = {Given, Buffered, AlibiFilled, Gathered, Talking, Memory, MemoryGiven, Shared}  # both ways in one
SPREAD = [pytest.param(k, id=k.__name__, marks=[pytest.mark.exhaustive] * (k not in QUICK)) for k in CACHED]


@pytest.mark.parametrize("kind", SPREAD)
def test_plain_modules_are_cached(kind: Any) -> None:
    assert reached(kind())["kv-cache"] == "applied"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", CACHED, ids=lambda kind: kind.__name__)
def test_plain_modules_are_cached_as_written(kind: Any) -> None:
    assert reached(kind(), ("kv-cache",))["kv-cache"] == "applied"


@pytest.mark.parametrize("kind", SHIFTS[:1] + [pytest.param(k, marks=pytest.mark.exhaustive) for k in SHIFTS[1:]])
def test_rows_that_move_are_refused_by_name(kind: Any) -> None:
    with pytest.raises(Unsupported, match="along the sequence") as refusal:
        reached(kind(), ("kv-cache",))
    assert "recurrent state" in refusal.value.why


def test_heads_that_talk_with_a_bias_leak() -> None:
    with pytest.raises(Unsupported, match="no causal mask has zeroed"):
        reached(Leaking())


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
