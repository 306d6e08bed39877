"""Slips of batches: more than three rows, equal lengths, wide padding, rows that end early among others."""

from __future__ import annotations

from torch import Tensor, cat

from tests.mutants.corners.slips import ask, family, give, patched, take, where
from tests.mutants.surgery import aten, swap

slip = family("batches")


def widest(pads: Tensor) -> int:
    return int(pads.max())


slip("rows_traded_beyond_three", "lean", ask(4, 8), give("row", lambda x: x.roll(1, 0) if len(x) > 3 else x))
slip(
    "fifth_row_feeds_the_first",
    "lean",
    ask(5, 8),
    give("feed", lambda x: cat([x[:4], x[:1].expand_as(x[4:])]) if len(x) > 4 else x, graph="step"),
)
slip(
    "eighth_row_has_the_firsts_keys",
    "lean",
    ask(8, 8),
    give("k_0", lambda k: patched(k, slice(7, None), lambda _: k[:1]) if len(k) > 7 else k),
)
slip("keys_of_seventeen_rows_traded", "lean", ask(17, 6), give("k_1", lambda k: k.roll(1, 0) if len(k) > 16 else k))
slip(
    "equal_lengths_one_position_far",
    "lean",
    ask(3, 8),
    give(
        "positions",
        lambda at, pads, filled: at + 1 if len(pads) > 1 and widest(pads) == 0 and filled else at,
        "pads",
        "filled",
    ),
)
slip(
    "one_end_ends_equal_rows",
    "lean",
    ask(3, 9, [(0, 2)]),
    give("done", lambda done, pads: done | done.any() if widest(pads) == 0 else done, "pads"),
)
slip(
    "four_rows_emit_after_the_end",
    "lean",
    ask(4, 9, [(0, 2)]),
    give("emitted", lambda new, done: where(done, 0, new) if len(done) > 3 else new, "done"),
)
slip(
    "only_the_first_ended_row_counts",
    "lean",
    ask(4, 12, [(1, 1), (2, 3)]),
    give("done", lambda done: done & (done.cumsum(0) == 1) if len(done) > 3 else done, graph="step"),
)
slip(
    "end_unseen_in_equal_rows",
    "lean",
    ask(2, 9, [(1, 2)]),
    give("done", lambda new, done, pads: done if len(done) > 1 and widest(pads) == 0 else new, "done", "pads"),
)
slip("batches_of_six_and_more_backwards", "lean", ask(6, 6), give("row", lambda x: x.flip(0) if len(x) > 5 else x))
slip(
    "batches_of_seven_and_more_share_noise",
    "lean",
    ask(7, 8, temperature=1.2),
    take("streams", lambda s: s * 0 if len(s) > 6 else s, graph="step"),
)
slip(
    "padding_of_five_to_seven_one_less",
    "lean",
    ask([12, 6], 9),
    take("pads", lambda p: where((p > 4) & (p < 8), p - 1, p)),
)
slip("padding_of_eight_at_most", "lean", ask([16, 4], 9), take("pads", lambda p: p.clamp(max=8)))
slip("padding_beyond_thirty_unseen", "lean", ask([40, 3], 9), take("pads", lambda p: where(p > 30, 0, p)))
slip(
    "fourth_row_unpadded",
    "lean",
    ask([9, 7, 5, 5], 9),
    take("pads", lambda p: patched(p, slice(3, None), lambda x: x * 0)),
)
slip("odd_padding_rounded", "lean", ask([8, 5], 9), take("pads", lambda p: where(p % 2 == 1, p - 1, p)))
slip(
    "padding_shows_late",
    "lean",
    ask([6, 2], 40),
    give(
        "slot_positions",
        lambda at, pads, filled: where((at < 0) & (pads > 0).unsqueeze(1) & (filled > 25), 0, at),
        "pads",
        "filled",
    ),
)
slip(
    "ragged_rows_traded_late",
    "lean",
    ask([6, 2], 40),
    give("feed", lambda x, pads, count: x.roll(1, 0) if widest(pads) > 0 and count > 25 else x, "pads", "count"),
)
slip(
    "two_rows_end_a_token_early",
    "lean",
    ask(2, 24),
    give(
        "finished",
        lambda end, count, limit, done: end | (len(done) == 2 and limit > 20 and count + 2 >= limit),
        "count",
        "limit",
        "done",
    ),
)
slip(
    "later_rows_see_less_window",
    "window",
    ask(2, 40),
    lambda p: swap(p, aten.gt.Tensor, lambda x, old: x > patched(old, slice(1, None), lambda o: o + (o > 0))),
)
slip(
    "ragged_window_by_slots",
    "window",
    ask([20, 10], 30),
    lambda p: swap(p, aten.gt.Tensor, lambda x, old: x > where((old > 0) & (len(old) > 1), old + 2, old)),
)
slip(
    "full_batches_pay_in_the_window",
    "window",
    ask(3, 40),
    give("v_0", lambda v, filled: v.roll(1, 0) if filled > 24 and len(v) > 1 else v, "filled"),
)
slip(
    "fourth_branch_unguided",
    "guided",
    ask(4, 8, guidance=2.0),
    give("row", lambda x: cat([x[:7], x[3:4]]) if len(x) == 8 else x),
)
slip(
    "branches_of_five_interleaved",
    "guided",
    ask(5, 8, guidance=2.0),
    give("row", lambda x: x.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1) if len(x) == 10 else x),
)
slip("guided_rows_far_apart_unpadded", "guided", ask([14, 3], 8), take("pads", lambda p: where(p > 9, 0, p)))
slip(
    "fourth_row_seen_as_the_first",
    "full",
    ask(4, 12, repetition_penalty=2.0),
    give("seen", lambda x: patched(x, slice(3, None), lambda _: x[:1]) if len(x) > 3 else x, graph="step"),
)
slip(
    "fifth_row_forgets_its_prompt",
    "full",
    ask(8, 40, repetition_penalty=3.0),
    give("seen", lambda x: patched(x, slice(4, None), lambda s: s & False), graph="begin"),
)
slip(
    "five_to_seven_taken_for_equal",
    "dense",
    ask([12, 6], 8),
    give("ragged", lambda r, lengths: r & ~((lengths.max() - lengths.min()) % 8 > 4), "lengths", graph="begin"),
)
slip(
    "wide_padding_taken_for_none",
    "dense",
    ask([14, 4], 8),
    give("ragged", lambda r, lengths: r & (lengths.max() - lengths.min() < 9), "lengths", graph="begin"),
)
slip(
    "dense_fourth_row_a_slot_on",
    "dense",
    ask(4, 8),
    give("k_0", lambda k: patched(k, slice(3, None), lambda x: x.roll(1, 2)), graph="step"),
)
slip(
    "dense_rows_traded_beyond_three",
    "dense",
    ask(5, 8),
    give("v_1", lambda v: v.roll(1, 0) if len(v) > 3 else v, graph="step"),
)
slip(
    "shared_noise_beyond_three",
    "dense",
    ask(4, 8, temperature=1.0),
    take("streams", lambda s: s[:1].expand_as(s) if len(s) > 3 else s, graph="step"),
)
