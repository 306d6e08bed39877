"""dkv-cache: rows that were masked in the round before; all rows every so many rounds (dKV-Cache, 2505.15781).

A row is stored one round after its id was written (it moves most in that round), then left alone until the refresh. The
first two rounds of a block compute everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aropt.ir.program import Program
from aropt.loops.unmask.cache_policy import STALE, Look, cached, check_least, plan_cache
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class DkvCache:
    refresh: int = 8  # all rows are computed every so many rounds of a block

    name: ClassVar[str] = "dkv-cache"
    contract: ClassVar[Contract] = STALE

    def __post_init__(self) -> None:
        check_least(self.name, refresh=(self.refresh, 1))

    def due(self, look: Look) -> Tensor:
        everything = (look.step < 2) | (look.step % self.refresh == 0)
        return (look.all & everything) | look.before

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return plan_cache(program, f"rows masked in the round before, all every {self.refresh} rounds", by_mask=False)

    def run(self, program: Program) -> Program:
        return cached(program, self.due)


PASS = DkvCache
