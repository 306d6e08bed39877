"""The Python interface: capture, optimize. The command line is thin over these."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from aropt.errors import BudgetMissed, UsageError, VerificationFailed
from aropt.frontend.compute import owned
from aropt.frontend.facts import Source, facts
from aropt.frontend.sources import resolve
from aropt.ir.executor import Executor
from aropt.ir.program import Meta, Program
from aropt.loops.given import integer
from aropt.loops.scheme import scheme, scheme_for
from aropt.loops.unmask.ar_verifier import Guide
from aropt.loops.unmask.ar_verifier import make as make_guide
from aropt.pipeline.autotune import tried
from aropt.pipeline.checks import Instruments, describe
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.describe import Run, described
from aropt.pipeline.manager import Rewritten, run_passes
from aropt.pipeline.memory import measured
from aropt.pipeline.plugins import load as load_plugin
from aropt.pipeline.registry import pipeline
from aropt.restrict import excluded
from aropt.rewriting.contract import Pass, Result
from aropt.targets import DEFAULT as DEFAULT_TARGET
from aropt.targets import check_target, lower
from aropt.validate.compare import Verdict, validate, with_probe
from aropt.validate.drift import Drift, check_budget
from aropt.validate.drift import measure as drift_of
from aropt.validate.oracle import Oracles
from aropt.validate.slices import whole

Say = Callable[[str], None]


def capture(
    model: str | nn.Module | Source,
    *,
    capacity: int | None = None,
    rules: Sequence[str] | None = None,
    loop: str | None = None,
    trust_remote_code: bool = False,
    guide: str | nn.Module | Source | None = None,
    **meta: Any,
) -> Program:
    """The plain generation program of a model: the whole forward for each token, then the rule.

    `model`: a reference model's name, a Hugging Face directory, "file.py:factory", a .pt2, or an nn.Module with
    forward(ids int64[B, T]) -> logits[B, T, V] (alone, first in a tuple, or as "logits"). A module is copied and
    computes in float32, so that the program owns its weights. `loop`: "positions" (one token after the other) or
    "unmask" (a canvas, by default for models with a mask id). `rules`: names from aropt.loops.rules, or from
    aropt.loops.unmask.commit for a canvas. `guide`: a model of one token after the other that judges what a canvas's
    rounds would write (see aropt.loops.unmask.ar_verifier). `meta` overrides what is known of the model (vocab,
    input_vocab, null, mask, block, prompts, examples (see aropt.validate.quality), name).
    Raises Unsupported, UsageError.
    """
    if isinstance(model, nn.Module):
        source = given(model, capacity)
    else:
        masked = (scheme(loop) if loop else scheme_for(meta)).masked
        source = resolve(model, capacity, trust_remote_code, masked) if isinstance(model, str) else model
    source.meta |= meta
    chosen = scheme(loop) if loop else scheme_for(source.meta)
    chosen.check_model(source.meta)
    chosen.check_rules(rules, guide is not None)
    graph, weights = source.captured()
    source.meta |= excluded.facts(graph, source.meta)
    return chosen.build(graph, weights, cast(Meta, source.meta), rules, guided(guide, source, trust_remote_code))


def given(model: nn.Module, capacity: int | None) -> Source:
    """A module of the caller's as a source: a copy, so that neither changes the other."""
    module = owned(model)
    return Source(module, {"name": type(model).__name__, "source": "", "modality": "tokens", **facts(module, capacity)})


def guided(guide: str | nn.Module | Source | None, source: Source, trusted: bool) -> Guide | None:
    """The captured guide. Raises Unsupported, UsageError."""
    if guide is None:
        return None
    found = given(guide, None) if isinstance(guide, nn.Module) else guide
    found = resolve(found, None, trusted) if isinstance(found, str) else found
    graph, weights = found.captured()
    name = str(guide) if isinstance(guide, str) else str(found.meta["name"])
    return make_guide(name, graph, weights, int(found.meta["vocab"]), int(found.meta["capacity"]))


