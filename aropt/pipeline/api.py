"""The Python interface: capture, optimize. The command line is thin over these."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt import __version__
from aropt.errors import BudgetMissed, UsageError, VerificationFailed
from aropt.frontend.compute import owned
from aropt.frontend.facts import Source, facts
from aropt.frontend.sources import resolve
from aropt.ir.program import Program
from aropt.loops.given import integer
from aropt.loops.scheme import scheme, scheme_for
from aropt.loops.unmask.ar_verifier import Guide
from aropt.loops.unmask.ar_verifier import make as make_guide
from aropt.pipeline.autotune import tried
from aropt.pipeline.checks import Instruments, describe
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.manager import run_passes
from aropt.pipeline.plugins import load as load_plugin
from aropt.pipeline.registry import pipeline
from aropt.pipeline.uncached import uncached
from aropt.restrict import excluded
from aropt.rewriting.contract import Pass, Result
from aropt.targets import DEFAULT as DEFAULT_TARGET
from aropt.targets import check_target, find_target, lower
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
    return chosen.build(graph, weights, source.meta, rules, guided(guide, source, trust_remote_code))


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
    chosen = pipeline() if passes is None else list(passes)
    chosen, trials = tried(program, chosen, tries if measure else (), target, threads, instruments)
    oracles = Oracles(seed, thorough)
    optimized, results, reference = run_passes(program, chosen, target, instruments, oracles)
    results += [Result(t.name, "skipped", t.level, t.told()) for t in trials if not t.kept]
    probed = with_probe(optimized) if check else optimized
    executor = lower(probed, target, folder, lambda text: instruments.say(text), threads)
    verdict = Verdict()
    drift: Drift | None = None
    if check:
        oracle = oracles.of(reference)
        verdict = validate(
            oracle,
            probed,
            executor,
            whole(oracle.requests, optimized),
            lambda name: instruments.say(f"check: {name}"),
        )
        verdict.coverage = oracle.requests.coverage()
        if reference is not program and "needs_finetune" not in optimized.meta:
            instruments.say("check: drift")
            drift = drift_of(program, probed, executor)
        executor = executor.without_probe(optimized) or lower(optimized, target, folder, threads=threads)
    wanted = measure and (verdict.passed or not check)
    executor, calls = executor.tuned(optimized, instruments.say) if wanted else (executor, {})
    report = describe_run(program, optimized, target, results, verdict, threads)
    finished = Compiled(optimized.replace(meta={**optimized.meta, "target": target}), executor, report)
    if ran := executor.executed():
        finished.report["nodes"] = ran
        finished.report["notes"] += [nodes_note(name, found, find_target(target).called) for name, found in ran.items()]
    if drift is not None:
        missed = drift.misses(instruments.budget)
        finished.report["drift"] = {**asdict(drift), "budget": dict(instruments.budget), "missed": missed}
        if missed and strict:
            raise BudgetMissed(
                what=f"the program lowered to {target} misses the budget", why=missed, hint="raise it, or --no-pass"
            )
    undone = [r for r in results if r.level == "lossy" and r.status == "reverted"]
    timed = f" It was timed with {', '.join(r.name for r in undone)}, which was reverted." if undone else ""
    finished.report["notes"] += [reverted_note(r, instruments.budget) for r in undone]
    finished.report["notes"] += [t.told() + timed for t in trials if t.kept]
    if calls:
        finished.report["calls"] = calls
        finished.report["notes"].append(calls_note(calls))
    if check and strict and "needs_finetune" in optimized.meta:
        raise untrained(optimized)
    if check and not verdict.passed and strict:
        raise VerificationFailed(
            what=f"the program lowered to {target} does not match its reference",
            why=describe(verdict),
            hint="leave a pass out with --no-pass, or try --target eager; report it with the repro line",
        )
    return finished


def untrained(program: Program) -> VerificationFailed:
    """What to tell of a program whose new weights nothing has trained."""
    return VerificationFailed(
        what="the program needs fine-tuning",
        where=", ".join(entry.name for entry in program.ledger if entry.level == "retrained"),
        why="the pass makes another model of it, and its new weights are random",
        hint=str(program.meta["needs_finetune"]),
    )


def reverted_note(result: Result, budget: Mapping[str, float]) -> str:
    """What became of a lossy pass that was asked for and is not in the result, for people."""
    allowed = ",".join(f"{metric}={bound:g}" for metric, bound in budget.items())
    over = f" It was reverted, as it does not keep to the budget {allowed}: give more, or leave it out."
    reason = result.reason.splitlines()[0]
    return f"{result.name} is not in the result: {reason}." + (over if result.drift else "")


def nodes_note(graph: str, found: dict[str, int], runtime: str) -> str:
    """What a session runs each round, for people: the most frequent kinds of nodes."""
    most = ", ".join(f"{count} {kind}" for kind, count in list(found.items())[:6])
    return f"{graph} runs {sum(found.values())} nodes after {runtime}'s own optimization: {most}, ..."


def calls_note(calls: dict[str, Any]) -> str:
    """How the target generates, and why, for people."""
    times = ", ".join(f"{way} {ms:.1f} ms" for way, ms in calls["ms"].items())
    kinds = {"stepping": "steps, one call a round", "one call": "runs the whole loop in one call"}
    chosen = kinds.get(calls["picked"]) or f"runs {calls['picked']} of {', '.join(calls['graphs'])}"
    reason = f" Not to be had: {calls['reason']}." if calls["reason"] else ""
    return f"The target {chosen}: measured on {calls['tokens']} tokens, {times}.{reason}"


def describe_run(
    program: Program, optimized: Program, target: str, results: list[Result], verdict: Verdict, threads: int | None
) -> dict[str, Any]:
    """The report without benchmarks, samples and artifacts (see aropt.pipeline.report for the schema)."""
    meta = program.meta
    passes = []
    for r in results:
        entry = asdict(r)
        del entry["diff"], entry["drift"]
        passes.append(
            {
                **entry,
                "nodes": change(r.nodes),
                "bytes": change(r.bytes),
                "matches": list(r.matches),
                "rejected": [list(x) for x in r.rejected],
            }
        )
    outcomes = [
        {
            "name": o.case.name,
            "kind": o.case.kind,
            "prompt": max(len(p) for p in o.case.prompts),
            "tokens": o.tokens,
            "error": o.error,
            "floor": o.floor,
            "ratio": o.ratio,
            "ties": o.ties,
            "status": "pass" if o.passed else "fail",
        }
        for o in verdict.outcomes
    ]
    without = uncached(optimized, results)
    notes = ([without] if without else []) + [r.failed() for r in results if r.failed()]
    notes += [
        *meta.get("left_out", []),
        *([meta["limit"]] if "limit" in meta else []),
        *([] if verdict.outcomes else ["Nothing was validated: --no-check."]),
    ]
    checked = {
        "status": "pass" if verdict.passed and "needs_finetune" not in optimized.meta else "fail",
        "metrics": verdict.metrics(),
        "cases": outcomes,
        "coverage": verdict.coverage,
        "diverges": divergence(verdict),
    }
    return {
        "schema_version": 1,
        "tool": {"name": "aropt", "version": __version__},
        "env": environment(threads),
        "target": target,
        "model": {
            "name": meta["name"],
            "source": str(meta.get("source", "")),
            "modality": meta.get("modality", "tokens"),
            "parameters": sum(w.numel() for w in program.weights.values()),
            "bytes": sum(w.nbytes for w in program.weights.values()),
            "vocab": meta["vocab"],
            "capacity": meta["capacity"],
            "heldout": meta.get("heldout") or None,
        },
        "passes": passes,
        "verify": checked,
        "uncached": without,
        "notes": notes,
    }


def divergence(verdict: Verdict) -> dict[str, Any] | None:
    """The first op that differs, as the report has it."""
    found = verdict.diverges
    return None if found is None else {k: found.get(k, "") for k in ("module", "node", "op", "error", "where", "repro")}


def change(pair: tuple[int, int]) -> dict[str, int]:
    return {"before": pair[0], "after": pair[1]}


def environment(threads: int | None) -> dict[str, Any]:
    """Versions and machine, for the report."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": found("onnxruntime"),
        "transformers": found("transformers"),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
