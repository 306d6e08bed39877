"""token-shuffle-fusion: both sides are found however they are written, or are left with a reason."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aropt
from aropt.ir.interpreter import Eager
from aropt.models.shuffle import Layout, Shape, ShuffleAR
from aropt.passes.kv_cache import KvCache
from aropt.passes.token_shuffle_fusion import TokenShuffleFusion
from aropt.rewriting.contract import Applies, Skips, planned
from aropt.validate.compare import cases, validate, with_probe
from tests.support.run import generate
from tests.support.shuffles import (
    KNOWN,
    LEVELS,
    ROWS,
    WIDTH,
    Map,
    W,
    Written,
    alone,
    captured,
    counts,
    fused,
    ids_for,
    loop,
    plain_in,
    plain_out,
    positions,
    same_logits,
)
from tests.support.targets import EAGER


def each(m: Written, ids: Tensor) -> list[Tensor]:
    return [F.embedding(ids[..., j], m.t) for j in range(W)]


def flat_rows(m: Written, ids: Tensor) -> Tensor:
    """(b t) w -> (b t) d, as einops would."""
    known = F.embedding(ids.flatten(0, 1), m.t)
    rows = torch.where(ids.flatten(0, 1)[:, :1] >= LEVELS, known[:, 0], F.linear(known, m.d).flatten(1))
    return rows.view(ids.shape[0], ids.shape[1], -1)


def two_tables(m: Written, ids: Tensor) -> Tensor:
    """Classes in a table of their own."""
    windows = F.linear(F.embedding(ids.clamp(max=LEVELS - 1), m.t[:LEVELS]), m.d).reshape(*ids.shape[:2], -1)
    return torch.where(ids[..., :1] < LEVELS, windows, F.embedding((ids[..., 0] - LEVELS).clamp(min=0), m.t[LEVELS:]))


def flat_out(m: Written, x: Tensor) -> Tensor:
    parts = F.linear(x.reshape(-1, WIDTH), m.f).reshape(-1, WIDTH // W)
    return F.linear(F.linear(parts, m.g), m.h).view(*x.shape[:2], W, -1)


def permuted_out(m: Written, x: Tensor) -> Tensor:
    return ((x @ m.f.T).view(*x.shape[:2], W, -1).permute(2, 0, 1, 3) @ m.g.T @ m.h.T).permute(1, 2, 0, 3)


NARROW: dict[str, Map] = {
    "cat": lambda m, ids: alone(m, ids, torch.cat([F.linear(x, m.d) for x in each(m, ids)], -1)),
    "flat ids": lambda m, ids: alone(m, ids, (m.t[ids.reshape(-1)] @ m.d.T).view(*ids.shape[:2], -1)),
    "flat rows": flat_rows,
    "permute": lambda m, ids: alone(
        m, ids, F.linear(F.embedding(ids.permute(2, 0, 1), m.t), m.d).permute(1, 2, 0, 3).reshape(*ids.shape[:2], -1)
    ),
    "einsum": lambda m, ids: alone(m, ids, torch.einsum("btwd,cd->btwc", m.t[ids], m.d).flatten(2)),
    "two tables": two_tables,
}
OUT: dict[str, Map] = {
    "stack": lambda m, x: F.linear(torch.stack(F.linear(x, m.f).chunk(W, -1), 2), m.h @ m.g),
    "each": lambda m, x: torch.stack([F.linear(F.linear(F.linear(x, f), m.g), m.h) for f in m.f.chunk(W)], 2),
    "parts": lambda m, x: torch.stack([p @ m.g.T @ m.h.T for p in F.linear(x, m.f).split(WIDTH // W, -1)], 2),
    "flat": flat_out,
    "permute": permuted_out,
    "einsum": lambda m, x: torch.einsum("btd,wcd->btwc", x, m.f.view(W, -1, WIDTH)) @ (m.h @ m.g).T,
}


@cache
def usual() -> tuple[aropt.Program, aropt.Program]:
    """The model as the tests write it by default, and fused."""
    plain = captured(Written())
    return plain, fused(plain)[1]


SELDOM = {"flat ids", "permute"}
WAYS = [pytest.param(ways, id=" | ".join(ways), marks=[pytest.mark.exhaustive] * (ways[0] in SELDOM))
        for ways in zip(NARROW, OUT, strict=True)]  # fmt: skip


@pytest.mark.parametrize("ways", WAYS)
def test_other_writings_of_the_same_model_become_the_same_ops(ways: tuple[str, str]) -> None:
    first, expected = usual()
    found = fused(captured(Written(NARROW[ways[0]], OUT[ways[1]])))[1]
    assert counts(found) == (1, 1)
    assert same_logits(first, found)
    torch.testing.assert_close(found.weights["model.shuffle"], expected.weights["model.shuffle"])


REDUCE: dict[str, Map] = {
    "cat": lambda m, ids: torch.cat(each(m, ids), -1) @ m.r.T,
    "sum of products": lambda m, ids: sum(F.linear(x, r) for x, r in zip(each(m, ids), m.r.chunk(W, 1), strict=True)),
}


@pytest.mark.parametrize("way", REDUCE)
def test_rows_that_are_sums_over_places(way: str) -> None:
    model = Written(lambda m, ids: 0.5 * alone(m, ids, REDUCE[way](m, ids)))
    plan, made = fused(captured(model))
    assert counts(made) == (1, 1) and made.weights["model.shuffle"].shape == (W, KNOWN, WIDTH)
    assert "one gather sums 4 of 8 features for each of 9 ids" in str(plan)


class Renamed(nn.Module):
    """A ShuffleAR with other names, in another order."""

    def __init__(self, model: ShuffleAR) -> None:
        super().__init__()
        self.unit, self.single, self.input_vocab = model.unit, model.single, model.input_vocab
        self.null, self.capacity, self.across = model.null, model.capacity, model.across
        self.z1, self.z0 = model.head, model.expand
        self.y, self.x1, self.x0 = model.norm, model.unmix, model.mix
        self.w = model.lift
        self.b, self.a = model.column, model.row
        self.v, self.u = model.compress, model.token

    def forward(self, ids: Tensor) -> Tensor:
        b, t, _ = ids.shape
        places = [
            F.linear(F.embedding(ids[..., j], self.u.weight), self.v.weight, self.v.bias) for j in range(self.unit)
        ]
        x = torch.where(ids[:, :, 0:1] < self.single, torch.cat(places, -1), F.embedding(ids[:, :, 0], self.u.weight))
        for block in self.x0:
            x = block(x)
        at = torch.arange(t)
        x = self.y(x + self.b(at % self.across) + self.a(at // self.across))
        for block in self.x1:
            x = block(x)
        parts = F.linear(x, self.z0.weight, self.z0.bias).view(b, t, self.unit, -1)
        return F.linear(F.linear(parts, self.w.weight, self.w.bias), self.z1.weight, self.z1.bias)


def shuffled(layout: Layout = "compress", window: int = 2, width: int = 8, **more: int) -> ShuffleAR:
    """A small model whose weights are large enough for its logits to differ."""
    torch.manual_seed(0)
    sizes = {"classes": 2, "levels": LEVELS, "heads": 2, "hidden": 8, "mixing": 8, "blocks": 0, "layers": 0, **more}
    model = ShuffleAR(Shape(side=2 * window, window=window, width=width, layout=layout, **sizes))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.5)
    return model


def biased(model: ShuffleAR) -> ShuffleAR:
    """Its linear layers on both sides with biases."""
    for name in ("compress", "expand", "lift", "head"):
        layer = getattr(model, name, None)
        if layer is not None:
            layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return model


def test_names_and_their_order_decide_nothing() -> None:
    model = biased(shuffled(blocks=1))
    plain = captured(Renamed(model))
    plan, made = fused(plain)
    assert counts(made) == (1, 1)
    assert "one gather concatenates 4 of 2 features for each of 8 ids" in str(plan)
    ids = ids_for(plain, ROWS)
    torch.testing.assert_close(Eager(made).call("model", {"ids": ids})["logits"], model(ids), rtol=1e-4, atol=1e-4)
    assert validate(plain, with_probe(made), chosen=cases(plain, quick=True)).passed


@settings(max_examples=1, deadline=None)
@given(
    st.sampled_from(["compress", "concat"]), st.sampled_from([(1, 4), (2, 5), (4, 5)]), st.sampled_from([16, 32]),
    st.sampled_from([0, 0, 1]), st.booleans(), st.booleans(), st.sampled_from([0, 1]),
)  # fmt: skip
@example("concat", (4, 5), 32, 1, False, False, 1)  # sixteen places: sums in float32 were off by what they cancel
def test_a_side_is_fused_or_left_with_a_reason(
    layout: Layout, cut: tuple[int, int], width: int, blocks: int, bias: bool, bent: bool, limit: int
) -> None:
    window, levels = cut
    model = shuffled(layout, window, width, levels=levels, blocks=blocks)
    model = biased(model) if bias else model
    if bent:
        model.head = nn.Sequential(nn.Tanh(), model.head)  # type: ignore[assignment]
    plain = captured(model, levels)
    plan, made = fused(plain, limit)
    assert counts(made) == (int(limit > 0), int(not bent))
    reasons = dict(plan.rejected)
    assert ("limit=0" in reasons.get("model, in", "")) == (limit == 0)
    assert ("aten::tanh (head.0)" in reasons.get("model, out", "")) == bent
    assert isinstance(plan, Skips) == (limit == 0 and bent)
    if isinstance(plan, Applies):
        assert validate(plain, with_probe(made), chosen=cases(plain, quick=True)).passed
        prompts, room = [[levels], [levels + 2]], model.capacity * model.unit
        drawn = generate(plain, prompts, room, temperature=1.0, seed=3)
        assert generate(made, prompts, room, temperature=1.0, seed=3) == drawn


def last_ids(m: Written, ids: Tensor) -> Tensor:
    """Reads the ids of the rows before, too."""
    return plain_in(m, ids) + F.embedding(ids.cumsum(1)[..., 0] % LEVELS, m.t)


LEFT_IN: tuple[tuple[Map, str], ...] = (
    (
        lambda m, i: F.linear(F.gelu(m.t[i]), m.d).flatten(2),
        r"aten::gelu \(model\) reads ids before a window's are one",
    ),
    (
        lambda m, i: F.linear(F.layer_norm(m.t[i].transpose(2, 3), (W,)).flatten(2), m.r),
        r"aten::layer_norm \(model\) reads .*; until then only moves, sums .* and products with weights can be tables",
    ),
    (
        lambda m, i: F.linear(m.t[i] + positions(m, i.shape[1])[:, None], m.d).flatten(2),
        r"aten::add \(model\) reads .* sums of what they alone decide",
    ),
    (
        lambda m, i: m.t[(i[..., 0] * i[..., 1]) % LEVELS] + plain_in(m, i),
        "a row is no sum over its places of what each id alone decides",
    ),
    (last_ids, "a row is no sum over its places of what each id alone decides"),
)
LEFT_OUT: tuple[tuple[Map, str], ...] = (
    (
        lambda m, x: F.linear(torch.tanh(F.linear(F.linear(x, m.f).unflatten(2, (W, -1)), m.g)), m.h),
        r"aten::tanh \(model\) comes after a row is parted into a window's, and is neither linear nor a move",
    ),
    (
        lambda m, x: F.linear(F.rms_norm(F.linear(x, m.f).unflatten(2, (W, -1)), (2,)), m.h @ m.g),
        r"aten::rms_norm \(model\) comes after a row is parted",
    ),
    (
        lambda m, x: plain_out(m, x) + torch.arange(x.shape[1]).float()[:, None, None],
        r"logits are made of more than one row: of aten::tanh \(model\) and aten::_to_copy \(model\)",
    ),
    (
        lambda m, x: plain_out(m, x) + positions(m, x.shape[1])[:, None, :LEVELS],
        r"logits are made of more than one row: of aten::embedding \(model\) and aten::tanh \(model\)",
    ),
    (
        lambda m, x: m.t.flatten()[: W * LEVELS].view(W, LEVELS) * x[..., :1, None],
        "as it is written a row takes 0 multiplications, folded 160",
    ),
)


@pytest.mark.parametrize("at", range(len(LEFT_IN)))
def test_what_is_no_table_or_product_is_left_and_said(at: int) -> None:
    (way_in, why_in), (way_out, why_out) = LEFT_IN[at], LEFT_OUT[at]
    plan, made = fused(captured(Written(way_in, way_out)))
    said = dict(plan.rejected)
    assert re.search(why_in, said["model, in"]) and re.search(why_out, said["model, out"]), said
    assert isinstance(plan, Skips) and plan.reason == "; ".join(said.values())
    assert counts(made) == (0, 0)


class Biased(Written):
    """An id that was just read gets likelier."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + (ids[..., None] == torch.arange(LEVELS)).float()


