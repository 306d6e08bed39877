"""What is shown of a pass on the way, and what is wrong with the program that it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aropt.errors import AroptError
from aropt.ir.program import Program
from aropt.rewriting.contract import Pass, Result, unkept
from aropt.validate.compare import Verdict, validate, with_probe
from aropt.validate.oracle import Oracle
from aropt.validate.slices import after_pass


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


QUIET = Instruments()


def check(
    one: Pass, oracle: Oracle, before: Program, changed: Program, result: Result, instruments: Instruments
) -> str:
    """What is wrong with the program that a pass changed, or nothing."""
    from aropt.ir.verify import verify

    try:
        verify(changed)
    except AroptError as error:
        return str(error)
    lacking = unkept(one, changed)
    if lacking or not instruments.check:
        return lacking
    instruments.say(f"{result.name}: check")
    chosen = after_pass(oracle.requests, before, changed, len(before.ledger))
    verdict = validate(oracle, with_probe(changed), chosen=chosen)
    result.verify = verdict.metrics()
    return "" if verdict.passed else describe(verdict)


def describe(verdict: Verdict) -> str:
    """The first failing case in words, with the op that diverges first."""
    failed = next((o for o in verdict.outcomes if not o.passed), None)
    if failed is None:
        return "nothing was compared"
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
