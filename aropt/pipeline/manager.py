"""The pass manager: plans, runs, verifies, validates, reverts, and says what happened (design section 6)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aropt.errors import AroptError
from aropt.ir.program import Entry, Program
from aropt.pipeline.checks import QUIET, Instruments, check, dump
from aropt.pipeline.cost import nodes, step_bytes
from aropt.pipeline.lossy import spend
from aropt.pipeline.registry import check_order
from aropt.rewriting.contract import Pass, Result, Skips, planned
from aropt.targets import find_target
from aropt.validate.oracle import Oracles


class Rewritten(NamedTuple):
    """A program after its passes, what became of each, and `reference`: the program whose outputs it must have.

    That is the program that was given, or else what the last lossy or retrained pass made.
    """

    program: Program
    results: list[Result]
    reference: Program


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    target: str,
    instruments: Instruments = QUIET,
    oracles: Oracles | None = None,
) -> Rewritten:
    """Runs the passes in order; each one that changes the program is verified and validated.

    Raises AroptError where one that was planned fails, unless `instruments.keep_going`: then it is reverted. A lossy
    one that costs more than its budget is reverted too. Raises UsageError for passes in a wrong order, before any runs.
    """
    check_order(passes)
    reference, results, oracles, goal = program, [], oracles or Oracles(), find_target(target)
    for number, one in enumerate(passes):
        instruments.say(one.name)
        start = time.perf_counter()
        result = Result(one.name, "skipped", one.contract.level, options=dataclasses.asdict(one))  # type: ignore[call-overload]
        result.nodes = (nodes(program), nodes(program))
        result.bytes = (step_bytes(program), step_bytes(program))
        results.append(result)
        plan = planned(one, program, goal)
        result.rejected = plan.rejected
        if isinstance(plan, Skips):
            result.reason = plan.reason
            result.seconds = time.perf_counter() - start
            continue
        result.matches, result.memory, result.level = plan.matches, plan.memory, plan.level or one.contract.level
        if result.level == "lossy":
            changed, reference = spend(one, program, reference, result, instruments, oracles)
            result.seconds = time.perf_counter() - start
            program = recorded(changed, result) if result.status == "applied" else program
            continue
        make = plan.make or functools.partial(one.run, program)
        changed, problem = attempt(one, make, program, reference, result, instruments, oracles)
        dump(program, changed, number, one.name, instruments)
        if problem and not instruments.keep_going:
            for later in passes[number + 1 :]:
                planned(later, program, goal)  # its refusal says more: what can't be cached can't be checked at once
            raise failure(one, program, problem)
        if problem:
            result.status, result.reason = "reverted", problem
            continue
        result.status = "applied"
        reference = changed if result.level == "retrained" else reference
        program = recorded(changed, result)
    return Rewritten(program, results, reference)


def recorded(changed: Program, result: Result) -> Program:
    """The program that a pass made, with a line for it in the ledger."""
    entry = Entry(result.name, result.level, result.options, dict(result.verify))
    return changed.replace(ledger=(*changed.ledger, entry))


def attempt(
    one: Pass,
    make: Callable[[], Program],
    program: Program,
    reference: Program,
    result: Result,
    instruments: Instruments,
    oracles: Oracles,
) -> tuple[Program, str]:
    """The program after a pass that loses nothing, and what is wrong with it. Raises AroptError where it raises."""
    start = time.perf_counter()
    try:
        changed = make()
    except AroptError:
        raise
    except Exception as error:  # a defect of the pass, on a program that it said it applies to
        if not instruments.keep_going:
            raise failure(one, program, f"{type(error).__name__}: {error}") from error
        return program, f"{type(error).__name__}: {error}"
    finally:
        result.seconds = time.perf_counter() - start
    result.nodes, result.bytes = (nodes(program), nodes(changed)), (step_bytes(program), step_bytes(changed))
    wanted = changed if result.level == "retrained" else reference  # what follows is held to the new model
    return changed, check(one, oracles.of(wanted), program, changed, result, instruments)


def failure(one: Pass, program: Program, problem: str) -> AroptError:
    """What to tell of a pass that was planned and then failed."""
    return AroptError(
        what=f"internal error: the pass {one.name} fails on this model, though nothing speaks against it",
        where=f"{one.name}, on {program.meta['name']}",
        why=problem,
        hint=f"report it; --keep-going writes the rest without it, --no-pass {one.name} leaves it out",
    )
