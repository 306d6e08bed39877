"""What the commands do, apart from reading their flags: optimize with staging, benchmark and report; run; bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from aropt.bench.timing import DEFAULT_AGAINST
from aropt.bench.timing import check as check_variants
from aropt.bench.variants import Origin
from aropt.bench.window_sweep import curve
from aropt.cli.asked import check
from aropt.cli.drafts import asked_drafts, check_draft, tries, with_draft
from aropt.cli.options import Doing, Reading, Writing, timed
from aropt.cli.sections import benchmark, samples
from aropt.errors import BudgetMissed, Unsupported, UsageError, VerificationFailed
from aropt.frontend.examples import prompts, texts
from aropt.frontend.examples import read as read_examples
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
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.registry import pipeline
from aropt.rewriting.contract import Pass, Skips, planned
from aropt.targets import find_target
from aropt.validate.drift import budget

SMALL = 64 * 2**20  # bytes of weights below which eager runs use one thread


def optimize(read: Reading, do: Doing, write: Writing) -> dict[str, Any]:
    """Optimizes, validates, times, and writes OUT. Returns the report. A failed validation leaves OUT.failed."""
    against = DEFAULT_AGAINST if do.against is None else do.against
    store.check_free(write.out, write.force, inputs(read, do, write))
    check_variants(against)
    chosen, allowed = passes(do), budget(do.budget)
    write.say("load")
    check(read, do, write)
    source = find(read)
    threads = do.threads or torch.get_num_threads()
    if sum(p.nbytes for p in source.module.parameters()) < SMALL:  # of the eager reference runs: a second thread
        torch.set_num_threads(1)  # costs more than it brings, and on a busy machine far more
    write.say("capture")
    program = captured(read, source)
    for model in asked_drafts(do):
        check_draft(model, program, source)
    instruments = Instruments(
        write.say, write.show, frozenset(write.print_after or ()), write.print_diff, write.dump_dir, not do.no_check
    )
    with store.staged(write.out, write.force, inputs(read, do, write)) as folder:
        if source.texts is not None:
            source.texts.save(folder)
        done = optimize_program(
            program, do.target, chosen, check=not do.no_check, folder=folder, threads=threads, instruments=instruments,
            seed=do.seed, strict=False, measure=timed(do), tries=tries(do), budget=allowed, keep_going=do.keep_going,
            thorough=do.thorough,
        )  # fmt: skip
        demand(done, folder, source, read, do, write)
        write.say("samples")
        report, notes = done.report, done.report["notes"]
        report["samples"] = [one.model_dump() for one in samples(program, done, source)]
        artifact.write(done.program, folder, {}, source.files)
        if do.runs:
            usable = [v for v in against if v != "hf" or hasattr(source.module, "generate")]
            origin = Origin(source.meta["source"], read.trust_remote_code, guide_of(read) or "")
            found = benchmark(folder, done.program, usable, do.runs, do.tokens, threads, write.say, origin)
            report |= {**found.model_dump(exclude_none=True), "notes": notes + found.notes}
            report["windows"] = curve(source.module, done, do.target, threads, do.runs, write.say)
        else:
            notes.append("Nothing was timed: --runs 0.")
        artifact.write(done.program, folder, report, source.files)
        write.say("done")  # raises an interrupt that was lost on the way, before the folder takes its place
    return json.loads((write.out / "report.json").read_text())  # type: ignore[no-any-return]


def demand(done: Compiled, folder: Path, source: Source, read: Reading, do: Doing, write: Writing) -> None:
    """Raises VerificationFailed, BudgetMissed for a result that is not what was asked for, once it is put aside."""
    report = done.report
    wrong = not do.no_check and report["verify"]["status"] == "fail"
    missed = report.get("drift", {}).get("missed", "")
    if not wrong and not missed:
        return
    artifact.write(done.program, folder, report, source.files)
    page = str(store.put_aside(folder, write.out) / "report.html")
    if wrong and "needs_finetune" in done.program.meta:
        raise untrained(done.program)
    if wrong:
        raise VerificationFailed(
            what=f"the optimized program does not match '{read.model}'",
            where=page,
            why=json.dumps(report["verify"]["diverges"]) if report["verify"]["diverges"] else "",
            hint="see the report; leave a pass out with --no-pass NAME, or try --target eager",
        )
    raise BudgetMissed(
        what=f"the program lowered to {do.target} misses the budget",
        where=page,
        why=missed,
        hint="raise the budget, or leave the pass out",
    )


def inputs(read: Reading, do: Doing, write: Writing) -> list[Path]:
    """The files and folders that the result is made from, or that are written besides: it is not written over them."""
    every = (read.model, read.guide, *asked_drafts(do))
    models = [m for m in every if m is not None and m not in REFERENCES]
    files = [Path(m.rpartition(":")[0] if ".py:" in m else m) for m in models]
    return [*(f for f in files if f.exists()), *filter(None, (read.examples, read.prompts, write.dump_dir))]


def find(read: Reading) -> Source:
    """The model that was asked for."""
    chosen = scheme(read.loop) if read.loop else scheme_for({"mask": read.mask})
    source = resolve(read.model, read.capacity, read.trust_remote_code, chosen.masked)
    there = Path(read.model).exists() and read.model not in REFERENCES  # whatever lies in this folder
    source.meta["source"] = str(Path(read.model).resolve()) if there else read.model
    given = {"mask": read.mask, "block": read.block, "shift": read.shift}
    source.meta |= {name: value for name, value in given.items() if value is not None}
    if read.examples is not None:
        source.meta["examples"] = read_examples(read.examples, *texts(source.texts))
    if read.prompts is not None:
        source.meta["prompts"] = prompts(read.prompts, texts(source.texts)[0])
    return source


def captured(read: Reading, source: Source) -> Program:
    """Its plain program."""
    program = capture(
        source,
        rules=read.rule or None,
        loop=read.loop,
        trust_remote_code=read.trust_remote_code,
        guide=guide_of(read),
    )
    check_ids(program, program.meta["prompts"] if read.prompts is not None else [], f"{read.prompts}, prompt")
    if read.examples is not None and not scheme_of(program).fills:
        raise UsageError(
            what="examples are for models that unmask a canvas",
            where="--examples",
            why="quality is the share of masked ids that are right",
            hint="leave it out; what other models lose is bounded by kl, top1 and agreement",
        )
    return program


def guide_of(read: Reading) -> str | None:
    """The guide that was asked for, wherever the program is loaded again."""
    there = read.guide is not None and Path(read.guide).exists() and read.guide not in REFERENCES
    return str(Path(str(read.guide)).resolve()) if there else read.guide


def passes(do: Doing) -> list[Pass]:
    """Those that are asked for; the draft model's with its usual tree where nothing is timed."""
    chosen = pipeline(do.passes or (), do.no_pass or ())
    return with_draft(chosen, do.draft, timed(do)) if do.draft else chosen


def run_bisect(read: Reading, do: Doing, write: Writing) -> str | None:
    """The first pass after which the lowered program fails."""
    check(read, do, write)
    return bisect(captured(read, find(read)), passes(do), do.target, write.say)


def plan(read: Reading, do: Doing, write: Writing) -> list[dict[str, Any]]:
    """What each pass would do, without doing it: [{name, level, status, reason, matches, rejected}]."""
    check(read, do, write)
    program = captured(read, find(read))
    found: list[dict[str, Any]] = []
    for one in passes(do):
        entry: dict[str, Any] = {
            "name": one.name,
            "level": one.contract.level,
            "reason": "",
            "matches": [],
            "rejected": [],
        }
        found.append(entry)
        try:
            found_plan = planned(one, program, find_target(do.target))
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
