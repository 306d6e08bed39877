"""Slips of what ends a sequence: which of the stop ids, where it comes, in which rows."""

from __future__ import annotations

import torch

from tests.mutants.corners.slips import ask, family, give, take, where

slip = family("stops")
HIGH = tuple(range(40, 48))

slip("third_stop_id_unused", "lean", ask(1, 20, ["none", "none", (0, 4)]), take("stop", lambda s: s[:2]))
slip(
    "fifth_stop_id_unused", "lean", ask(1, 20, ["none", "none", "none", "none", (0, 3)]), take("stop", lambda s: s[:4])
)
slip(
    "first_of_four_stop_ids_unused",
    "full",
    ask(1, 20, [(0, 3), "none", "none", "none"]),
    take("stop", lambda s: s[1:] if len(s) > 3 else s),
)
slip(
    "second_of_three_stop_ids_unused",
    "full",
    ask(2, 20, ["none", (1, 4), "none"], temperature=1.0),
    take("stop", lambda s: s[[0, 2]] if len(s) == 3 else s),
)
slip("high_stop_ids_unused", "lean", ask(3, 30, HIGH), take("stop", lambda s: where(s >= 40, -1, s)))
slip("id_0_never_stops", "lean", ask(6, 40, [0], temperature=2.0), take("stop", lambda s: where(s == 0, -1, s)))
slip("last_id_never_stops", "full", ask(6, 40, [47], temperature=3.0), take("stop", lambda s: where(s == 47, -1, s)))
slip(
    "first_token_never_stops",
    "lean",
    ask(1, 12, [(0, 0)]),
    give("done", lambda new, done, count: where(count == 0, done, new), "done", "count"),
)
slip(
    "first_token_never_stops_drawn_rows",
    "full",
    ask(3, 12, [(1, 0)], temperature=1.0),
    give("done", lambda new, done, count: where(count == 0, done, new), "done", "count", graph="sample"),
)
slip(
    "late_stop_unseen",
    "lean",
    ask(1, 60, ["late 0"]),
    give("done", lambda new, done, count: where(count > 15, done, new), "done", "count"),
)
slip(
    "late_stop_unseen_when_drawing",
    "full",
    ask(2, 60, ["late 1"], temperature=1.0),
    give("done", lambda new, done, count: where(count > 20, done, new), "done", "count", graph="sample"),
)
slip(
    "stop_id_in_the_prompt_ends_it",
    "lean",
    ask(1, 12, [1], prompts=[[2, 1, 3, 9]]),
    give(
        "done",
        lambda done, feed, stop: done | (feed.unsqueeze(2) == stop).flatten(1).any(1) if feed.shape[1] > 1 else done,
        "feed",
        "stop",
    ),
)
slip(
    "stop_id_at_the_prompts_end_ends_it",
    "full",
    ask(1, 12, [9], prompts=[[2, 1, 3, 9]]),
    give(
        "done",
        lambda done, feed, stop: done | (feed[:, -1:] == stop).any(1) if feed.shape[1] > 1 else done,
        "feed",
        "stop",
    ),
)
slip(
    "stop_id_of_the_prompt_unused",
    "full",
    ask([24], 60, ["in 0"]),
    take("stop", lambda s, seen: where(seen[0].index_select(0, s.clamp(min=0)), -1, s), "seen", graph="step"),
)
slip(
    "drawn_alone_never_stops",
    "lean",
    ask(1, 30, [(0, 4)], temperature=1.0),
    give("done", lambda new, done: done if len(done) == 1 else new, "done", graph="sample"),
)
slip(
    "drawn_fourth_row_never_stops",
    "lean",
    ask(4, 30, [(3, 3)], temperature=1.0),
    give("done", lambda new, done: torch.cat([new[:3], done[3:]]), "done", graph="sample"),
)
slip(
    "cold_draws_never_stop",
    "lean",
    ask(1, 30, [(0, 4)], temperature=0.3),
    take("stop", lambda s, t: where(t < 0.5, -1, s), "temperature", graph="sample"),
)
slip(
    "guided_rows_stop_once",
    "guided",
    ask(3, 20, [(1, 2), (0, 5)], guidance=3.0),
    give("done", lambda new, done: where(done.any(), done, new) if len(done) > 2 else new, "done"),
)
slip(
    "guided_fourth_row_never_stops",
    "guided",
    ask(4, 20, [(3, 2)], guidance=3.0),
    give("done", lambda new, done: torch.cat([new[:3], done[3:]]), "done"),
)
slip(
    "dense_third_stop_id_unused",
    "dense",
    ask(1, 20, ["none", "none", (0, 4)]),
    take("stop", lambda s: s[:2], graph="step"),
)
slip(
    "dense_equal_rows_end_together",
    "dense",
    ask(3, 20, [(1, 2)]),
    give("done", lambda done: done | done.any() if len(done) > 2 else done, graph="step"),
)
slip(
    "interval_third_stop_id_unused",
    "interval",
    ask(1, 20, ["none", "none", "late 0"], guidance=3.0, guidance_to=4),
    take("stop", lambda s: s[:2], graph="alone"),
)
slip(
    "ended_rows_go_on_after_the_interval",
    "interval",
    ask(2, 20, [(0, 3)], guidance=3.0, guidance_to=8),
    take("done", lambda done, count: where(count == 9, False, done), "count", graph="alone"),
)
slip(
    "window_batch_ends_with_its_first",
    "window",
    ask(4, 30, [(2, 4)]),
    give("finished", lambda end, done, count: end | (done.any() & (count > 8)), "done", "count", graph="step"),
)
