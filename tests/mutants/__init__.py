"""Seeded miscompiles: each takes an optimized program that is right and makes one thing in it wrong.

The validator must catch all of them (`python -m tests.mutants` prints what it caught). A mutant is written once and
changes every graph that holds what it looks for, so that it applies to fused programs and to those with a graph a
step. `EQUIVALENT` are changes that can't be told from the outside: the validator must let those pass.
"""

from tests.mutants import (
    arithmetic,
    caches,
    equivalents,
    fused,
    interval,
    loop,
    positions,
    rule,
)  # they register themselves
from tests.mutants.surgery import EQUIVALENT, MUTANTS, check, optimized, reference

__all__ = [
    "EQUIVALENT", "MUTANTS", "arithmetic", "caches", "check", "equivalents", "fused", "interval", "loop", "optimized",
    "positions", "reference", "rule",
]  # fmt: skip
