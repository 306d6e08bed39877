"""The report of an optimization, built from what the run left: its schema is that of `aropt.pipeline.schema`."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from aropt import __version__
from aropt.ir.program import Program
from aropt.pipeline import schema
from aropt.pipeline.autotune import Trial
from aropt.pipeline.memory import memory
from aropt.pipeline.uncached import uncached
from aropt.rewriting.contract import Result
from aropt.targets import find_target
from aropt.validate.compare import Outcome, Verdict
from aropt.validate.drift import Drift


@dataclass(frozen=True)
class Run:
    """What an optimization left: the program that was given, the one that was made, and what happened between them."""

    given: Program
    made: Program
    target: str
    threads: int | None
    results: Sequence[Result]
    verdict: Verdict
    trials: Sequence[Trial] = ()
    drift: Drift | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    calls: Mapping[str, Any] = field(default_factory=dict)  # how the target generates, as it measured
    nodes: Mapping[str, dict[str, int]] = field(default_factory=dict)  # what it runs each round
    held: Mapping[str, int] = field(default_factory=dict)  # what values took as it generated

    def missed(self) -> str:
        """What drifts over the budget, in words; empty if nothing does."""
        return self.drift.misses(self.budget) if self.drift is not None else ""

    def untrained(self) -> bool:
        """Whether the program has new weights that nothing has trained."""
        return "needs_finetune" in self.made.meta


def described(run: Run) -> dict[str, Any]:
    """The report without benchmarks, samples and artifacts."""
    more: dict[str, Any] = {}
    if run.nodes:
        more["nodes"] = dict(run.nodes)
    if run.drift is not None:
        more["drift"] = schema.Drift(**asdict(run.drift), budget=dict(run.budget), missed=run.missed())
    if run.calls:
        more["calls"] = schema.Calls(**run.calls)
    found = schema.Report(
        schema_version=1,
        tool=schema.Tool(name="aropt", version=__version__),
        env=environment(run.threads),
        model=model(run.given),
        target=run.target,
        passes=[passed(result) for result in run.results],
        verify=verified(run),
        uncached=uncached(run.made, run.results),
        notes=notes(run),
        tried=[
            schema.Tried(**{n: v for n, v in asdict(t).items() if n not in ("level", "reason")}) for t in run.trials
        ],
        memory=memory(run.made).model_copy(update=dict(run.held)),
        **more,
    )
    return found.model_dump(mode="json", exclude_unset=True)


def model(program: Program) -> schema.Model:
    """The model that was given."""
    meta, weights = program.meta, program.weights.values()
    return schema.Model(
        name=meta["name"],
        source=str(meta.get("source", "")),
        modality=meta.get("modality", "tokens"),
        parameters=sum(w.numel() for w in weights),
        bytes=sum(w.nbytes for w in weights),
        vocab=meta["vocab"],
        capacity=meta["capacity"],
        heldout=meta.get("heldout") or None,
    )


def passed(result: Result) -> schema.Pass:
    """What one pass did."""
    entry = {k: v for k, v in asdict(result).items() if k not in ("diff", "drift")}
    nodes, size = (schema.Change(before=a, after=b) for a, b in (result.nodes, result.bytes))
    return schema.Pass(**{**entry, "nodes": nodes, "bytes": size})


def verified(run: Run) -> schema.Verification:
    """What the result was verified on."""
    found = run.verdict.diverges
    kept = ("module", "node", "op", "error", "where", "repro")
    return schema.Verification(
        status="pass" if run.verdict.passed and not run.untrained() else "fail",
        coverage=None if run.verdict.coverage is None else schema.Coverage(**run.verdict.coverage),
        metrics=dict(run.verdict.metrics()),
        cases=[case(outcome) for outcome in run.verdict.outcomes],
        diverges=None if found is None else schema.Divergence(**{k: found.get(k, "") for k in kept}),
    )


def case(outcome: Outcome) -> schema.Case:
    """One case that was validated."""
    return schema.Case(
        name=outcome.case.name,
        kind=outcome.case.kind,  # type: ignore[arg-type]
        prompt=max(map(len, outcome.case.prompts)),
        tokens=outcome.tokens,
        error=outcome.error,
        floor=outcome.floor,
        ratio=outcome.ratio,
        ties=outcome.ties,
        status="pass" if outcome.passed else "fail",
    )


def notes(run: Run) -> list[str]:
    """What people are to know of the run, the costliest first."""
    meta, without = run.given.meta, uncached(run.made, run.results)
    undone = [r for r in run.results if r.level == "lossy" and r.status == "reverted"]
    timed = f" It was timed with {', '.join(r.name for r in undone)}, which was reverted." if undone else ""
    return [
        *([without] if without else []),
        *(r.failed() for r in run.results if r.failed()),
        *meta.get("left_out", []),
        *([meta["limit"]] if "limit" in meta else []),
        *([] if run.verdict.outcomes else ["Nothing was validated: --no-check."]),
        *(nodes_note(name, found, find_target(run.target).called) for name, found in run.nodes.items()),
        *(reverted_note(r, run.budget) for r in undone),
        *(t.told() + timed for t in run.trials if t.kept),
        *([calls_note(run.calls)] if run.calls else []),
    ]


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


def calls_note(calls: Mapping[str, Any]) -> str:
    """How the target generates, and why, for people."""
    times = ", ".join(f"{way} {ms:.1f} ms" for way, ms in calls["ms"].items())
    kinds = {"stepping": "steps, one call a round", "one call": "runs the whole loop in one call"}
    chosen = kinds.get(calls["picked"]) or f"runs {calls['picked']} of {', '.join(calls['graphs'])}"
    reason = f" Not to be had: {calls['reason']}." if calls["reason"] else ""
    return f"The target {chosen}: measured on {calls['tokens']} tokens, {times}.{reason}"


def environment(threads: int | None) -> schema.Env:
    """Versions and machine."""
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return schema.Env(
        python=platform.python_version(),
        torch=torch.__version__,
        onnxruntime=found("onnxruntime"),
        transformers=found("transformers"),
        platform=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(),
        threads=threads or torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def cpu_name() -> str:
    """The processor's model name where the system tells it."""
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
