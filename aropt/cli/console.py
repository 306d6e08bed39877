"""What the command line says and how it ends: progress and errors on stderr, tables on stdout, exit statuses."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import typer

from aropt.errors import AroptError, UsageError
from aropt.pipeline import interrupts

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COMMAND_ERRORS: Any = typer.BadParameter.__mro__[2]  # typer brings its own copy of click; this is its ClickException


class Progress:
    """One line on stderr that says what is going on; plain lines where stderr is no terminal.

    An interrupt that lands in a callback of torch is lost there: it is raised again with the next line.
    """

    def __init__(self) -> None:
        self.live: Any = None
        self.start = time.perf_counter()
        self.last = ""

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty() and not os.environ.get("CI"):
            from rich.console import Console

            self.live = Console(stderr=True).status("")
            self.live.start()
        return self

    def __call__(self, text: str) -> None:
        if interrupts.caught():
            raise KeyboardInterrupt
        elapsed = time.perf_counter() - self.start
        if self.live is not None:
            self.live.update(f"{text} [{elapsed:.0f} s]")
        elif text.split(":")[0] != self.last.split(":")[0]:
            note(f"{elapsed:6.1f} s  {text.split(':')[0]}")
        self.last = text

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.stop()


def note(text: str) -> None:
    """A line on stderr, which is for people: a command goes on where nobody reads it."""
    try:
        print(text, file=sys.stderr or io.StringIO(), flush=True)
    except OSError:
        silence(2)


def show_plan(plans: list[dict[str, Any]], as_json: bool, explain: bool) -> None:
    if as_json:
        print(json.dumps({"passes": plans}, indent=1))
        return
    for p in plans:
        print(
            f"{p['name']:<14} {p['status']:<8} {p['level']:<9} "
            f"{p['reason'].splitlines()[0] if p['reason'] else '; '.join(p['matches'])}"
        )
        for where, why in p["rejected"] if explain else []:
            print(f"{'':<14} not at {where}: {why}")


def show_report(report: dict[str, Any], out: Path, explain: bool, seconds: float) -> None:
    """The result table and where the report lies."""
    from aropt.pipeline.report import table

    if report.get("uncached"):
        print(report["uncached"] + "\n")
    for p in report["passes"]:
        n = p["nodes"]
        print(
            f"{p['name']:<14} {p['status']:<9} {p['level']:<9} {p['seconds']:6.1f} s   "
            f"nodes {n['before']} -> {n['after']}" + (f"   {p['reason'].splitlines()[0]}" if p["reason"] else "")
        )
        for match in p["matches"] if explain else []:
            print(f"{'':<14} at {match}")
        for where, why in p["rejected"] if explain else []:
            print(f"{'':<14} not at {where}: {why}")
    m = report["verify"]["metrics"]
    if report["verify"]["cases"]:
        print(
            f"verified       {int(m['cases'])} cases, {int(m['tokens'])} tokens, {int(m['ties'])} ties, "
            f"largest error {m['max_ratio']:.2f} of the noise floor (allowed: {m['tolerance_ratio']:.0f})"
        )
    if "shift" in m:
        print(
            f"draws          {int(m['drawn'])} ids of the same distribution: shifted by {m['shift']:.3f}, "
            f"as chance may do with probability {m['shift_chance']:.2g}; drawn again from drafts, chances and noise, "
            f"{int(m['others'])} of {int(m['redrawn'])} rounds differ"
        )
    if report.get("drift"):
        show_drift(report["drift"])
    print()
    print(table(report))
    for text in report["notes"]:
        if text != report.get("uncached"):
            print(f"note: {text}")
    print(f"\n{out}/report.html   ({seconds:.0f} s in all)")


def show_drift(d: dict[str, Any]) -> None:
    """What lossy passes lose, against what they may."""
    allowed = ", ".join(f"{k} {v:g}" for k, v in d["budget"].items())
    print(
        f"drift          KL {d['kl']:.2g} (largest {d['kl_max']:.2g}), top-1 {d['top1']:.1%}, answers agree in "
        f"{d['agreement']:.1%}, over {d['measured']} rows (budget: {allowed})"
    )
    if d["rows"] != d["exact_rows"]:
        print(
            f"{'':<14} {d['forwards']} forwards with {d['rows']} rows, "
            f"exact: {d['exact_forwards']} with {d['exact_rows']}"
        )
    if d.get("drawn"):
        print(f"draws          {d['drawn']} ids are shifted by {d['shift']:.3f} from the exact distribution")
    if d.get("judged"):
        print(
            f"quality        {d['quality']:.1%} of {d['judged']} ids of the examples are right, "
            f"exact: {d['exact_quality']:.1%}"
        )


def ending(error: BaseException, verbose: int) -> int:
    """Says what ended a command, and returns its exit status; with -vv an error is raised with its traceback."""
    if interrupts.caught() or isinstance(error, (typer.Abort, KeyboardInterrupt)):  # or what torch made of it
        return interrupted()
    if isinstance(error, COMMAND_ERRORS):
        error.show(file=(text := io.StringIO()))
        note(text.getvalue().rstrip())
        return int(error.exit_code)
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # typer exits with 1
        silence(1)
        return 0  # whoever reads has enough
    if isinstance(error, SystemExit):
        raise error
    if verbose >= 2:
        raise error
    if isinstance(error, AroptError):
        note(f"aropt: {error}")
        return error.code
    if isinstance(error, MemoryError):
        note("aropt: out of memory\n  try:   a smaller --capacity")
    elif isinstance(error, OSError) and error.errno in FULL and not error.filename:
        silence(1)
        why = f"  why:   {error.strerror}, for stdout or a temporary file"
        note(f"aropt: can't write\n{why}\n  try:   free some space; TMPDIR names another place for temporary files")
        return UsageError.code
    else:  # a defect of ours: said in one line
        said = f"internal error: {type(error).__name__}: {error}"
        note(f"aropt: {said}\n  try:   run again with -vv and report the traceback")
    return 1


def interrupted() -> int:
    """Says that a signal ended the command; returns the exit status that shells know for it."""
    note("aropt: interrupted; nothing was left behind")
    return 128 + (interrupts.caught() or int(signal.SIGINT))


def silence(stream: int) -> None:
    """From now on what is printed there goes nowhere, and nothing is tried again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def open_streams() -> None:
    """Opens what the caller closed of stdin, stdout and stderr: else a file of the result would get its number,
    and what libraries print there would be in it."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
