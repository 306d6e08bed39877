"""Written-out attention becomes SDPA only where that is the same function."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor

from aropt.frontend.trace import capture_model
from aropt.ir.calls import op_name
from aropt.restrict.normalize import normalize_attention
from tests.support import grammar
from tests.support.equivalence import MULTIPLE
from tests.support.sneaky import LOW, Tiny, attention, bias, causal, written


def rewritten(model: torch.nn.Module, vocab: int, capacity: int) -> int:
    """How many attentions were rewritten; asserts that the logits are the same up to rounding."""
    graph, weights = capture_model(model, vocab, capacity)
    result, count = normalize_attention(graph, weights, capacity)
    ids = torch.randint(0, vocab, (2, capacity))
    with torch.no_grad():
        want, got = model(ids), result.bind(weights)(ids)[0]
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got, want, rtol=0, atol=8 * MULTIPLE * eps * float(want.abs().max()))
    assert (
        sum(op_name(n) in ("aten::scaled_dot_product_attention", "aropt::attention") for n in result.fx.nodes) >= count
    )
    return count


HEADS = torch.tensor([0.5, -2.0]).view(2, 1, 1)


def sunk(scores: Tensor) -> Tensor:
    """A column more, a number a head."""
    return torch.cat([scores, torch.tensor([0.3, -0.7]).view(1, 2, 1, 1).expand(*scores.shape[:-1], 1)], -1)


def lowered(scores: Tensor) -> Tensor:
    return scores - scores.amax(-1, keepdim=True)


def odd(scores: Tensor) -> Tensor:
    """bool [rows, 1]: every third row."""
    return (torch.arange(scores.shape[-2]) % 3 == 2)[:, None]


FORMS = {
    "bias": (1, lambda s, sees: torch.softmax(bias(s, sees), -1)),
    "where": (1, lambda s, sees: torch.softmax(torch.where(sees, s, torch.full((), LOW)), -1)),
    "fill": (1, lambda s, sees: torch.softmax(s.masked_fill(~sees, -math.inf), -1)),
    "cast": (1, lambda s, sees: torch.softmax(bias(s, sees), -1, dtype=torch.float64).float()),
    "scaled": (1, lambda s, sees: torch.softmax(bias(s * 2.0 / 3.0, sees), -1)),
    "dropout": (1, lambda s, sees: torch.nn.functional.dropout(torch.softmax(bias(s, sees), -1), 0.5, False)),
    "weak fill": (1, lambda s, sees: torch.softmax(s.masked_fill(~sees, -1e9), -1)),
    "scaled mask": (1, lambda s, sees: torch.softmax(bias(s, sees) * 0.5, -1)),
    "soft-cap": (1, lambda s, sees: torch.softmax(bias(5 * torch.tanh(s / 5), sees), -1)),
    "two masks": (1, lambda s, sees: torch.softmax(bias(bias(s, sees), sees), -1)),
    "negated": (0, lambda s, sees: torch.softmax(bias(-1.0 * s, sees), -1)),
    "after softmax": (0, lambda s, sees: torch.softmax(bias(s, sees), -1) * 0.5),
    "a bias after the sinks": (0, lambda s, sees: torch.softmax(sunk(bias(s, sees)) + HEADS, -1)[..., :-1]),
    "rows filled after the sinks": (
        0,
        lambda s, sees: torch.softmax(sunk(bias(s, sees)).masked_fill(odd(s), -1e4), -1)[..., :-1],
    ),
    "sinks": (1, lambda s, sees: torch.softmax(sunk(bias(s, sees)), -1)[..., :-1]),
    "sinks lowered too": (1, lambda s, sees: torch.softmax(lowered(sunk(bias(s, sees))), -1)[..., :-1]),
    "sinks not lowered": (0, lambda s, sees: torch.softmax(sunk(lowered(bias(s, sees))), -1)[..., :-1]),
    "lowered in the soft-cap": (0, lambda s, sees: torch.softmax(bias(2 * torch.tanh(lowered(s) / 2), sees), -1)),
    "masked, then a table": (0, lambda s, sees: torch.softmax(bias(s, sees, -1e9) * sees, -1)),
    "a table, then masked": (1, lambda s, sees: torch.softmax(bias(s * sees, sees), -1)),
    "rounded": (0, lambda s, sees: torch.softmax(bias(torch.div(s, 0.5, rounding_mode="floor"), sees), -1)),
    "whole numbers": (0, lambda s, sees: torch.softmax(bias(s.to(torch.int32).float(), sees), -1)),
    "weights of yes and no": (0, lambda s, sees: torch.softmax(bias(s, sees), -1).to(torch.bool).float()),
    "a floor that is scaled": (0, lambda s, sees: torch.softmax(torch.clamp(bias(s * 1e29, sees), -1e30) * 1e-29, -1)),
    "rows filled wholly": (
        0,
        lambda s, sees: torch.softmax(s.masked_fill(odd(s), -1e4).masked_fill(~sees, -math.inf), -1),
    ),
    "rows drowned wholly": (1, lambda s, sees: torch.softmax(s.masked_fill(odd(s), LOW), -1)),
    "lowered by a number": (0, lambda s, sees: torch.softmax(bias(s - 3.0, sees), -1)),
    "a floor that is a tensor": (1, lambda s, sees: torch.softmax(torch.max(bias(s, sees), torch.tensor(LOW)), -1)),
    "sinks, then flat": (
        1,
        lambda s, sees: torch.softmax(sunk(bias(s, sees)), -1)[..., :-1].flatten(0, 1).view(s.shape),
    ),
    "other axis": (0, lambda s, sees: torch.softmax(bias(s, sees), -2)),
}


SELDOM = {
    "where", "cast", "dropout", "weak fill", "negated", "after softmax", "rows filled after the sinks", "sinks",
    "whole numbers", "a floor that is scaled", "rows drowned wholly", "other axis", "sinks lowered too", "scaled mask",
    "two masks", "rounded", "a floor that is a tensor",
}  # fmt: skip
SPREAD = [pytest.param(n, marks=[pytest.mark.exhaustive] * (n in SELDOM)) for n in FORMS]


@pytest.mark.parametrize("name", SPREAD)
def test_forms(name: str) -> None:
    count, weigh = FORMS[name]
    torch.manual_seed(0)
    model = Tiny(**attention(written(weigh)))
    torch.nn.init.normal_(model.qkv.weight)  # scores that matter
    assert rewritten(model, 23, 12) == count


def gated(m: Tiny, q: Tensor, k: Tensor, v: Tensor, other: bool) -> Tensor:
    """Attention times a gate of its softmax' sum, as Granite's sinks are written."""
    scores = bias(q @ k.transpose(-1, -2) / math.sqrt(8), causal(q.shape[2]))
    scores = scores - scores.amax(-1, keepdim=True) if other else scores
    return (torch.softmax(scores, -1) @ v) * torch.logsumexp(scores, -1, keepdim=True).sigmoid()


@pytest.mark.parametrize("other", [False, True])
def test_the_sum_of_a_softmax_is_a_result_of_attention(other: bool) -> None:
    """Unless it is of other scores than attention's own."""
    torch.manual_seed(0)
    step = attention(lambda m, q, k, v: gated(m, q, k, v, other))
    assert rewritten(Tiny(**step), 23, 12) == (not other)


def test_attention_over_the_result_of_attention() -> None:
    """Each is read, with nothing between them but a product."""
    torch.manual_seed(0)

    def twice(m: Tiny, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sees = causal(q.shape[2])
        first = torch.softmax(bias(q @ k.transpose(-1, -2) / 3, sees), -1) @ v @ m.out.weight[:8, :8]
        return torch.softmax(bias(first @ k.transpose(-1, -2), sees), -1) @ first

    assert rewritten(Tiny(**attention(twice)), 23, 12) == 2


def test_keys_not_transposed() -> None:
    torch.manual_seed(0)
    step = attention(lambda m, q, k, v: torch.softmax(
        bias(q @ k.permute(0, 1, 3, 2), causal(q.shape[2])), -1) @ v)  # fmt: skip
    assert rewritten(Tiny(**step), 23, 12) == 1


@settings(max_examples=2, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(shape=grammar.shapes())
def test_grammar(shape: grammar.Shape) -> None:
    note(str(shape))
    rewritten(grammar.module(shape), shape.vocab, shape.capacity)