def optimize(
    program: Program,
    target: str = DEFAULT_TARGET,
    passes: Sequence[Pass] | None = None,
    *,
    check: bool = True,
    folder: Path | None = None,
    threads: int | None = None,
    instruments: Instruments | None = None,
    seed: int = 0,
    strict: bool = True,
    measure: bool = False,
    tries: Sequence[Sequence[Pass]] = (),
    budget: Mapping[str, float] | None = None,
    keep_going: bool = False,
    thorough: bool = False,
    plugins: Sequence[str | Path] = (),
) -> Compiled:
    """Runs the passes, lowers to `target`, validates the result against `program`. Returns it, lowered.

    Lossy passes spend from `budget` ({metric: bound}, see `aropt.validate.drift`), measured against `program`; the
    result is then validated against the reference interpreter's run of what they made.

    `folder` keeps what the target builds. The report (passes, verification) is in `.report`. With `check=False` nothing
    is validated, and the report says so. `measure` lets the target choose by timing where it has a choice, and adds
    those passes of `tries` with which answers to the model's own prompts are generated faster (of several ways of one,
    the fastest).
    `thorough` validates on several times as many requests. `plugins` are files that bring a pass or an op along
    (`aropt.pipeline.plugins`).
    Raises AroptError where a pass that was planned fails; with `keep_going` the rest goes on without it.
    Raises VerificationFailed if the lowered program differs, or needs fine-tuning, and `strict` is set.
    """
    for file in plugins:
        load_plugin(file)
    check_target(target)
    if threads is not None and integer(threads, "threads") < 1:
        raise UsageError(what=f"can't run with {threads} threads", where="threads", hint="give a number of 1 or more")
    instruments = instruments or Instruments()
    if budget:
        instruments = replace(instruments, budget=check_budget(budget))
    if keep_going:
        instruments = replace(instruments, keep_going=True)
    chosen = pipeline() if passes is None else passes
    chosen, trials = tried(program, chosen, tries if measure else (), target, threads, instruments)
    oracles = Oracles(seed, thorough)
    rewritten = run_passes(program, chosen, target, instruments, oracles)
    rewritten.results.extend(Result(t.name, "skipped", t.level, t.told()) for t in trials if not t.kept)
    lowered = functools.partial(lower, target=target, folder=folder, progress=instruments.say, threads=threads)
    if check:
        executor, verdict, drift = checked(program, rewritten, lowered, instruments.say, oracles)
    else:
        executor, verdict, drift = lowered(rewritten.program), Verdict(), None
    wanted = measure and (verdict.passed or not check)
    executor, calls = executor.tuned(rewritten.program, instruments.say) if wanted else (executor, {})
    held = measured(rewritten.program, executor) if wanted else {}
    run = Run(program, rewritten.program, target, threads, rewritten.results, verdict, trials, drift,
              instruments.budget, calls, executor.executed(), held)  # fmt: skip
    if strict:
        demand(run, check)
    made = rewritten.program.replace(meta={**rewritten.program.meta, "target": target})
    return Compiled(made, executor, described(run))


def checked(
    program: Program, rewritten: Rewritten, lowered: Callable[[Program], Executor], say: Say, oracles: Oracles
) -> tuple[Executor, Verdict, Drift | None]:
    """The program lowered, whether it is right, and how far a lossy one drifts from the program that was given."""
    optimized, oracle = rewritten.program, oracles.of(rewritten.reference)
    probed = with_probe(optimized)
    executor = lowered(probed)
    chosen = whole(oracle.requests, optimized)
    verdict = validate(oracle, probed, executor, chosen, lambda name: say(f"check: {name}"))
    verdict.coverage = oracle.requests.coverage()
    drift = None
    lossy = any(result.level == "lossy" and result.status == "applied" for result in rewritten.results)
    if (lossy or rewritten.reference is not program) and "needs_finetune" not in optimized.meta:
        say("check: drift")
        drift = drift_of(program, probed, executor)
    return executor.without_probe(optimized) or lowered(optimized), verdict, drift


def demand(run: Run, check: bool) -> None:
    """Raises BudgetMissed, VerificationFailed for a result that is not what was asked for."""
    if run.missed():
        raise BudgetMissed(
            what=f"the program lowered to {run.target} misses the budget",
            why=run.missed(),
            hint="raise it, or --no-pass",
        )
    if check and run.untrained():
        raise untrained(run.made)
    if check and not run.verdict.passed:
        raise VerificationFailed(
            what=f"the program lowered to {run.target} does not match its reference",
            why=describe(run.verdict),
            hint="leave a pass out with --no-pass, or try --target eager; report it with the repro line",
        )


def untrained(program: Program) -> VerificationFailed:
    """What to tell of a program whose new weights nothing has trained."""
    return VerificationFailed(
        what="the program needs fine-tuning",
        where=", ".join(entry.name for entry in program.ledger if entry.level == "retrained"),
        why="the pass makes another model of it, and its new weights are random",
        hint=str(program.meta["needs_finetune"]),
    )
