"""The pass manager: plans, runs, verifies, validates, reverts, and says what happened (design section 6)."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from aropt.errors import AroptError, UsageError
from aropt.ir.control import If, calls
from aropt.ir.program import Entry, Program
from aropt.rewriting.contract import Pass, Result, Skips, broken
from aropt.validate.compare import Verdict, cases, validate, with_probe
from aropt.validate.oracle import Oracle, Oracles
from aropt.validate.slices import after_pass

PASSES = {
    "token-shuffle": "token_shuffle",
    "canonicalize": "canonicalize",
    "int8-linears": "int8_linears",
    "cfg-eliminate": "cfg_eliminate",
    "cfg-interval": "cfg_interval",
    "cfg-batch": "cfg_batch",
    "kv-cache": "kv_cache",
    "prefix-cache": "prefix_cache",
    "dual-cache": "dual_cache",
    "free-cache": "free_cache",
    "dkv-cache": "dkv_cache",
    "vicinity": "vicinity",
    "block-cache": "block_cache",
    "guide-cache": "guide_cache",
    "token-shuffle-fusion": "token_shuffle_fusion",
    "merge-linears": "merge_linears",
    "fuse-attention": "fuse_attention",
    "ngram-draft": "ngram_draft",
    "int8-draft": "int8_draft",
    "fuse-canvas": "fuse_canvas",
    "fuse-rules": "fuse_rules",
    "fuse-sampler": "fuse_sampler",
    "prune": "prune",
}  # name -> module, in pipeline order
# Only where --pass names them: lossy or retrained ones, and those that give something up for what the caller knows of.
ASKED = (
    "token-shuffle", "int8-linears", "cfg-eliminate", "cfg-interval",
    "prefix-cache", "dual-cache", "free-cache", "dkv-cache", "vicinity", "ngram-draft",
    "int8-draft", "fuse-rules",
)  # fmt: skip
# Of these, applied too where that is found to be faster (aropt.pipeline.autotune), in one of these ways.
TRIED: dict[str, list[dict[str, str]]] = {"int8-draft": [{"drafts": "8"}, {"drafts": "16"}], "ngram-draft": [{}]}
REFRESHES = (16, 8, 4, 2)  # what is tried while the budget is missed; 1 would save nothing
PIPELINE = tuple(name for name in PASSES if name not in ASKED)


@dataclass(frozen=True)
class Instruments:
    """What to show on the way. `say` takes progress lines, `show` takes text dumps."""

    say: Callable[[str], None] = lambda _: None
    show: Callable[[str], None] = lambda _: None
    print_after: frozenset[str] = frozenset()  # pass names, or "all"
    print_diff: bool = False
    dump_dir: Path | None = None
    check: bool = True  # validate after each pass
    budget: Mapping[str, float] = field(default_factory=dict)  # what lossy passes may spend: {metric: bound}
    trust: bool = False  # lossy passes are applied as they are, and nothing is measured: to see how fast that is
    keep_going: bool = False  # a pass that fails is left out, and said so; else that is an internal error


def pass_class(name: str) -> Any:
    """The pass of that name. Raises UsageError for an unknown one, and for a file that holds no pass."""
    if name not in PASSES:
        raise UsageError(what=f"unknown pass '{name}'", hint="aropt passes lists them: " + ", ".join(PASSES))
    try:
        found = import_module(f"aropt.passes.{PASSES[name]}").PASS
        lacking = [part for part in ("name", "contract", "plan", "run") if not hasattr(found, part)]
        if lacking or not dataclasses.is_dataclass(found):
            raise TypeError(f"PASS is no dataclass with {', '.join(lacking) or 'its options as fields'}")
    except Exception as error:  # whatever its author wrote
        raise broken(name, f"passes/{PASSES[name]}.py", error) from error
    return found


def make(name: str, options: dict[str, str] | None = None) -> Pass:
    """A pass with its options, given as text. Raises UsageError for an unknown option or a bad value."""
    cls = pass_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in fields:
            raise UsageError(
                what=f"the pass '{name}' has no option '{key}'", hint="its options: " + (", ".join(fields) or "none")
            )
        default: Any = fields[key].default
        try:
            values[key] = (
                {"true": True, "false": False}[text.lower()] if isinstance(default, bool) else type(default)(text)
            )
        except (ValueError, KeyError):
            raise UsageError(
                what=f"'{text}' is no value for {name}:{key}", hint=f"give a {type(default).__name__}, as {default}"
            ) from None
    made: Pass = cls(**values)
    return made


def parse(text: str) -> tuple[str, dict[str, str]]:
    """ "name:k=v,k=v" -> (name, options)."""
    name, _, rest = text.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    wrong = [k for k, eq, _ in pairs if not eq]
    if wrong:
        raise UsageError(
            what=f"'{wrong[0]}' is not an option", where=f"--pass {text}", hint="write NAME:option=value,option=value"
        )
    return name, {k: v for k, _, v in pairs}


def pipeline(chosen: Iterable[str] = (), dropped: Iterable[str] = ()) -> list[Pass]:
    """The default passes and those of `chosen` ("name:k=v"), without `dropped`, in the order of PASSES."""
    options = dict(parse(text) for text in chosen)
    dropped = set(dropped)
    for name in (*options, *dropped):
        pass_class(name)
    return [
        make(name, options.get(name))
        for name in PASSES
        if name not in dropped and (name in PIPELINE or name in options)
    ]


def untold(chosen: Iterable[str] = (), dropped: Iterable[str] = ()) -> list[list[Pass]]:
    """The passes of TRIED that the caller neither wants nor declines, each in its ways."""
    told = {parse(text)[0] for text in chosen} | set(dropped)
    return [[make(name, options) for options in ways] for name, ways in TRIED.items() if name not in told]


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    target: str,
    instruments: Instruments = Instruments(),
    oracles: Oracles | None = None,
) -> tuple[Program, list[Result]]:
    """Runs the passes in order; each one that changes the program is verified and validated.

    Raises AroptError where one that was planned fails, unless `instruments.keep_going`: then it is reverted. A lossy
    one that costs more than its budget is reverted too.
    """
    reference, results, oracles = program, [], oracles or Oracles()
    for number, one in enumerate(passes):
        instruments.say(one.name)
        start = time.perf_counter()
        result = Result(one.name, "skipped", one.contract.level, options=dataclasses.asdict(one))  # type: ignore[call-overload]
        result.nodes = (nodes(program), nodes(program))
        result.bytes = (step_bytes(program), step_bytes(program))
        results.append(result)
        plan = one.plan(program, target)
        result.rejected = plan.rejected
        if isinstance(plan, Skips):
            result.reason = plan.reason
            result.seconds = time.perf_counter() - start
            continue
        result.matches, result.level = plan.matches, plan.level or one.contract.level
        if result.level == "lossy":
            program = spend(one, program, result, instruments, oracles)
            result.seconds = time.perf_counter() - start
            continue
        make = plan.make or functools.partial(one.run, program)
        changed, problem = attempt(one, make, program, reference, result, instruments, oracles)
        dump(program, changed, number, one.name, instruments)
        if problem and not instruments.keep_going:
            for later in passes[number + 1 :]:
                later.plan(program, target)  # its refusal says more: what can't be cached can't be checked at once
            raise failure(one, program, problem)
        if problem:
            result.status, result.reason = "reverted", problem
            continue
        result.status = "applied"
        program = changed.replace(
            ledger=(*program.ledger, Entry(one.name, result.level, result.options, dict(result.verify)))
        )
    return program, results


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
    if result.level == "retrained":  # what follows is held to the new model
        changed = changed.replace(reference=changed)
    return changed, check(oracles.of(changed.reference or reference), program, changed, result, instruments)


def failure(one: Pass, program: Program, problem: str) -> AroptError:
    """What to tell of a pass that was planned and then failed."""
    return AroptError(
        what=f"internal error: the pass {one.name} fails on this model, though nothing speaks against it",
        where=f"{one.name}, on {program.meta['name']}",
        why=problem,
        hint=f"report it; --keep-going writes the rest without it, --no-pass {one.name} leaves it out",
    )


def check(oracle: Oracle, before: Program, changed: Program, result: Result, instruments: Instruments) -> str:
    """What is wrong with the program that a pass changed, or nothing."""
    from aropt.ir.verify import verify

    try:
        verify(changed)
    except AroptError as error:
        return str(error)
    if not instruments.check:
        return ""
    instruments.say(f"{result.name}: check")
    chosen = after_pass(oracle.requests, before, changed, len(before.ledger))
    verdict = validate(oracle, with_probe(changed), chosen=chosen)
    result.verify = verdict.metrics()
    return "" if verdict.passed else describe(verdict)


def spend(one: Pass, program: Program, result: Result, instruments: Instruments, oracles: Oracles) -> Program:
    """The program after a lossy pass that keeps to the budget; else as it was.

    A pass that refreshes does so as often as that takes. With everything recomputed in each round it must equal the
    program: then what it loses is stale rows alone.
    """
    from aropt.validate import quality
    from aropt.validate.drift import measure

    refreshes = "refresh" in result.options
    if not instruments.budget:
        raise unpaid(one)
    if instruments.trust:
        result.status, changed = "applied", one.run(program)
        return changed.replace(reference=changed)
    canvas = program.meta.get("loop") == "unmask"
    if "quality" in instruments.budget and not canvas:
        raise UsageError(
            what="quality is measured on canvases", where="--budget", hint="bound kl, kl_max, top1 or agreement"
        )
    wanted = canvas and (program.meta.get("examples") or "quality" in instruments.budget)
    known = quality.measure(program) if wanted else None
    result.status, result.verify = "reverted", {}
    given: int = result.options["refresh"] if refreshes else -1  # type: ignore[assignment]
    tries = [given, *(r for r in REFRESHES if not given or r < given)]
    if refreshes:
        result.reason = check(oracles.of(program), program, at_refresh(one, 1).run(program), result, instruments)
    for refresh in [] if result.reason else tries:
        changed = (at_refresh(one, refresh) if refreshes else one).run(program)
        instruments.say(f"{one.name}: drift" + (f" with refresh={refresh}" if refreshes else ""))
        result.nodes, result.bytes = (nodes(program), nodes(changed)), (step_bytes(program), step_bytes(changed))
        result.reason = check(
            oracles.of(changed), program, changed, result, instruments
        )  # batches against sequences alone
        if result.reason:
            break
        drift = measure(program, with_probe(changed), known=known)
        result.verify |= drift.metrics()
        result.drift = asdict(drift)
        result.reason = drift.misses(instruments.budget)
        if refreshes:
            result.options["refresh"] = refresh
        if not result.reason:
            result.status = "applied"
            result.reason = "" if refresh == given else f"refresh={refresh}: with fewer the budget was missed"
            entry = Entry(one.name, "lossy", result.options, dict(result.verify))
            return changed.replace(ledger=(*program.ledger, entry), reference=changed)
    return program


def unpaid(one: Pass) -> UsageError:
    """What to tell of a lossy pass without a budget."""
    does = (import_module(type(one).__module__).__doc__ or "").partition(": ")[2].partition("\n")[0]
    return UsageError(
        what=f"{one.name} is lossy on this model, and nothing says how much may be lost",
        where=f"--pass {one.name}",
        why="its rows see the whole canvas, and stored ones are not refreshed each round"
        if hasattr(one, "refresh")
        else does,
        hint="give a budget: --budget kl=0.05,top1=0.95",
    )


def at_refresh(one: Pass, refresh: int) -> Pass:
    """The pass with everything recomputed every so many rounds."""
    made: Any = one
    changed: Pass = dataclasses.replace(made, refresh=refresh)
    return changed


def describe(verdict: Verdict) -> str:
    """The first failing case in words, with the op that diverges first."""
    failed = next(o for o in verdict.outcomes if not o.passed)
    text = f"case '{failed.case.name}': {failed.problem}"
    found = verdict.diverges
    if found and found["node"]:
        place = f"{found['module'] or 'top level'}, {found['op']} ({found['node']})"
        text += f"\nfirst to differ: {place}, by {found['error']:.3g}"
    elif found:
        text += f"\nfirst to differ: {found['where']}"
    return text + f"\nrepro: {failed.case.repro('program')}"


def dump(before: Program, after: Program, number: int, name: str, instruments: Instruments) -> None:
    """Prints or writes the program after a pass."""
    if not (instruments.print_after or instruments.print_diff or instruments.dump_dir):
        return
    from aropt.ir.printer import diff, text

    if {"all", name} & instruments.print_after:
        instruments.show(f"// after {name}\n{text(after)}")
    if instruments.print_diff:
        instruments.show(f"// diff of {name}\n{diff(before, after)}")
    if instruments.dump_dir is not None:
        instruments.dump_dir.mkdir(parents=True, exist_ok=True)
        stem = instruments.dump_dir / f"{number + 1:02d}-{name}"
        stem.with_suffix(".after.txt").write_text(text(after))
        stem.with_suffix(".diff").write_text(diff(before, after))


def bisect(program: Program, passes: Sequence[Pass], target: str, say: Callable[[str], None]) -> str | None:
    """The first pass after which the program lowered to `target` fails; None if it never does."""
    from aropt.targets import lower

    def fails(count: int) -> bool:
        say(f"bisect: the first {count} passes")
        trusting = Instruments(check=False, trust=True, budget={"kl": float("inf")}, keep_going=True)
        changed, results = run_passes(program, passes[:count], target, trusting)
        if any(r.status == "reverted" for r in results):
            return True
        probed, reference = with_probe(changed), changed.reference or program
        chosen = cases(reference, quick=True)
        return not validate(reference, probed, lower(probed, target), chosen, explain=False).passed

    if not fails(len(passes)):
        return None
    good, bad = 0, len(passes)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (good, middle) if fails(middle) else (middle, bad)
    return passes[bad - 1].name


def nodes(program: Program) -> int:
    """Ops in the graphs that run each round."""
    from aropt.ir.control import loops

    hot = {c.graph for loop in loops(program.control) for c in calls(loop.body)}
    return sum(sum(n.op == "call_function" for n in program.graphs[g].fx.nodes) for g in hot)


def step_bytes(program: Program) -> int:
    """Bytes that a decoding round of one sequence touches at half capacity: weights, state read, and recomputed rows.

    A full forward touches its activations of all tokens; they are counted as one read and one write of each value.
    """
    from aropt.ir.control import loops

    half = max(1, int(program.meta["capacity"]) // 2)
    sizes = {"B": 1, "R": 1, "Q": 1, "T": half, "S": half, "P": 1, "K": 1}
    body = loops(program.control)[0].body
    while isinstance(body, If):  # a guided round, where others run less
        body = body.then
    called = list(calls(body))
    weights = {w for c in called for w in program.graphs[c.graph].weights() if program.weights[w].dim() > 1}
    total = sum(program.weights[w].nbytes for w in weights)
    read = {v for c in called for v in c.reads.values()}
    total += sum(s.nbytes(sizes) for n, s in program.state.items() if n in read)
    model = [program.graphs[c.graph] for c in called if "ids" in c.reads and "slots" not in c.reads]
    for graph in model:
        for node in graph.fx.nodes:
            value = node.meta.get("val")
            if node.op == "call_function" and hasattr(value, "shape"):
                total += 2 * value.element_size() * product(value.shape, half)
    return total


def product(shape: Sequence[Any], tokens: int) -> int:
    """Elements of a fake shape, its symbols read as one sequence of `tokens`."""
    count = 1
    batch_seen = False
    for size in shape:
        if isinstance(size, int):
            count *= size
        elif not batch_seen and len(shape) > 1:
            batch_seen = True
        else:
            count *= tokens
    return count
