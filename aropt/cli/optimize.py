"""What the commands do, apart from reading their flags: optimize with staging, benchmark and report; run; bench."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aropt.bench import timing as bench
from aropt.bench.variants import Origin
from aropt.bench.window_sweep import curve
from aropt.cli.asked import check_names, check_paths
from aropt.cli.sections import benchmark, samples
from aropt.errors import BudgetMissed, Unsupported, UsageError, VerificationFailed
from aropt.frontend.examples import prompts, read, texts
from aropt.frontend.facts import Source
from aropt.frontend.sources import resolve
from aropt.ir.program import Program
from aropt.loops.given import check_ids
from aropt.loops.scheme import scheme, scheme_for, scheme_of
from aropt.models import REFERENCES
from aropt.pipeline import artifact, store
from aropt.pipeline.api import capture, untrained
from aropt.pipeline.api import optimize as optimize_program
from aropt.pipeline.bisect import bisect
from aropt.pipeline.checks import Instruments
from aropt.pipeline.registry import pipeline, untold
from aropt.rewriting.contract import Skips, planned
from aropt.targets import DEFAULT, find_target
from aropt.validate.drift import budget

Say = Callable[[str], None]
SMALL = 64 * 2**20  # bytes of weights below which eager runs use one thread
TOKENS = 200  # new tokens of a benchmark, where the model has room


@dataclass(frozen=True)
class Request:
    """What `aropt optimize` was asked for."""

    model: str
    out: Path
    target: str = DEFAULT
    passes: Sequence[str] = ()
    dropped: Sequence[str] = ()
    rules: Sequence[str] | None = None
    capacity: int | None = None
    threads: int | None = None
    seed: int = 0
    runs: int = 5
    tokens: int = TOKENS
    against: Sequence[str] = bench.DEFAULT_AGAINST
    force: bool = False
    check: bool = True
    trust_remote_code: bool = False
    print_after: frozenset[str] = frozenset()
    print_diff: bool = False
    dump_dir: Path | None = None
    say: Say = field(default=lambda _: None)
    show: Say = field(default=lambda _: None)
    measure: bool = False  # let the target choose by timing even if nothing else is timed
    loop: str | None = None
    mask: int | None = None
    budget: str = ""
    guide: str | None = None
    block: int | None = None
    shift: bool | None = None
    examples: Path | None = None
    prompts: Path | None = None
    keep_going: bool = False
    thorough: bool = False


def optimize(request: Request) -> dict[str, Any]:
    """Optimizes, validates, times, and writes OUT. Returns the report. A failed validation leaves OUT.failed."""
    say = request.say
    store.check_free(request.out, request.force, inputs(request))
    bench.check(request.against)
    chosen, allowed = pipeline(request.passes, request.dropped), budget(request.budget)
    say("load")
    source = find(request)
    threads = request.threads or torch.get_num_threads()
    if sum(p.nbytes for p in source.module.parameters()) < SMALL:
        torch.set_num_threads(
            1
        )  # eager reference runs: a second thread costs more than it brings, and on a busy machine far more
    say("capture")
    program = captured(request, source)
    instruments = Instruments(
        say, request.show, request.print_after, request.print_diff, request.dump_dir, request.check
    )
    failed: list[dict[str, Any]] = []
    with store.staged(request.out, request.force, inputs(request)) as folder:
        if source.texts is not None:
            source.texts.save(folder)
        done = optimize_program(
            program,
            request.target,
            chosen,
            check=request.check,
            folder=folder,
            threads=threads,
            instruments=instruments,
            seed=request.seed,
            strict=False,
            measure=request.runs > 0 or request.measure,
            tries=untold(request.passes, request.dropped),
            budget=allowed,
            keep_going=request.keep_going,
            thorough=request.thorough,
        )
        report = done.report
        if request.check and report["verify"]["status"] == "fail":
            failed.append(report)
            artifact.write(done.program, folder, report, source.files)
            aside = store.put_aside(folder, request.out)
            if "needs_finetune" in done.program.meta:
                raise untrained(done.program)
            raise VerificationFailed(
                what=f"the optimized program does not match '{request.model}'",
                where=str(aside / "report.html"),
                why=json.dumps(report["verify"]["diverges"]) if report["verify"]["diverges"] else "",
                hint="see the report; leave a pass out with --no-pass NAME, or try --target eager",
            )
        missed = report.get("drift", {}).get("missed", "")
        if missed:
            artifact.write(done.program, folder, report, source.files)
            aside = store.put_aside(folder, request.out)
            raise BudgetMissed(
                what=f"the program lowered to {request.target} misses the budget",
                where=str(aside / "report.html"),
                why=missed,
                hint="raise the budget, or leave the pass out",
            )
        say("samples")
        report["samples"] = [one.model_dump() for one in samples(program, done, source)]
        artifact.write(done.program, folder, {}, source.files)
        timed(report, folder, done.program, source, request, threads)
        if request.runs:
            report["windows"] = curve(source.module, done, request.target, threads, request.runs, say)
        artifact.write(done.program, folder, report, source.files)
    return json.loads((request.out / "report.json").read_text())  # type: ignore[no-any-return]


def inputs(request: Request) -> list[Path]:
    """The files and folders that the result is made from, or that are written besides: it is not written over them."""
    models = [m for m in (request.model, request.guide) if m is not None and m not in REFERENCES]
    files = [Path(m.rpartition(":")[0] if ".py:" in m else m) for m in models]
    return [*(f for f in files if f.exists()), *filter(None, (request.examples, request.prompts, request.dump_dir))]


def find(request: Request) -> Source:
    """The model that was asked for, once the other options are checked."""
    check_names(request.target, request.loop, request.rules or (), request.guide, request.print_after)
    check_paths(request.examples, request.prompts, request.dump_dir)
    chosen = scheme(request.loop) if request.loop else scheme_for({"mask": request.mask})
    source = resolve(request.model, request.capacity, request.trust_remote_code, chosen.masked)
    there = Path(request.model).exists() and request.model not in REFERENCES  # whatever lies in this folder
    source.meta["source"] = str(Path(request.model).resolve()) if there else request.model
    given = {"mask": request.mask, "block": request.block, "shift": request.shift}
    source.meta |= {name: value for name, value in given.items() if value is not None}
    if request.examples is not None:
        source.meta["examples"] = read(request.examples, *texts(source.texts))
    if request.prompts is not None:
        source.meta["prompts"] = prompts(request.prompts, texts(source.texts)[0])
    return source


def captured(request: Request, source: Source) -> Program:
    """Its plain program."""
    program = capture(
        source,
        rules=request.rules,
        loop=request.loop,
        trust_remote_code=request.trust_remote_code,
        guide=guide_of(request),
    )
    check_ids(program, program.meta["prompts"] if request.prompts is not None else [], f"{request.prompts}, prompt")
    if request.examples is not None and not scheme_of(program).fills:
        raise UsageError(
            what="examples are for models that unmask a canvas",
            where="--examples",
            why="quality is the share of masked ids that are right",
            hint="leave it out; what other models lose is bounded by kl, top1 and agreement",
        )
    return program


def guide_of(request: Request) -> str | None:
    """The guide that was asked for, wherever the program is loaded again."""
    there = request.guide is not None and Path(request.guide).exists() and request.guide not in REFERENCES
    return str(Path(str(request.guide)).resolve()) if there else request.guide


def timed(
    report: dict[str, Any], folder: Path, program: Program, source: Source, request: Request, threads: int
) -> None:
    """Adds benchmark, speedups and roofline to the report."""
    if request.runs == 0:
        report.setdefault("notes", []).append("Nothing was timed: --runs 0.")
        return
    against = [v for v in request.against if v != "hf" or hasattr(source.module, "generate")]
    origin = Origin(source.meta["source"], request.trust_remote_code, guide_of(request) or "")
    found = benchmark(folder, program, against, request.runs, request.tokens, threads, request.say, origin)
    report |= found.model_dump(exclude_none=True, exclude={"notes"})
    report.setdefault("notes", []).extend(found.notes)


def run_bisect(request: Request) -> str | None:
    """The first pass after which the lowered program fails."""
    program = captured(request, find(request))
    return bisect(program, pipeline(request.passes, request.dropped), request.target, request.say)


def plan(request: Request) -> list[dict[str, Any]]:
    """What each pass would do, without doing it: [{name, level, status, reason, matches, rejected}]."""
    program = captured(request, find(request))
    found: list[dict[str, Any]] = []
    for one in pipeline(request.passes, request.dropped):
        entry: dict[str, Any] = {
            "name": one.name,
            "level": one.contract.level,
            "reason": "",
            "matches": [],
            "rejected": [],
        }
        found.append(entry)
        try:
            found_plan = planned(one, program, find_target(request.target))
        except Unsupported as refused:
            entry |= {"status": "refused", "reason": str(refused), "rejected": [[refused.where, refused.why]]}
            break
        entry["rejected"] = [list(r) for r in found_plan.rejected]
        if isinstance(found_plan, Skips):
            entry |= {"status": "skips", "reason": found_plan.reason}
        else:
            entry |= {"status": "applies", "matches": list(found_plan.matches)}
            program = one.run(program)
    return found
