"""Slips of canvases: more rows than three, blocks and prompts of other sizes, what is given, how many rounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aropt.models.canvas import MASK
from tests.mutants.corners.slips import Request, ask, family, give, patched, take, where

slip = family("canvases")
CACHES = ("prefix", "dual", "dkv", "vicinity")


def unmask(lengths: Any, n: int, stop: Any = (), **options: Any) -> Request:
    return ask(lengths, n, stop, **options)


def traded(x: Tensor) -> Tensor:
    return x.roll(1, 0) if len(x) > 3 else x


def unended(new: Tensor, tokens: Tensor, answers: Tensor) -> Tensor:
    """The whole answer where it ends with its first id."""
    inside = torch.arange(tokens.shape[1]) >= answers.unsqueeze(1)
    return torch.where((new >= 0).sum(1, keepdim=True) == 1, torch.where(inside, tokens, -1), new)


def later(x: Tensor, by: int = 1) -> Tensor:
    return patched(x, slice(3, None), lambda rows: rows + by)


slip("canvas_rows_traded_beyond_three", "canvas", unmask(4, 16, block=8), give("logits", traded))
slip(
    "canvas_fifth_row_has_the_firsts_stop",
    "canvas",
    unmask(5, 16, block=4),
    give("candidate", lambda x: torch.cat([x[:4], x[:1].expand_as(x[4:])]) if len(x) > 4 else x),
)
slip("blocks_of_16_are_8", "canvas", unmask([4], 32, block=16), take("block", lambda b: where(b == 16, 8, b)))
slip(
    "blocks_beyond_8_are_all",
    "canvas",
    unmask([4], 48, block=12, steps=16),
    take("block", lambda b: where((b > 8) & (b < 24), 48, b)),
)
slip(
    "blocks_of_3_are_2",
    "canvas",
    unmask([4, 6], 24, block=3, temperature=1.0),
    take("block", lambda b: where(b == 3, 2, b)),
)
slip("blocks_of_1_are_2", "canvas", unmask([4, 4], 10, block=1), take("block", lambda b: where(b == 1, 2, b)))
slip(
    "blocks_of_one_canvas", "canvas", unmask([4], 32, block=32, steps=8), take("block", lambda b: where(b == 32, 16, b))
)
slip(
    "three_steps_are_four",
    "canvas",
    unmask([4, 6], 24, block=8, steps=9, temperature=1.0),
    take("steps", lambda s: where(s == 3, 4, s)),
)
slip(
    "steps_of_10_or_more_are_all",
    "canvas",
    unmask([4], 48, block=24, steps=24),
    take("steps", lambda s: where((s > 9) & (s < 20), 0, s)),
)
slip("more_steps_than_rows", "canvas", unmask([4], 8, block=8, steps=12), take("steps", lambda s: where(s > 10, 4, s)))
slip(
    "canvas_cold_draws_at_0.8",
    "canvas",
    unmask([4], 24, block=8, temperature=0.4),
    take("temperature", lambda t: t.clamp(min=0.8), graph="sample"),
)
slip(
    "canvas_hot_draws_at_1.3",
    "canvas",
    unmask([4], 24, block=8, temperature=2.5),
    take("temperature", lambda t: t.clamp(max=1.3), graph="sample"),
)
slip(
    "canvas_seed_bits_lost",
    "canvas",
    unmask([4], 16, block=8, temperature=1.0, seed=2**50 + 1),
    take("seed", lambda s: s % 2**41, graph="sample"),
)
slip(
    "canvas_small_seeds_modulo_4",
    "canvas",
    unmask([4], 16, block=8, temperature=1.0, seed=77),
    take("seed", lambda s: where(s < 2**32, s % 4, s), graph="sample"),
)
slip(
    "canvas_streams_modulo_2",
    "canvas",
    unmask(3, 16, block=8, temperature=1.0),
    take("streams", lambda s: s % 2, graph="sample"),
)
slip(
    "canvas_given_streams_unused",
    "canvas",
    unmask(2, 16, block=8, temperature=1.0, streams=[5, 9]),
    take("streams", lambda s: where(s > 3, 0, s), graph="sample"),
)
slip(
    "canvas_noise_of_24_rounds",
    "canvas",
    unmask([2], 40, block=8, temperature=1.2),
    take("rounds", lambda r: r.clamp(max=24), graph="sample"),
)
slip(
    "canvas_third_stop_id_unused",
    "canvas",
    unmask([4], 24, ["none", "none", "late 0"], block=8),
    take("stop", lambda s: s[:2]),
)
slip(
    "canvas_answer_stops_at_two_ids",
    "canvas",
    unmask([4], 24, ["none", "none", "late 0"], block=8),
    take("stop", lambda s: s[:2], graph="answer"),
)
slip(
    "canvas_stop_in_the_prompt_counts",
    "canvas",
    unmask(1, 16, [3], prompts=[[1, 3, 4, 2]], block=8),
    take("answers", lambda a: a * 0, graph="answer"),
)
slip(
    "canvas_first_id_never_stops",
    "canvas",
    unmask([4], 16, [(0, 0)], block=8),
    give("generated", unended, "tokens", "answers", graph="answer"),
)
slip(
    "canvas_stops_of_later_rows_unused",
    "canvas",
    unmask([4, 4, 4, 4], 16, [(3, 4)], block=8),
    give(
        "generated",
        lambda new, tokens: torch.cat([new[:3], tokens[3:, -new.shape[1] :]]) if len(new) > 3 else new,
        "tokens",
        graph="answer",
    ),
)
slip(
    "canvas_long_prompts_unaligned",
    "canvas",
    unmask([30], 16, block=8),
    take("answers", lambda a: where((a > 16) & (a < 63), a - 1, a), graph="answer"),
)
slip(
    "canvas_of_41_to_110_is_unsure",
    "canvas",
    unmask([30], 32, block=16),
    give("confidence", lambda c: c.flip(1) if 40 < c.shape[1] < 111 else c, graph="model"),
)
slip(
    "blocks_given_whole_are_stale",
    "blocks",
    unmask([3, 7], 48, fill=[[MASK] * 8 + [9, 8] * 12 + [MASK] * 16] * 2, threshold=0.3),
    take("cursor", lambda c: where(c == 0, 1, c), graph="rows"),
)
slip("blocks_rows_traded_beyond_three", "blocks", unmask(4, 24, threshold=0.3), give("logits", traded))
slip(
    "blocks_fourth_row_a_block_on",
    "blocks",
    unmask([5, 5, 5, 5], 40, threshold=0.3),
    take("cursor", lambda c: later(c) if len(c) > 3 else c, graph="rows"),
)
slip(
    "blocks_wide_padding_one_off",
    "blocks",
    unmask([30, 6], 24, threshold=0.3),
    give(
        "positions",
        lambda at, lengths: where(((lengths.max() - lengths) > 9).unsqueeze(1) & (at > 0), at - 1, at),
        "lengths",
        graph="rows",
    ),
)
slip(
    "blocks_prompts_of_17_to_62_stale",
    "blocks",
    unmask([40], 24, threshold=0.3),
    give(
        "k_0",
        lambda new, k_0, origin, lengths: where(
            ((lengths > 48) & (lengths < 100)).any() & (torch.arange(new.shape[2]) == 8).reshape(1, 1, -1, 1), 0, new
        ),
        "k_0",
        "origin",
        "lengths",
    ),
)
slip(
    "threshold_of_0.1_to_0.8_is_0.05",
    "blocks",
    unmask([4], 32, threshold=0.3),
    take("threshold", lambda x: where((x > 0.1) & (x < 0.8), 0.05, x)),
)
slip(
    "threshold_beyond_0.95_is_0.5",
    "blocks",
    unmask([4], 48, threshold=0.98),
    take("threshold", lambda x: where(x > 0.95, 0.05, x)),
)
slip(
    "threshold_below_0.03_is_1",
    "blocks",
    unmask([4], 48, threshold=0.01),
    take("threshold", lambda x: where(x < 0.03, 1.0, x)),
)
slip(
    "blocks_third_stop_id_unused",
    "blocks",
    unmask([4], 40, ["none", "none", (0, 5)], threshold=0.3),
    take("stop", lambda s: s[:2]),
)
slip(
    "blocks_late_stop_unused",
    "blocks",
    unmask([4], 60, ["late 0"], threshold=0.3),
    give(
        "generated",
        lambda new, tokens: where((new >= 0).sum(1, keepdim=True) > 20, tokens, new),
        "tokens",
        graph="answer",
    ),
)
slip(
    "free_first_rows_refreshed_once",
    "free",
    unmask([4], 64, block=16, threshold=2.0),
    take("rounds", lambda r: r.clamp(max=20), graph="rows"),
)
slip("free_rows_traded_beyond_three", "free", unmask(5, 16, block=8, threshold=0.2), give("logits", traded))
slip(
    "free_blocks_of_16_are_8",
    "free",
    unmask([4], 32, block=16, threshold=0.2),
    take("block", lambda b: where(b > 8, 8, b)),
)
slip(
    "dkv_refreshes_in_8_rounds_only",
    "dkv",
    unmask([4], 32, block=32, threshold=2.0),
    take("step", lambda s: where(s > 8, 9, s), graph="rows"),
)
slip(
    "dkv_refreshes_all_rows_of_some",
    "dkv",
    unmask([4, 4, 4, 4], 16, block=16, threshold=2.0, temperature=1.0),
    take("step", lambda s: later(s), graph="rows"),
)
slip(
    "vicinity_warms_up_in_batches_of_four",
    "vicinity",
    unmask(4, 16, block=8, threshold=0.2),
    take("rounds", lambda r, tokens: where(len(tokens) > 3, r + 2, r), "tokens", graph="rows"),
)
slip(
    "vicinity_forgets_what_was_masked",
    "vicinity",
    unmask([20], 64, block=16, threshold=0.2),
    take("block", lambda b: where(b > 12, 8, b), graph="rows"),
)
slip(
    "dual_block_cache_stale_beyond_a_block",
    "dual",
    unmask([6], 64, block=16, threshold=0.2),
    take("cursor", lambda c, block: where((c >= 0) & (block > 8), c + 1, c), "block", graph="rows"),
)
slip(
    "dual_prompts_of_17_to_62_unseen",
    "dual",
    unmask([40, 30, 20, 25], 16, block=8, threshold=0.2, temperature=1.0),
    give(
        "slot_positions",
        lambda at, origin: where(((origin > 16) & (origin < 63)).unsqueeze(1) & (at == 3), -1, at),
        "origin",
    ),
)
slip(
    "prefix_rows_of_later_blocks_dropped",
    "prefix",
    unmask([6, 4, 4, 3, 2], 32, block=8, threshold=0.2),
    take("cursor", lambda c: patched(c, slice(3, None), lambda x: x * 0 + 7), graph="rows"),
)
slip(
    "prefix_draws_of_wide_padding",
    "prefix",
    unmask([25, 4], 16, block=8, threshold=0.2, temperature=1.0),
    give(
        "picked",
        lambda x, lengths: where(((lengths.max() - lengths) > 9).unsqueeze(1), x.roll(1, 1), x),
        "lengths",
        graph="sample",
    ),
)
slip(
    "prefix_draws_hot_at_1.3",
    "prefix",
    unmask([5], 16, block=8, threshold=0.2, temperature=2.0),
    take("temperature", lambda t: t.clamp(max=1.3), graph="sample"),
)
for cache in CACHES:
    slip(f"{cache}_rows_traded_beyond_three", cache, unmask(4, 16, block=8, threshold=0.2), give("logits", traded))
    slip(
        f"{cache}_blocks_beyond_8_are_8",
        cache,
        unmask([4], 32, block=16, threshold=0.3),
        take("block", lambda b: b.clamp(max=8)),
    )
    slip(
        f"{cache}_third_stop_id_unused",
        cache,
        unmask([4], 16, ["none", "none", (0, 4)], block=8, threshold=0.2),
        take("stop", lambda s: s[:2]),
    )
