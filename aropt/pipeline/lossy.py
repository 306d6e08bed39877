"""Lossy passes: applied as far as the budget allows, measured against the program before them."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from importlib import import_module
from typing import Any

from aropt.errors import UsageError
from aropt.ir.control import drawn
from aropt.ir.program import Program
from aropt.loops.scheme import scheme_of
from aropt.pipeline.checks import Instruments, check
from aropt.pipeline.cost import nodes, step_bytes
from aropt.rewriting.contract import Pass, Result
from aropt.validate.compare import with_probe
from aropt.validate.oracle import Oracles


def spend(
    one: Pass, program: Program, reference: Program, result: Result, instruments: Instruments, oracles: Oracles
) -> tuple[Program, Program]:
    """The program after a lossy pass that keeps to the budget, which the result says, and the reference of what comes
    after it; else both as they were.

    A pass that refreshes does so as often as that takes. With everything recomputed in each round it must equal the
    program: then what it loses is stale rows alone. Where other ids are drawn, all else is the reference's.
    """
    from aropt.validate import quality
    from aropt.validate.drift import measure

    refreshes = bool(one.contract.refresh)
    if instruments.trust:
        result.status, changed = "applied", one.run(program)
        return changed, held(changed, reference)
    if not set(one.contract.budget) & set(instruments.budget):
        raise unpaid(one)
    canvas = scheme_of(program).fills
    if "quality" in instruments.budget and not canvas:
        raise UsageError(
            what="quality is measured on canvases", where="--budget", hint="bound kl, kl_max, top1 or agreement"
        )
    wanted = canvas and (program.meta.get("examples") or "quality" in instruments.budget)
    known = quality.measure(program) if wanted else None
    result.status, result.verify = "reverted", {}
    given: int = result.options["refresh"] if refreshes else -1  # type: ignore[assignment]
    tries = [given, *(r for r in one.contract.refresh if not given or r < given)]
    if refreshes:
        result.reason = check(one, oracles.of(program), program, at_refresh(one, 1).run(program), result, instruments)
    for refresh in [] if result.reason else tries:
        changed = (at_refresh(one, refresh) if refreshes else one).run(program)
        instruments.say(f"{one.name}: drift" + (f" with refresh={refresh}" if refreshes else ""))
        result.nodes, result.bytes = (nodes(program), nodes(changed)), (step_bytes(program), step_bytes(changed))
        to = held(changed, reference)  # batches against sequences alone
        result.reason = check(one, oracles.of(to), program, changed, result, instruments)
        if result.reason:
            break
        drift = measure(program if to is changed else to, with_probe(changed), known=known)
        result.verify |= drift.metrics()
        result.drift = asdict(drift)
        result.reason = drift.misses(instruments.budget)
        if refreshes:
            result.options["refresh"] = refresh
        if not result.reason:
            result.status = "applied"
            result.reason = "" if refresh == given else f"refresh={refresh}: with fewer the budget was missed"
            return changed, to
    return program, reference


def held(changed: Program, reference: Program) -> Program:
    """What a program that loses something is compared with: itself, or the reference where it but draws other ids."""
    return reference if drawn(changed.control) else changed


def unpaid(one: Pass) -> UsageError:
    """What to tell of a lossy pass without a budget."""
    does = (import_module(type(one).__module__).__doc__ or "").partition(": ")[2].partition("\n")[0]
    shifts = one.contract.budget == ("shift",)
    does = "ids that are drawn have another distribution than the model's" if shifts else does
    return UsageError(
        what=f"{one.name} is lossy on this model, and nothing says how much may be lost",
        where=f"--pass {one.name}",
        why="its rows see the whole canvas, and stored ones are not refreshed each round"
        if one.contract.refresh
        else does,
        hint=f"give a budget: --budget {'shift=0.1' if shifts else 'kl=0.05,top1=0.95'}",
    )


def at_refresh(one: Pass, refresh: int) -> Pass:
    """The pass with everything recomputed every so many rounds."""
    made: Any = one
    changed: Pass = dataclasses.replace(made, refresh=refresh)
    return changed
