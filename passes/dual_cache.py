"""dual-cache: all rows when a block begins, then the rows of the block alone (Fast-dLLM, 2505.22618, 3.2).

Rows before and after the block keep the keys and values that they had when it began.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aropt.ir.program import Program
from aropt.loops.unmask.cache_policy import STALE, Look, cached, check_least, plan_cache, refreshed
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class DualCache:
    refresh: int = 0  # all rows are computed every so many rounds too; 0: never

    name: ClassVar[str] = "dual-cache"
    contract: ClassVar[Contract] = STALE

    def __post_init__(self) -> None:
        check_least(self.name, refresh=(self.refresh, 0))

    def due(self, look: Look) -> Tensor:
        return (look.all & look.fresh) | (look.index == look.now)

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return plan_cache(program, "all rows when a block begins, then its own", by_mask=True)

    def run(self, program: Program) -> Program:
        return cached(program, refreshed(self.due, self.refresh))


PASS = DualCache
