"""free-cache: all rows once, then a window that only shrinks: from the block at hand to the end (FlashDLM, 2505.21467).

Rows before the window are frozen as they were in the last round of their block, and never refreshed. With `left` and
`right` the window slides: so many rows before and after the first mask; rows that it has not reached are not seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from aropt.ir.program import Program
from aropt.loops.unmask.blocks import FAR
from aropt.loops.unmask.cache_policy import STALE, Look, cached, check_least, plan_cache, refreshed
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class FreeCache:
    left: int = 0  # rows before the first mask, in the sliding form; 0 with right=0: the form by blocks
    right: int = 0  # rows from the first mask on, in the sliding form
    refresh: int = 0  # all rows are computed every so many rounds too; 0: never

    name: ClassVar[str] = "free-cache"
    contract: ClassVar[Contract] = STALE

    def __post_init__(self) -> None:
        check_least(self.name, refresh=(self.refresh, 0), left=(self.left, 0), right=(self.right, int(self.left > 0)))

    def due(self, look: Look) -> Tensor:
        begin = look.rounds == 0
        if not self.right:
            return (look.all & begin) | (look.index >= look.now)
        first = torch.where(look.masked, look.at, FAR).amin(1, keepdim=True)
        return (look.at < first + self.right) & ((look.at >= first - self.left) | begin)

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return plan_cache(
            program,
            f"rows from {self.left} before the first mask to {self.right} after it"
            if self.right
            else "rows from the block on",
            by_mask=False,
        )

    def run(self, program: Program) -> Program:
        return cached(program, refreshed(self.due, self.refresh))


PASS = FreeCache
