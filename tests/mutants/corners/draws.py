"""Slips of draws: noise, filters and the order of what a rule does."""

from __future__ import annotations

import torch
from torch import Tensor

from aropt.ir import ops
from tests.mutants.corners.bases import VOCAB
from tests.mutants.corners.slips import Change, ask, family, take, where
from tests.mutants.rule import noise
from tests.mutants.surgery import aten, reads, swap

slip = family("draws")
NOISE, KEEP = (ops.load(name).overload for name in ("noise", "keep_top"))


def uniform(change: object) -> Change:
    """The uniform numbers of the noise, [N, V], otherwise."""
    return lambda p: swap(p, NOISE, lambda *a: change(NOISE(*a)))  # type: ignore[operator]


def kept(name: str, change: object) -> Change:
    """What the filter of that parameter keeps: change(logits, k, p, right)."""
    return lambda p: swap(p, KEEP, lambda x, k, t: change(x, k, t, KEEP(x, k, t)), reads(name))  # type: ignore[operator]


def columns(x: Tensor, start: int, by: Tensor | float) -> Tensor:
    x = x.clone()
    x[:, start:] = by
    return x


slip("noise_of_ids_beyond_40_is_a_half", "lean", ask(3, 30, temperature=2.0), uniform(lambda u: columns(u, 40, 0.5)))
slip(
    "noise_of_half_precision",
    "lean",
    ask(8, 60, temperature=2.0),
    uniform(lambda u: u.half().float().clamp(1e-4, 0.999)),
)
slip(
    "noise_within_a_hundredth_of_its_ends", "lean", ask(6, 60, temperature=3.0), uniform(lambda u: u.clamp(0.01, 0.99))
)
slip("noise_of_ids_of_16", "full", ask(2, 20, temperature=2.0), uniform(lambda u: torch.cat([u[:, :16]] * 3, 1)))
slip(
    "noise_of_the_first_row_beyond_three",
    "full",
    ask(4, 12, temperature=2.0),
    uniform(lambda u: u[:1].expand_as(u).clone() if len(u) > 3 else u),
)
slip(
    "noise_backwards_in_wide_batches",
    "guided",
    ask(5, 12, temperature=1.0, guidance=2.0),
    uniform(lambda u: u.flip(0) if len(u) > 4 else u),
)
slip(
    "noise_at_high_places_twice",
    "window",
    ask([70], 20, temperature=1.0),
    lambda p: noise(p, lambda seed, streams, at, n: (seed, streams, where(at > 66, at // 2 * 2, at), n)),
)
slip(
    "noise_of_16_bit_places",
    "lean",
    ask([30], 30, temperature=1.0),
    lambda p: noise(p, lambda seed, streams, at, n: (seed, streams, where(at > 48, at % 32, at), n)),
)
slip(
    "noise_seed_and_stream_summed",
    "lean",
    ask(2, 16, temperature=1.0, seed=4, streams=[2, 3]),
    lambda p: noise(
        p,
        lambda seed, streams, at, n: (
            seed + streams[0] - streams[0],
            where((streams > 1) & (seed > 3) & (seed < 99), streams + seed, streams),
            at,
            n,
        ),
    ),
)
slip(
    "top_k_of_many_keeps_one_less",
    "lean",
    ask(6, 60, temperature=4.0, top_k=16),
    kept("top_k", lambda x, k, t, right: KEEP(x, k - 1, None) if k > 8 else right),
)
slip(
    "top_k_by_the_first_32_ids",
    "full",
    ask(3, 40, temperature=2.0, top_k=3),
    kept(
        "top_k",
        lambda x, k, t, right: where((x >= columns(x, 32, -torch.inf).topk(3).values[:, -1:]) & (k == 3), x, right),
    ),
)
slip(
    "top_k_of_one_row_for_all",
    "lean",
    ask(4, 20, temperature=2.0, top_k=12),
    kept("top_k", lambda x, k, t, right: torch.where((right[:1] > -torch.inf), x, -torch.inf) if k > 9 else right),
)
slip(
    "top_p_of_many_rows_summed",
    "lean",
    ask(4, 20, temperature=1.0, top_p=0.7),
    kept("top_p", lambda x, k, p, right: KEEP(x, None, p**2) if len(x) > 3 else right),
)
slip(
    "top_p_keeps_eight_at_most",
    "lean",
    ask(3, 60, temperature=3.0, top_p=0.97),
    kept(
        "top_p",
        lambda x, k, p, right: torch.where((right >= right.topk(8).values[:, -1:]) | (p >= 1), right, -torch.inf),
    ),
)
slip(
    "top_p_of_a_tenth_is_the_best",
    "lean",
    ask(6, 60, temperature=6.0, top_p=0.1),
    kept(
        "top_p",
        lambda x, k, p, right: torch.where((right == right.amax(1, keepdim=True)) | (p > 0.15), right, -torch.inf),
    ),
)
slip(
    "min_p_from_the_best_of_all_rows",
    "full",
    ask(5, 20, temperature=2.0, min_p=0.3),
    lambda p: swap(
        p,
        aten.amax.default,
        lambda x, *a: x.amax(*a).amax(0, keepdim=True).expand(len(x), 1) if len(x) > 3 else x.amax(*a),
    ),
)
slip(
    "penalty_after_the_temperature",
    "full",
    ask(2, 40, temperature=0.5, repetition_penalty=1.6),
    take("repetition_penalty", lambda x, t: where(t < 0.8, 1 + (x - 1) * t, x), "temperature", graph="sample"),
)
slip(
    "penalty_of_negatives_alone",
    "full",
    ask(3, 40, repetition_penalty=1.4),
    lambda p: swap(p, aten.div.Tensor, lambda x, y: x if y < 4 and y != 1.2 else x / y, reads("repetition_penalty", 1)),
)
slip(
    "temperature_squared_when_cold",
    "full",
    ask(2, 40, temperature=0.6),
    lambda p: swap(p, aten.clamp.default, lambda t, low: where(t < 0.8, t * t, t.clamp(low)), reads("temperature", 0)),
)
slip(
    "gumbel_of_cold_draws_halved",
    "window",
    ask(2, 40, temperature=0.6),
    lambda p: take("temperature", lambda t: where(t < 0.75, t / 2, t))(p),
)
slip(
    "bias_of_ids_beyond_24_unused",
    "full",
    ask(2, 30, temperature=1.0, bias=[0.0] * 24 + [1.5, -1.5] * 12),
    take("bias", lambda b: torch.cat([b[:24], b[:1].expand(VOCAB - 24)]).where(b[:24].abs().max() == 0, b)),
)
slip(
    "hot_draws_are_hotter",
    "guided",
    ask(2, 30, temperature=3.0, guidance=1.5),
    take("temperature", lambda t: where(t > 2.5, 2 * t, t)),
)
