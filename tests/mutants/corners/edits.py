"""Slips of graphs and constants: what no request in particular needs, or what one input in many shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.mutants.corners.slips import Change, ask, family, give, patched, take, where
from tests.mutants.surgery import aten, reweigh, swap

slip = family("edits")
SDPA = aten.scaled_dot_product_attention.default


def row_of(name: str, row: int, by: float) -> Change:
    """A row of a weight, multiplied."""
    return lambda p: reweigh(p, name, lambda w: patched(w, row, lambda x: x * by))


def attention(change: object) -> Change:
    """Attention, where change(q, k, v, mask) gives other arguments."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *rest: object, **more: object) -> Tensor:
        return F.scaled_dot_product_attention(*change(q, k, v, mask), *rest, **more)  # type: ignore[operator]

    return lambda p: swap(p, SDPA, attend)


def scored(mask: Tensor, low: float) -> Tensor:
    """The mask as numbers to add."""
    return torch.where(mask, 0.0, low)


slip("embedding_of_one_id_negated", "lean", ask([20], 6, prompts=[[47, 1, 47, 2, 47]]), row_of("emb.weight", 47, -1.0))
slip("embedding_of_id_0_is_zero", "full", ask([3], 6, prompts=[[0, 1, 0]]), row_of("emb.weight", 0, 0.0))
slip("logit_of_the_last_id_off", "lean", ask(4, 20), row_of("head.weight", 47, 1.5))
slip(
    "angles_beyond_90_off",
    "lean",
    ask([120], 8),
    lambda p: reweigh(p, "positions.cos", lambda w: torch.cat([w[:90], w[90:].flip(0)])),
)
slip(
    "angles_of_one_position_off",
    "lean",
    ask([40, 40, 40, 40], 20),
    lambda p: reweigh(p, "positions.sin", lambda w: patched(w, 37, lambda x: -x)),
)
slip(
    "positions_beyond_100_alike",
    "full",
    ask([110], 8),
    lambda p: reweigh(p, "positions.embedding", lambda w: torch.cat([w[:100], w[100:101].expand(len(w) - 100, -1)])),
)
slip("keys_of_16_bits", "lean", ask([30], 60), give("k_0", lambda k: k.bfloat16().float()))
slip(
    "values_of_16_bits_after_64",
    "lean",
    ask([64] * 6, 60, temperature=2.0),
    give("v_1", lambda v, filled: v.bfloat16().float() if filled > 66 else v, "filled"),
)
slip("masked_scores_leak", "lean", ask([12, 3], 30), attention(lambda q, k, v, m: (q, k, v, scored(m, -6.0))))
slip(
    "masked_scores_leak_beyond_three_rows",
    "window",
    ask([12, 3, 9, 4], 30),
    attention(lambda q, k, v, m: (q, k, v, scored(m, -4.0) if len(q) > 3 else m)),
)
slip(
    "few_rows_of_batches_see_all",
    "lean",
    ask([9, 2, 4, 7, 3, 5], 12),
    attention(lambda q, k, v, m: (q, k, v, m[:1].expand(len(q), -1, -1, -1) if len(q) > 5 else m)),
)
slip(
    "masks_of_wide_batches_of_the_first_row",
    "window",
    ask([9, 2, 4, 7, 3], 12),
    attention(lambda q, k, v, m: (q, k, v, m[:1].expand(len(q), -1, -1, -1) if len(q) > 4 else m)),
)
slip(
    "queries_of_long_prompts_lost",
    "full",
    ask([35] * 4, 20),
    attention(lambda q, k, v, m: (q * 0 if 17 <= q.shape[2] < 63 else q, k, v, m)),
)
slip(
    "gate_straight_where_it_is_large",
    "lean",
    ask(4, 60),
    lambda p: swap(p, aten.silu.default, lambda x: torch.where(x > 2.0, x, F.silu(x))),
)
slip(
    "norms_by_n_minus_1",
    "guided",
    ask(3, 40, guidance=2.0),
    lambda p: swap(
        p,
        aten.layer_norm.default,
        lambda x, shape, w, b, eps, *_: F.layer_norm(x, shape, w, b, eps) * (1 - 1 / shape[0]) ** 0.5,
    ),
)
slip(
    "rows_of_one_id_again_repeat",
    "lean",
    ask([6], 20, prompts=[[7] * 6]),
    give("k_0", lambda k, feed: k.flip(2) * 0.5 if feed.shape[1] > 2 and feed.unique().numel() == 1 else k, "feed"),
)
slip(
    "prompts_with_the_last_id_lose_it",
    "window",
    ask([5], 12, prompts=[[4, 47, 3, 2, 1]]),
    take("feed", lambda x: where(x == 47, 46, x), graph="step"),
)
slip(
    "greedy_prefers_low_ids_in_batches",
    "full",
    ask(5, 30),
    give("row", lambda x: x + 0.3 * (torch.arange(x.shape[1]) < 8) if len(x) > 3 else x, graph="greedy"),
)
slip(
    "logits_of_half_precision_in_batches",
    "lean",
    ask(8, 60),
    give("row", lambda x: x.bfloat16().float() if len(x) > 3 else x),
)
slip(
    "unconditional_prompt_cut_at_16",
    "guided",
    ask([30], 12, guidance=4.0),
    give(
        "feed",
        lambda x: (
            torch.cat([x[: len(x) // 2], where(torch.arange(x.shape[1]) < 14, 0, x[len(x) // 2 :])])
            if x.shape[1] > 16
            else x
        ),
        graph="begin",
    ),
)
slip(
    "negative_prompts_of_batches_of_the_first",
    "guided",
    ask(4, 12, guidance=4.0, negative=[[9, 8, 7, 6, i] for i in (5, 15, 25, 35)]),
    give(
        "feed",
        lambda x: (
            torch.cat([x[: len(x) // 2], x[len(x) // 2 : len(x) // 2 + 1].expand(len(x) // 2, -1)]) if len(x) > 7 else x
        ),
        graph="begin",
    ),
)
slip(
    "late_intervals_forget_a_row",
    "interval",
    ask(1, 30, guidance=5.0, guidance_from=14, guidance_to=25),
    lambda p: give("feed", lambda x: torch.cat([x[:, 1:2], x[:, 1:]], 1) if x.shape[1] > 9 else x, graph="pend")(p),
)
