"""fuse-attention, merge-linears and what recognises attention by its behaviour."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import aropt
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.kernels.cached_attention import rotated
from aropt.passes.fuse_attention import FuseAttention
from aropt.passes.kv_cache import KvCache
from aropt.passes.merge_linears import MergeLinears
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.rewriting.attention import NotThis, matches
from aropt.rewriting.contract import Applies, Skips
from aropt.targets import lower
from aropt.validate.compare import cases, validate, with_probe
from tests.support.run import generate
from tests.support.targets import EAGER, ORT

CAPACITY = 20


class Small(nn.Module):
    """A causal layer whose rotary embedding, projection and mask are written as `style` says."""

    capacity = CAPACITY

    def __init__(self, rotary: str = "halves", projection: str = "apart", mask: str = "causal", size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.rotary, self.projection, self.mask, self.size = rotary, projection, mask, size
        self.embed, self.out = nn.Embedding(13, 24), nn.Linear(24, 13)
        widths = {"apart": (4, 2, 2), "packed": (8,), "swapped": (8,)}[projection]
        self.inputs = nn.ModuleList(nn.Linear(24, n * size, bias=projection == "packed") for n in widths)
        self.output = nn.Linear(4 * size, 24)
        angles = torch.arange(CAPACITY)[:, None] / 100 ** (torch.arange(size // 2) / (size // 2))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        t = x.shape[2]
        cos, sin = self.cos[:t], self.sin[:t]
        match self.rotary:
            case "halves":  # as transformers writes it
                cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
                half = x.shape[-1] // 2
                return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin
            case "pairs":
                a, b = x[..., 0::2], x[..., 1::2]
                return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
            case "part":
                front, rest = x[..., :16], x[..., 16:]
                return torch.cat([rotated(front, cos[:, :8], sin[:, :8], False), rest], -1)
            case "wrong":  # a reflection is no rotation
                a, b = x.chunk(2, -1)
                return torch.cat([a * cos - b * sin, a * sin - b * cos], -1)
        return x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        (b, t), size = ids.shape, self.size
        x = self.embed(ids)
        parts = [linear(x) for linear in self.inputs]
        if len(parts) == 1:
            widths = [4 * size, 2 * size, 2 * size]
            parts = list(parts[0].split(widths if self.projection == "packed" else widths[::-1], -1))
            parts = parts if self.projection == "packed" else parts[::-1]
        q, k, v = (p.view(b, t, -1, size).transpose(1, 2) for p in parts)
        q, k = self.turn(q), self.turn(k)
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        row, column = torch.arange(t)[:, None], torch.arange(t)
        seen = column <= row
        if self.mask == "window":
            seen = seen & (column > row - 5)
        if self.mask == "stripes":
            seen = seen & (((row - column) % 2 == 0) | (row == column))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.out(F.silu(x + self.output(mixed.transpose(1, 2).reshape(b, t, -1))))


def cached(model: nn.Module) -> Program:
    passes = pipeline(dropped=("fuse-attention", "fuse-sampler", "prune"))
    return run_passes(aropt.capture(model), passes, "onnxruntime", Instruments(check=False))[0]


def numbers(program: Program) -> Any:
    (found,) = matches(program.graphs["step"], program.weights, CAPACITY)
    return found


@pytest.mark.parametrize(
    ("rotary", "projection"),
    [
        ("halves", "apart"),
        ("part", "swapped"),
        *(
            pytest.param(*p, marks=pytest.mark.exhaustive)
            for p in (("pairs", "packed"), ("none", "apart"), ("halves", "swapped"))
        ),
    ],
)
def test_attention_is_recognised(rotary: str, projection: str) -> None:
    model = Small(rotary, projection, size=32 if rotary == "part" else 16)
    found = numbers(cached(model))
    assert found.numbers[:2] == (4, 2) and found.numbers[3] == 0
    assert (found.rotary is None) == (rotary == "none")
    if found.rotary is not None:
        assert found.rotary.interleaved == (rotary == "pairs")
        width = 8 if rotary == "part" else 8 if rotary != "none" else 0
        torch.testing.assert_close(found.rotary.cos, model.cos[:, :width], rtol=1e-6, atol=1e-6)
    assert len(found.rows) == (3 if projection == "swapped" else 1), "what lies in order is taken as one"


def test_windows_are_recognised() -> None:
    assert numbers(cached(Small(mask="window"))).numbers[3] == 5


@pytest.mark.parametrize(
    ("style", "why"),
    [
        ({"rotary": "wrong"}, "in order|not a rotation"),
        ({"mask": "stripes"}, "neither causal nor"),
        ({"size": 12}, "multiples of"),
    ],
)
def test_what_the_kernel_does_not_compute_is_left_alone(style: dict[str, Any], why: str) -> None:
    program = cached(Small(**{"rotary": "none", **style}))
    plan = FuseAttention().plan(program, ORT)
    assert isinstance(plan, Skips) and re.search(why, plan.reason) and plan.rejected
    with pytest.raises(NotThis, match=why):
        numbers(program)


def test_only_where_there_is_a_kernel() -> None:
    program = cached(Small())
    assert isinstance(FuseAttention().plan(program, EAGER), Skips)
    assert isinstance(FuseAttention().plan(program, ORT), Applies)
    assert isinstance(FuseAttention().plan(FuseAttention().run(program), ORT), Skips), "once is enough"


@pytest.mark.parametrize(
    "style",
    [
        {"rotary": "pairs", "mask": "window"},
        *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ({}, {"rotary": "part", "size": 32})),
    ],
)
def test_fused_programs_generate_the_same(style: dict[str, Any]) -> None:
    """On the reference interpreter and on ONNX Runtime: even and ragged batches, up to the capacity."""
    plain = aropt.capture(Small(**style))
    fast, results, _ = run_passes(plain, pipeline(), "onnxruntime", Instruments(check=False))
    assert {r.name: r.status for r in results}["fuse-attention"] == "applied"
    assert {"step_greedy", "ragged_greedy", "step_sample", "ragged_sample"} <= set(fast.graphs)
    assert (
        "slots" not in fast.graphs["step_greedy"].inputs and "slot_positions" not in fast.graphs["step_greedy"].inputs
    )
    probed = with_probe(fast)
    for executor in (None, lower(probed, "onnxruntime")):
        verdict = validate(plain, probed, executor, cases(plain, quick=executor is None))
        assert verdict.passed, [(o.case.name, o.problem) for o in verdict.outcomes if o.problem]


@pytest.mark.exhaustive
def test_fused_caches_are_updated_in_place() -> None:
    fast = run_passes(aropt.capture(Small()), pipeline(), "onnxruntime", Instruments(check=False)).program
    assert fast.graphs["step_greedy"].aliases == {"k_0": "k_0", "v_0": "v_0"}
    seen: list[int] = []
    generate(
        fast, [[1, 2]], 5, executor=lower(fast, "onnxruntime"), on_round=lambda v: seen.append(v["k_0"].data_ptr())
    )
    assert len(set(seen)) == 1 and len(seen) == 5


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=5))
def test_merged_linears_are_the_same(linears: list[tuple[int, bool]]) -> None:
    """Any number of layers, with and without biases."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(len(linears))
            self.embed, self.out = nn.Embedding(7, 6), nn.Linear(sum(n for n, _ in linears), 7)
            self.layers = nn.ModuleList(nn.Linear(6, n, bias=bias) for n, bias in linears)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            return self.out(torch.cat([layer(x) for layer in self.layers], -1))

    plain = aropt.capture(Model(), capacity=8)
    counts = [sum(bias is kind for _, bias in linears) for kind in (False, True)]
    plan = MergeLinears().plan(plain, EAGER)
    if max(counts) < 2:
        assert isinstance(plan, Skips)
        return
    merged = MergeLinears().run(plain)
    assert isinstance(plan, Applies) and len(plan.matches) == sum(n > 1 for n in counts)
    ids = torch.tensor([[1, 5, 2]])
    want, got = (p.graphs["model"].bind(p.weights)(ids)[0] for p in (plain, merged))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert set(merged.weights) == {w for g in merged.graphs.values() for w in g.weights()}, "what was merged is gone"


@pytest.mark.exhaustive
def test_merging_keeps_to_its_limit() -> None:
    assert isinstance(MergeLinears(limit=0).plan(aropt.capture(Small()), EAGER), Skips)
    program = KvCache().run(aropt.capture(Small()))
    assert text(MergeLinears().run(program)).count("aten.linear") < text(program).count("aten.linear")
