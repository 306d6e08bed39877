"""Drafts by the round before: what the model says after its drafts, right or wrong, are the next ones.

This is parallel decoding of a window as a fixed point (Jacobi; Santilli et al. 2023, 2305.10427), and of draws
speculative Jacobi decoding (Teng et al. 2024, 2410.01699). It takes neither another model nor a copy of the weights,
and pays where an id is often right whatever comes before it, as in images. Where some drafts count, the rows after them
stand for the next round's places, and the last row stands for the places beyond the window as well.

Where drafts are accepted by their chances a round keeps what it would draw from at each place, and the next one draws
from that. No noise of a place is used before its id is due, so what is drafted there is a draw like that of any model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aropt.ir.edit import call_by_name
from aropt.ir.program import Spec, StateSpec
from aropt.loops.accept import DRAFTS, beside
from aropt.loops.drafters import Drafter, Ranked, where
from aropt.loops.rules import draw
from aropt.loops.trees import Drafts, Made

F32, I64 = torch.float32, torch.int64


def from_before(made: Made, shape: Drafts, rule: Ranked) -> Drafter:
    """Drafts a chain; the first rounds of a text are full of zeros, or of draws from all ids alike."""
    return by_chances(made, shape) if rule.accept.reads("drafted") else by_picks(made, shape)


def by_picks(made: Made, shape: Drafts) -> Drafter:
    """The ids that the rule picked for the next round's places: `foreseen` int64 [B, n - 1]."""
    drafts, ahead = shape.deepest, Spec(I64, ("B", shape.deepest))

    def recall(foreseen: Tensor) -> tuple[Tensor, ...]:
        return tuple(foreseen[:, d : d + 1].clone() for d in range(drafts))

    def foresee(picks: Tensor, window: Tensor) -> Tensor:
        return picks.reshape(-1, shape.nodes).gather(1, after(window, drafts))

    levels = [f"level_{d}" for d in range(1, shape.nodes)]
    read = {"picks": Spec(I64, (f"{shape.nodes}*B",)), "window": shape.window}
    return Drafter(
        {"foreseen": StateSpec("tokens", ahead, 0)},
        rounds=[call_by_name(made.add("recall_before", recall, {"foreseen": ahead}, levels))],
        settled=[call_by_name(made.add("foresee_picks", foresee, read, ["foreseen"]))],
    )


def by_chances(made: Made, shape: Drafts) -> Drafter:
    """Draws from the logits that the rule drew by for the next round's places: `expected` float32 [B, n - 1, V]."""
    drafts, ahead = shape.deepest, Spec(F32, ("B", shape.deepest, made.vocab))
    levels, drafted = [f"level_{d + 1}" for d in range(drafts)], [f"drafted_{d}" for d in range(drafts)]

    def recall(expected: Tensor, seed: Tensor, streams: Tensor, origin: Tensor) -> tuple[Tensor, ...]:
        rows = [expected[:, d].clone() for d in range(drafts)]
        ids = [draw(row, beside(seed, DRAFTS), streams, origin + d + 1) for d, row in enumerate(rows)]
        return *(token.unsqueeze(1) for token in ids), *(row.unsqueeze(1) for row in rows)

    def foresee(node_logits: Tensor, window: Tensor) -> Tensor:
        rows = after(window, drafts).unsqueeze(2).expand(-1, -1, made.vocab)
        return node_logits.reshape(-1, shape.nodes, made.vocab).gather(1, rows)

    row = Spec(I64, ("B",))
    noise = {"expected": ahead, "seed": Spec(I64), "streams": row, "origin": row}
    read = {"node_logits": Spec(F32, (f"{shape.nodes}*B", made.vocab)), "window": shape.window}
    return Drafter(
        {"expected": StateSpec("logits", ahead, 0)},
        rounds=[where(made), call_by_name(made.add("redraft", recall, noise, [*levels, *drafted]))],
        settled=[call_by_name(made.add("foresee_chances", foresee, read, ["expected"]))],
    )


def after(window: Tensor, drafts: int) -> Tensor:
    """int64 [B, drafts]: which row of a round is the one of each place after the id that it ends with."""
    taken = (window >= 0).to(I64).sum(1, keepdim=True)
    return (taken + torch.arange(drafts)).clamp(max=drafts)
