"""Which passes apply to models that nobody here wrote: architectures of transformers, and plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aropt
from aropt.naming import WEIGHT
from aropt.passmanager import make

VOCAB = 40


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


class Attention(nn.Module):
    """A decoder of one layer of written-out attention; subclasses change a part of it."""

    capacity, heads, size = 32, 2, 8

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = self.heads * self.size
        self.embed, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB)
        self.qkv = nn.Linear(width, 3 * width)

    def hidden(self, length: int) -> Tensor:
        """What is added to the scores [.., T, T]."""
        return torch.triu(torch.full((length, length), float("-inf")), 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / self.size**0.5 + self.hidden(q.shape[-2])).softmax(-1) @ v

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        x = self.embed(ids)
        q, k, v = (y.view(b, t, self.heads, self.size).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.head(x + self.attend(q, k, v).transpose(1, 2).reshape(b, t, -1))


class Filled(Attention):
    """A mask of numbers that no name can hold."""

    def hidden(self, length: int) -> Tensor:
        return torch.triu(torch.full((length, length), -1e9), 1)


class Given(Filled):
    """The mask goes to SDPA."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.hidden(q.shape[-2]))


MODULES = [Attention, Filled, Given]


@pytest.mark.parametrize("kind", MODULES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("passes", [("kv-cache",), ("canonicalize", "kv-cache")], ids=["alone", "both"])
def test_plain_modules_are_cached(kind: Any, passes: tuple[str, ...]) -> None:
    assert reached(kind(), passes)["kv-cache"] == "applied"


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
