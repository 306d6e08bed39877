"""Slips of lengths: prompts of other sizes than few, answers that are long, caches that grow in a batch."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.mutants.corners.slips import ask, family, give, patched, take, where
from tests.mutants.surgery import reweigh

slip = family("lengths")


def first_key_lost(k: Tensor) -> Tensor:
    k = k.clone()
    k[:, :, 0] = 0
    return k


slip(
    "prompts_of_17_to_62_lose_a_key",
    "lean",
    ask([20, 20, 20, 20], 20),
    give("k_0", lambda k, feed: first_key_lost(k) if 17 <= feed.shape[1] <= 62 else k, "feed"),
)
slip(
    "prompts_of_33_to_62_one_position_on",
    "lean",
    ask([40], 8),
    give("positions", lambda at, filled, feed: at + int(32 < feed.shape[1] < 63) * (at > 20).long(), "filled", "feed"),
)
slip(
    "prompt_of_32_loses_its_start",
    "full",
    ask([32] * 4, 20),
    take("feed", lambda x: torch.cat([x[:, 1:2], x[:, 1:]], 1) if x.shape[1] == 32 else x, graph="step"),
)
slip(
    "prompts_of_80_to_160_lose_a_value",
    "lean",
    ask([100] * 4, 20),
    give("v_1", lambda v, feed: first_key_lost(v) if 80 <= feed.shape[1] <= 160 else v, "feed"),
)
slip(
    "prompts_of_11_to_15_backwards",
    "full",
    ask([13], 8),
    take("feed", lambda x: x.flip(1) if 11 <= x.shape[1] <= 15 else x, graph="step"),
)
slip(
    "long_prompts_drawn_greedily",
    "lean",
    ask([20] * 6, 12, temperature=1.5),
    take(
        "temperature",
        lambda t, filled, feed: t * 0 + 1e-4 if filled + feed.shape[1] > 60 or feed.shape[1] > 16 else t,
        "filled",
        "feed",
    ),
)
slip("drawn_after_43_rows", "lean", ask([4], 60, temperature=1.0), give("position", lambda at: at.clamp(max=48)))
slip("noise_repeats_after_64", "lean", ask([60], 16, temperature=1.0), give("position", lambda at: at % 64))
slip(
    "batches_forget_when_caches_grow",
    "lean",
    ask([40, 40], 40),
    give("k_0", lambda k: patched(k, slice(1, None), lambda x: first_key_lost(x)) if k.shape[2] > 64 else k),
)
slip(
    "ragged_batches_forget_when_caches_grow",
    "dense",
    ask([40, 33], 40),
    give("v_0", lambda v: v.roll(1, 2) if v.shape[2] > 64 and len(v) > 1 else v, graph="ragged"),
)
slip(
    "drawing_forgets_after_64",
    "lean",
    ask([70, 70, 70, 70], 20, temperature=1.5),
    give("k_1", lambda k, filled, temperature: first_key_lost(k) if filled > 64 else k, "filled", "temperature"),
)
slip(
    "rows_traded_at_capacity",
    "lean",
    ask([150] * 12, 27, temperature=1.5),
    give("v_0", lambda v, filled: v.roll(1, 0) if len(v) > 1 and filled > 174 else v, "filled"),
)
slip(
    "one_token_drawn_at_one",
    "lean",
    ask(8, 1, temperature=3.0),
    take("temperature", lambda t, limit: where(limit == 1, 1.0, t), "limit"),
)
slip(
    "two_tokens_are_one",
    "lean",
    ask(1, 2),
    give("finished", lambda end, limit: end | (limit == 2), "limit", graph="step"),
)
slip(
    "limits_of_5_to_15_one_short",
    "full",
    ask(1, 10),
    give(
        "finished",
        lambda end, count, limit: end | ((limit > 4) & (limit < 16) & (count + 2 >= limit)),
        "count",
        "limit",
        graph="step",
    ),
)
slip(
    "limits_of_41_to_100_end_at_40",
    "lean",
    ask(1, 60),
    give(
        "finished",
        lambda end, count, limit: end | ((limit > 40) & (limit < 101) & (count + 1 >= 40)),
        "count",
        "limit",
        graph="step",
    ),
)
slip(
    "positions_50_and_51_traded",
    "full",
    ask([46] * 3, 12),
    lambda p: reweigh(p, "positions.embedding", lambda w: w[[*range(50), 51, 50, *range(52, len(w))]]),
)
slip(
    "greedy_beyond_40_sees_less",
    "lean",
    ask([3], 60),
    give(
        "slot_positions",
        lambda at, filled, feed: where((at == 1) & (filled > 44) & (filled < 66), -1, at),
        "filled",
        "feed",
        graph="greedy",
    ),
)
slip(
    "window_off_in_long_answers",
    "window",
    ask([5], 70),
    give(
        "slot_positions",
        lambda at, filled: where((at >= 0) & (at == filled - 20) & (filled > 60) & (filled < 75), -1, at),
        "filled",
    ),
)
slip(
    "prompt_longer_than_the_window",
    "window",
    ask([40], 8),
    give("k_0", lambda k, feed: k.roll(1, 2) if 24 < feed.shape[1] < 60 else k, "feed"),
)
slip(
    "prompt_as_long_as_the_window",
    "window",
    ask([24], 8),
    give("k_0", lambda k, feed: first_key_lost(k) if feed.shape[1] == 24 else k, "feed"),
)
slip(
    "seen_within_16_of_the_prompt",
    "full",
    ask([30], 20, repetition_penalty=3.0),
    give("seen", lambda x, prompt: (x & False) if 16 < prompt.shape[1] < 63 else x, "prompt", graph="begin"),
)
slip(
    "marks_no_more_after_25",
    "full",
    ask([3] * 4, 60, repetition_penalty=3.0),
    give("seen", lambda new, seen, count: where(count > 42, seen, new), "seen", "count"),
)
slip(
    "drawn_marks_no_more_after_18",
    "full",
    ask([3], 40, repetition_penalty=2.0, temperature=1.0),
    give("seen", lambda new, seen, count, temperature: where((count > 18), seen, new), "seen", "count", "temperature"),
)
slip(
    "dense_count_off_after_64",
    "dense",
    ask([60], 12, temperature=0.9),
    give("total", lambda total, temperature: total - (total > 64).to(total.dtype), "temperature", graph="step"),
)
slip(
    "dense_prompts_of_17_to_62",
    "dense",
    ask([25] * 4, 20),
    give("v_0", lambda v, feed: first_key_lost(v) if 17 <= feed.shape[1] <= 62 else v, "feed", graph="step"),
)
