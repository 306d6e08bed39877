"""Slips of parameters: values of the rule's parameters beyond the usual ones, and how they go together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.mutants.corners.bases import VOCAB
from tests.mutants.corners.slips import Change, ask, family, take, where

slip = family("requests")


def between(name: str, low: float, high: float, wrong: float, graph: str = "step") -> Change:
    """The parameter is another one where it is above `low` and below `high`."""
    return take(name, lambda value: where((value > low) & (value < high), wrong, value), graph=graph)


def drawn(n: int = 30, rows: int = 1, **options: Any) -> Any:
    return ask(rows, n, **{"temperature": 1.5, **options})


def spiky(**values: float) -> list[float]:
    """A bias that is 0 but for these ids: {"t7": -inf}."""
    return [values.get(f"t{i}", 0.0) for i in range(VOCAB)]


slip("temperature_below_0.8_is_0.8", "lean", drawn(40, temperature=0.4), between("temperature", 0, 0.8, 0.8))
slip("temperature_below_0.2_is_0.5", "lean", drawn(60, 4, temperature=0.15), between("temperature", 0, 0.2, 0.5))
slip("temperature_of_1.1_to_1.9_is_1", "lean", drawn(40), between("temperature", 1.05, 1.95, 1.0))
slip("temperature_beyond_2_is_2", "lean", drawn(40, temperature=4.0), between("temperature", 2.0, 1e9, 2.0))
slip("top_k_beyond_8_is_8", "lean", drawn(30, 2, top_k=20), between("top_k", 8, 99, 8))
slip("top_k_of_3_to_7_is_8", "lean", drawn(30, 2, top_k=4), between("top_k", 2, 8, 8))
slip("top_k_of_1_is_2", "lean", drawn(30, top_k=1), between("top_k", 0, 2, 2))
slip("top_k_of_most_is_off", "lean", drawn(60, 4, top_k=30, temperature=4.0), between("top_k", 24, 99, 0))
slip("top_k_of_all_keeps_8", "lean", drawn(30, 2, top_k=VOCAB), between("top_k", VOCAB - 1, 99, 8))
slip("top_p_of_0.3_to_0.8_is_0.9", "lean", drawn(30, 2, top_p=0.5), between("top_p", 0.3, 0.8, 0.9))
slip("top_p_beyond_0.92_is_1", "lean", drawn(80, 4, top_p=0.95, temperature=2.0), between("top_p", 0.92, 1.0, 1.0))
slip("top_p_below_0.15_is_0.2", "lean", drawn(60, 4, top_p=0.05, temperature=3.0), between("top_p", 0, 0.15, 0.2))
slip("top_p_of_0_is_off", "lean", drawn(30, top_p=0.0), between("top_p", -1, 1e-6, 1.0))
slip(
    "top_p_unused_with_much_top_k",
    "lean",
    drawn(40, 2, top_p=0.5, top_k=12),
    take("top_p", lambda p, k: where(k > 8, 1.0, p), "top_k", graph="step"),
)
slip(
    "top_p_looser_when_cold",
    "lean",
    drawn(60, 4, top_p=0.5, temperature=0.7),
    take("top_p", lambda p, t: where(t < 0.8, p.sqrt(), p), "temperature", graph="step"),
)
slip("min_p_of_0.1_to_0.45_is_0.5", "full", drawn(40, 2, min_p=0.15), between("min_p", 0.08, 0.45, 0.5))
slip("min_p_beyond_0.5_is_0.5", "full", drawn(40, 2, min_p=0.9, temperature=2.0), between("min_p", 0.55, 1.1, 0.5))
slip("min_p_below_0.04_is_off", "full", drawn(80, 4, min_p=0.03), between("min_p", 0, 0.04, 0.0))
slip("penalty_near_1_is_1", "full", ask(4, 40, repetition_penalty=1.06), between("repetition_penalty", 0.9, 1.1, 1.0))
slip(
    "penalty_of_1.5_to_4_is_1.5",
    "full",
    ask(3, 40, repetition_penalty=3.0),
    between("repetition_penalty", 1.5, 4.5, 1.5),
)
slip("penalty_of_0.5_to_1_is_1", "full", ask(3, 40, repetition_penalty=0.8), between("repetition_penalty", 0.3, 1, 1.0))
slip(
    "penalty_unused_when_cold",
    "full",
    drawn(40, 2, repetition_penalty=2.0, temperature=0.5),
    take("repetition_penalty", lambda x, t: where(t < 0.7, 1.0, x), "temperature", graph="sample"),
)
slip(
    "bias_unused_when_greedy",
    "full",
    ask(1, 12, bias=[2.0, -2.0, 1.0] * (VOCAB // 3)),
    take("bias", lambda b: b * 0, graph="greedy"),
)
slip(
    "bias_of_minus_infinity_is_minus_2",
    "full",
    drawn(60, 3, bias=spiky(t0=-torch.inf, t3=-torch.inf, t8=-torch.inf)),
    take("bias", lambda b: b.clamp(min=-2.0), graph="sample"),
)
slip("bias_beyond_3_is_3", "full", ask(3, 20, bias=spiky(t7=6.0, t9=4.0)), take("bias", lambda b: b.clamp(max=3.0)))
slip(
    "bias_of_the_last_id_unused",
    "full",
    ask(2, 20, bias=spiky(t47=9.0)),
    take("bias", lambda b: torch.cat([b[:-1], b[-1:] * 0]).where(b.abs().max() > 3, b)),
)
slip("guidance_of_1.1_to_1.4_is_1.5", "guided", ask(4, 30, guidance=1.15), between("guidance", 1.05, 1.45, 1.5))
slip("guidance_of_2_to_3.5_is_4", "guided", ask(4, 20, guidance=2.5), between("guidance", 1.8, 3.8, 4.0))
slip("guidance_beyond_5_is_5", "guided", ask(4, 30, guidance=9.0), between("guidance", 5, 99, 5.0))
slip("guidance_of_1_is_1.5", "guided", ask(2, 20, guidance=1.0), between("guidance", 0.99, 1.01, 1.5))
slip(
    "guidance_drawn_cold_is_1",
    "guided",
    drawn(30, 2, guidance=3.0, temperature=0.5),
    take("guidance", lambda g, t: where(t < 0.7, 1.0, g), "temperature"),
)
slip("guided_top_k_beyond_8", "guided", drawn(30, 2, guidance=1.5, top_k=20), between("top_k", 8, 99, 8))
slip(
    "interval_begins_at_4_at_the_latest",
    "interval",
    ask(2, 20, guidance=4.0, guidance_from=8, guidance_to=14),
    take("guidance_from", lambda x: x.clamp(max=4)),
)
slip(
    "interval_ends_at_4_at_the_earliest",
    "interval",
    ask(2, 12, guidance=6.0, guidance_from=0, guidance_to=2),
    take("guidance_to", lambda x: x.clamp(min=4)),
)
slip(
    "interval_ends_at_6_at_the_latest",
    "interval",
    ask(2, 20, guidance=4.0, guidance_from=1, guidance_to=12),
    take("guidance_to", lambda x: where((x > 6) & (x < 10**9), 6, x)),
)
slip(
    "empty_interval_is_all",
    "interval",
    ask(2, 12, guidance=6.0, guidance_from=3, guidance_to=3),
    lambda p: take("guidance_from", lambda x, end: where(x == end, 0, x), "guidance_to")(
        take("guidance_to", lambda x, start: where(x == start, 99, x), "guidance_from")(p)
    ),
)
slip("seed_bits_beyond_41_lost", "lean", drawn(20, seed=2**50 + 3), take("seed", lambda s: s % 2**41, graph="step"))
slip(
    "seed_bits_2_to_31_lost",
    "lean",
    drawn(20, seed=1236),
    take("seed", lambda s: where(s < 2**32, s % 4, s), graph="step"),
)
slip("seed_0_is_1", "lean", drawn(20, seed=0), take("seed", lambda s: where(s == 0, 1, s), graph="step"))
slip(
    "seed_of_31_bits_saturates",
    "lean",
    drawn(20, seed=2**31 + 5),
    take("seed", lambda s: where(s < 2**33, s.clamp(max=2**31 - 1), s), graph="step"),
)
slip(
    "stream_bits_beyond_31_lost",
    "lean",
    drawn(20, 2, streams=[2**33 + 1, 4]),
    take("streams", lambda s: s % 2**31, graph="step"),
)
slip(
    "small_streams_modulo_4",
    "lean",
    drawn(20, 2, streams=[5, 60]),
    take("streams", lambda s: where(s < 64, s % 4, s), graph="step"),
)
slip(
    "streams_of_hundreds_are_100",
    "lean",
    drawn(20, 2, streams=[140, 700]),
    take("streams", lambda s: where((s > 100) & (s < 10**6), 100, s), graph="step"),
)


def second_moved(streams: Tensor) -> Tensor:
    """Streams where one that is there already is another one."""
    again = torch.tensor([bool((streams[:i] == s).any()) for i, s in enumerate(streams)])
    return torch.where(again, streams + 1, streams)


slip("equal_streams_draw_apart", "lean", drawn(20, 2, streams=[7, 7]), take("streams", second_moved, graph="step"))