class Halves(Written):
    """In bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)


def test_a_program_without_a_side_is_skipped_with_the_reason() -> None:
    plan = planned(TokenShuffleFusion(), captured(Biased()), EAGER)
    assert isinstance(plan, Skips) and "more than one row" in plan.reason


def test_a_module_in_bfloat16_is_fused_as_it_is_computed() -> None:
    plan = planned(TokenShuffleFusion(), captured(Halves()), EAGER)
    assert isinstance(plan, Applies) and len(plan.matches) == 2


def test_rows_of_one_id_are_left() -> None:
    program = loop(W, LEVELS)
    plan = planned(TokenShuffleFusion(), program.replace(meta={**program.meta, "unit": None}), EAGER)
    assert plan == Skips("a row is one id")


def tied(m: Written, x: Tensor) -> Tensor:
    return F.linear(F.linear(F.linear(x, m.f).unflatten(2, (W, -1)), m.g), m.t[:LEVELS])


def test_a_tied_table_goes_where_both_sides_are_fused_and_stays_where_one_is_not() -> None:
    plain = captured(Written(None, tied))
    both = fused(plain)[1]
    assert counts(both) == (1, 1) and "t" not in both.weights
    bent = captured(Written(None, lambda m, x: tied(m, x).tanh()))
    made = fused(bent)[1]
    assert counts(made) == (1, 0) and made.weights["t"].equal(plain.weights["t"])
    kept = fused(plain, limit=0)[1]
    assert counts(kept) == (0, 1) and "t" in kept.weights


def test_a_model_that_is_affine_from_end_to_end() -> None:
    assert counts(fused(captured(Written(middle=lambda m, x, ids: x)))[1]) == (1, 1)


def test_places_with_heads_of_their_own_take_one_product() -> None:
    plan, made = fused(captured(Written(None, lambda m, x: plain_out(m, x) + m.e[:, :LEVELS])))
    assert "model, out: one product: 160 multiplications a row, of 288" in str(plan)
    assert made.weights["model.unshuffle.0"].shape == (W, LEVELS, WIDTH) and "model.unshuffle.2" not in made.weights


class Alike(Written):
    """No id stands alone: all places share one table."""

    single, input_vocab, null = LEVELS, LEVELS, 0

    def __init__(self) -> None:
        super().__init__(lambda m, ids: F.linear(F.embedding(ids, m.t), m.d).flatten(2))


def test_places_that_are_alike_share_a_table() -> None:
    made = fused(captured(Alike()))[1]
    assert made.weights["model.shuffle"].shape == (LEVELS, WIDTH // W)


def test_what_is_left_of_the_graph() -> None:
    """Position tables and norm between the two ops; all else is folded into their weights."""
    plain = captured(shuffled())
    made = fused(plain)[1]
    ops = [str(n.target).removesuffix(".default") for n in made.graphs["model"].fx.nodes if n.op == "call_function"]
    inner = [o for o in ops if not o.startswith(("aten.sym_size", "aten.arange", "aten.floor_div", "aten.remainder"))]
    assert inner == [
        "aropt.token_shuffle", "aten.embedding", "aten.add.Tensor", "aten.embedding", "aten.add.Tensor",
        "aten.rms_norm", "aropt.token_unshuffle",
    ]  # fmt: skip
    shapes = {n: tuple(v.shape) for n, v in made.weights.items()}
    known = LEVELS + 3
    assert shapes == {
        "row.weight": (2, 8), "column.weight": (2, 8), "norm.weight": (8,), "model.shuffle": (W, known, 2),
        "model.unshuffle.0": (W, 2, 8), "model.unshuffle.2": (LEVELS, 2),
    }  # fmt: skip
    assert "token.weight" in plain.weights and counts(plain) == (0, 0), "the program before is left as it was"


def test_the_cached_step_is_fused_as_the_forward_is() -> None:
    plain = captured(shuffled(layers=1))
    made = TokenShuffleFusion().run(KvCache().run(plain))
    assert counts(made, "step") == (1, 1) and "model" not in made.graphs
    assert validate(plain, with_probe(made), chosen=cases(plain, quick=True)).passed
