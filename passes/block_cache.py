"""block-cache: each round of an unmasking loop computes its block alone, against stored keys of earlier ones.

Exact where no row sees a block after its own, which the captured mask is asked. When a block begins, the one before it
is computed once more: its last rows were written after its keys and values were stored (the "persisting forward" of
SGLang's and NBDiff's loops). Blocks in between, which were given whole, are computed then too: they see what came
before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from aropt.ir.program import Program
from aropt.loops.unmask.cache_policy import EXACT, Look, cached, plan_cache
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target


@dataclass(frozen=True)
class BlockCache:
    name: ClassVar[str] = "block-cache"
    contract: ClassVar[Contract] = EXACT

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return plan_cache(program, f"blocks of {program.meta.get('block')}", by_mask=True, lossy=False)

    def run(self, program: Program) -> Program:
        return cached(program, due)


PASS = BlockCache


def due(look: Look) -> Tensor:
    """From the block of the round before, whose rows may have changed since, to the one at hand."""
    return (look.index >= look.was) & (look.index <= look.now)
