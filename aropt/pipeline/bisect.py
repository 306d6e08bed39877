"""Finds the pass after which a lowered program fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from aropt.ir.program import Program
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.rewriting.contract import Pass
from aropt.validate.compare import cases, validate, with_probe


def bisect(program: Program, passes: Sequence[Pass], target: str, say: Callable[[str], None]) -> str | None:
    """The first pass after which the program lowered to `target` fails; None if it never does."""
    from aropt.targets import lower

    def fails(count: int) -> bool:
        say(f"bisect: the first {count} passes")
        trusting = Instruments(check=False, trust=True, budget={"kl": float("inf")}, keep_going=True)
        changed, results, reference = run_passes(program, passes[:count], target, trusting)
        if any(r.status == "reverted" for r in results):
            return True
        probed, chosen = with_probe(changed), cases(reference, quick=True)
        return not validate(reference, probed, lower(probed, target), chosen, explain=False).passed

    if not fails(len(passes)):
        return None
    good, bad = 0, len(passes)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return passes[bad - 1].name
