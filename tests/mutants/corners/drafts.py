"""Slips of rounds that check drafts: after long prompts, at high temperatures, late, with stop ids inside a draft."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.corners.slips import ask, family, give, patched, take, where
from tests.mutants.surgery import aten, swap

slip = family("drafts")
AGAIN = [[3, 1, 4, 1, 5, 9, 2, 6] * 6]  # a text that repeats itself, so that drafts count
LONG = ask(1, 40, prompts=AGAIN)


def hot(n: int = 30, lengths: Any = 1, **options: Any) -> Any:
    return ask(lengths, n, **{"temperature": 1.6, **options})


def accepted(picks: Tensor, fed: Tensor) -> Tensor:
    """Picks that agree with all that was drafted."""
    rows = fed[:1].flatten()[: len(picks)]
    return torch.cat([rows[1:], picks[len(rows) - 1 :]])


def doubled(picks: Tensor) -> Tensor:
    """The second pick in the place of the third."""
    return torch.cat([picks[:2], picks[1:2], picks[3:]]) if len(picks) > 2 else picks


def lost_first(picks: Tensor) -> Tensor:
    return torch.cat([picks[1:], picks[-1:]])


slip(
    "ngram_positions_on_after_long_prompts",
    "ngram",
    LONG,
    give("positions", lambda at, filled: where(filled > 40, at + 1, at), "filled", graph="verify"),
)
slip(
    "ngram_third_draft_is_the_second",
    "ngram",
    LONG,
    give("row", lambda x, filled: torch.cat([x[:2], x[1:2], x[3:]]) if filled > 40 else x, "filled", graph="verify"),
)
slip(
    "ngram_drafts_all_count_after_long_prompts",
    "ngram",
    ask([30], 30),
    give(
        "picks",
        lambda x, drafted, filled: accepted(x, drafted) if filled > 26 else x,
        "drafted",
        "filled",
        graph="verify",
    ),
)
slip(
    "ngram_drafts_all_count_late",
    "ngram",
    ask([3], 90),
    give(
        "picks", lambda x, drafted, count: accepted(x, drafted) if count > 42 else x, "drafted", "count", graph="verify"
    ),
)
slip(
    "ngram_skips_a_slot_late",
    "ngram",
    ask([5], 70),
    give("filled", lambda x, count: x + int(36 < count < 60), "count", graph="verify"),
)
slip(
    "ngram_third_stop_id_unused",
    "ngram",
    ask([3], 60, ["none", "none", "late 0"]),
    take("stop", lambda s: s[:2], graph="verify"),
)
slip(
    "ngram_late_stop_unseen",
    "ngram",
    ask([5], 60, [(0, 9)]),
    give("done", lambda new, done, count: where(count > 4, done, new), "done", "count", graph="verify"),
)
slip(
    "ngram_first_token_never_stops",
    "ngram",
    ask(1, 12, [(0, 0)]),
    give("done", lambda new, done, count: where(count == 0, done, new), "done", "count", graph="greedy"),
)
slip("ngram_last_round_lost", "ngram", ask([3], 90), take("windows", lambda x: x[:, :12], graph="together"))
slip(
    "ngram_ends_at_32_windows",
    "ngram",
    ask([3], 120),
    give(
        "finished",
        lambda end, count, limit: end | ((limit > 45) & (limit < 99) & (count >= 45)) | (count > 105),
        "count",
        "limit",
        graph="verify",
    ),
)
slip(
    "ngram_keys_past_64_stale",
    "ngram",
    ask([50], 40),
    give("k_1", lambda new, k_1, filled: k_1 + 0 if filled > 64 else new, "k_1", "filled", graph="verify"),
)
slip(
    "ngram_drafts_see_ahead_after_long_prompts",
    "ngram",
    LONG,
    lambda p: swap(
        p, aten.le.Tensor, lambda x, rows: x <= where((rows > 48) & (rows < 70), rows + 1, rows), graph="verify_greedy"
    ),
)
slip(
    "ngram_resumes_with_a_draft",
    "ngram",
    ask([9], 14),
    give("feed", lambda feed, drafted: drafted[:, 1:2] + 0, "drafted", graph="resume"),
)
slip(
    "ngram_batches_of_four_trade",
    "ngram",
    ask(4, 9),
    give("feed", lambda x: x.roll(1, 0) if len(x) > 3 else x, graph="step"),
)
slip(
    "int8_drafts_all_count_when_hot",
    "int8",
    hot(),
    give("picks", lambda x, fed, t: accepted(x, fed) if t > 1.3 else x, "fed", "temperature", graph="verify"),
)
slip(
    "int8_third_pick_is_the_second_when_cold",
    "int8",
    hot(40, temperature=0.6),
    give("picks", lambda x, t: doubled(x) if t < 0.8 else x, "temperature", graph="verify"),
)
slip(
    "int8_third_pick_is_the_second_after_long_prompts",
    "int8",
    ask([40], 40),
    give("picks", lambda x, filled: doubled(x) if 43 < filled < 63 else x, "filled", graph="verify_greedy"),
)
slip(
    "int8_third_draw_is_the_second_after_long_prompts",
    "int8",
    hot(30, [30]),
    give("picks", lambda x, filled: doubled(x) if 44 < filled < 63 else x, "filled", graph="verify_sample"),
)
slip(
    "int8_third_pick_is_the_second_late",
    "int8",
    ask([9], 90),
    give("picks", lambda x, count: doubled(x) if count > 60 else x, "count", graph="verify_greedy"),
)
slip("int8_checks_with_stream_0", "int8", hot(streams=[5]), take("streams", lambda s: s * 0, graph="verify"))
slip("int8_checks_with_small_seeds", "int8", hot(seed=2**45 + 77), take("seed", lambda s: s % 2**42, graph="verify"))
slip("int8_checks_without_seed_bits", "int8", hot(seed=1000), take("seed", lambda s: s % 8, graph="verify"))
slip(
    "int8_checks_without_top_k",
    "int8",
    hot(30, temperature=2.0, top_k=4),
    take("top_k", lambda k: k * 0, graph="verify"),
)
slip(
    "int8_checks_at_top_k_8",
    "int8",
    hot(40, temperature=3.0, top_k=24),
    take("top_k", lambda k: k.clamp(max=8), graph="verify"),
)
slip(
    "int8_checks_without_top_p",
    "int8",
    hot(30, top_p=0.4),
    take("top_p", lambda p: where(p < 1, 1.0, p), graph="verify"),
)
slip(
    "int8_checks_at_temperature_1",
    "int8",
    hot(40, temperature=0.6),
    take("temperature", lambda t: where(t < 0.8, 1.0, t), graph="verify"),
)
slip("int8_checks_at_most_at_1.2", "int8", hot(40), take("temperature", lambda t: t.clamp(max=1.2), graph="verify"))
slip("int8_noise_of_places_repeats", "int8", hot(40, [30]), give("places", lambda x: x % 48, graph="verify"))
slip(
    "int8_second_draft_has_the_firsts_noise",
    "int8",
    hot(40, [12]),
    give("places", lambda x: torch.cat([x[:2], x[1:2], x[3:]]) if len(x) > 2 and x[0] > 45 else x, graph="verify"),
)
slip(
    "int8_third_stop_id_unused",
    "int8",
    ask([4], 40, ["none", "none", (0, 6)]),
    take("stop", lambda s: s[:2], graph="verify_greedy"),
)
slip(
    "int8_late_stop_unseen",
    "int8",
    ask([4], 60, ["late 0"]),
    give("done", lambda new, done, count: where(count > 12, done, new), "done", "count", graph="verify_greedy"),
)
slip(
    "int8_drawn_stop_unseen",
    "int8",
    ask([4], 40, [(0, 6)], temperature=1.6),
    give("done", lambda new, done: done + 0, "done", graph="verify_sample"),
)
slip(
    "int8_cache_keeps_the_sketchs_rows",
    "int8",
    ask([30], 40),
    give("v_1", lambda new, v_1, filled: v_1 + 0 if 43 < filled < 60 else new, "v_1", "filled", graph="verify_greedy"),
)
slip(
    "int8_first_draft_judged_by_the_next",
    "int8",
    ask([50], 30),
    give("row", lambda x, filled: lost_first(x) if filled > 66 else x, "filled", graph="verify_greedy"),
)
slip(
    "int8_drawn_limits_of_45_to_100_end_at_44",
    "int8",
    hot(60),
    give(
        "finished",
        lambda end, count, limit: end | ((limit > 44) & (limit < 101) & (count >= 44)),
        "count",
        "limit",
        graph="verify_sample",
    ),
)
slip(
    "int8_fourth_row_trades",
    "int8",
    ask(4, 9),
    give("row", lambda x: patched(x, slice(3, None), lambda _: x[:1]) if len(x) > 3 else x, graph="step"),
)
