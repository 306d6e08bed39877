"""What a program recomputes in every round, and why nothing of it is stored: said first, as it costs the most."""

from __future__ import annotations

from collections.abc import Sequence

from aropt.ir.program import Program
from aropt.loops.guidance import NEW_ROWS
from aropt.loops.scheme import scheme_of
from aropt.loops.unmask.cache_policy import CHOSEN_ROWS
from aropt.pipeline.registry import names, pass_class
from aropt.rewriting.contract import Contract, Result

STORED = ("append-kv", "canvas-kv", "recurrent")


def uncached(program: Program, results: Sequence[Result]) -> str:
    """Why a program computes all rows in each round, in a sentence; "" if it does not."""
    if any(state.kind in STORED for state in program.state.values()):
        return ""
    canvas, found = scheme_of(program).fills, {r.name: r for r in results}
    wanted = CHOSEN_ROWS if canvas else NEW_ROWS
    fitting: dict[str, Contract] = {n: c for n in names() if wanted in (c := pass_class(n).contract).establishes}
    if any(found[n].status == "applied" for n in fitting if n in found):
        return ""  # new rows alone are computed: there is no attention, and nothing to store
    told = [f"{n} {said(found[n])}" for n in fitting if n in found]
    lossy = [n for n, c in fitting.items() if n not in found and c.level == "lossy"]
    if lossy:
        told.append(f"lossy here, asked for with --pass NAME --budget kl=0.05: {', '.join(lossy)}")
    every = "all rows of the canvas" if canvas else "all tokens so far"
    return f"NO CACHE, each round computes {every}: " + ("; ".join(told) or f"{', '.join(fitting)} was left out") + "."


def said(result: Result) -> str:
    """Why a pass did nothing."""
    reason = " ".join((result.reason.splitlines() or [""])[0].split()).rstrip(".")
    return f"{'was skipped' if result.status == 'skipped' else 'failed or cost too much'}: {reason}"
