"""vicinity: the block and its neighbours; all rows when a block begins and in the first rounds (dInfer, 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aropt.ir.program import Program
from aropt.loops.unmask.cache_policy import STALE, Look, cached, check_least, plan_cache, refreshed
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class Vicinity:
    before: int = 16  # rows before the block
    after: int = 16  # rows after it
    warmup: int = 4  # first rounds that compute everything
    refresh: int = 0  # all rows are computed every so many rounds too; 0: never

    name: ClassVar[str] = "vicinity"
    contract: ClassVar[Contract] = STALE

    def __post_init__(self) -> None:
        check_least(
            self.name,
            refresh=(self.refresh, 0),
            before=(self.before, 0),
            after=(self.after, 0),
            warmup=(self.warmup, 0),
        )

    def due(self, look: Look) -> Tensor:
        size = look.size
        near = (look.offset >= -self.before) & (look.offset < size + self.after)
        return (look.all & (look.fresh | (look.rounds < self.warmup))) | near

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return plan_cache(program, f"the block with {self.before} rows before and {self.after} after it", by_mask=True)

    def run(self, program: Program) -> Program:
        return cached(program, refreshed(self.due, self.refresh))


PASS = Vicinity
