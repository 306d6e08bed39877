"""Reads an artifact in a forked process with limits of time and memory, and says what came of it."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import aropt
from aropt.errors import AroptError
from aropt.loops.request import fitted
from tests.support.run import generate

ALLOWED = ("refused", "same", "changed")
SECONDS = 30.0
MEMORY = 2**30  # bytes beside what the process has
RUNS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
    "os.remove",
)


@dataclass(frozen=True)
class Outcome:
    """One of ALLOWED, or INTERNAL, CRASH, HANG, MEMORY, WROTE, CODE; and the error or the tokens."""

    kind: str
    text: str


def generated(out: Path) -> list[Any]:
    """What the artifact generates, greedily and drawn."""
    from aropt.cli.run import tokenizer

    made = aropt.load(out)
    tokenizer(out)
    prompts = [fitted(made.program, p) for p in made.program.meta["prompts"]][:2]
    return [generate(made, prompts, 4, seed=3, **given) for given in ({}, {"temperature": 0.9})]


def read(out: Path, expected: list[Any] | None, seconds: float = SECONDS) -> Outcome:
    """Forks, reads, and compares; `expected` is what the artifact generates as it was written."""
    before = snapshot(out)
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        answer(out, send)
    os.close(send)
    ready, _, _ = select.select([receive], [], [], seconds)
    if not ready:
        os.kill(child, signal.SIGKILL)
    with os.fdopen(receive, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if snapshot(out) != before:
        return Outcome("WROTE", "the artifact was changed")
    if not ready:
        return Outcome("HANG", f"more than {seconds:.0f} s")
    if not text:
        return Outcome("CRASH", f"ended with status {status}")
    kind, said = json.loads(text)
    if kind == "tokens":
        return Outcome("same" if said == expected else "changed", json.dumps(said))
    return Outcome(kind, said)


def answer(out: Path, send: int) -> None:
    """What the child does: one line of JSON, then it ends."""
    found = ["CRASH", ""]
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            found = watched(out)
    finally:
        os.write(send, json.dumps(found).encode()[:60_000])
        os._exit(0)


def watched(out: Path) -> list[Any]:
    """[outcome, text] of reading the artifact, with what it may not do watched."""
    torch.set_num_threads(1)
    seen: list[list[Any]] = []

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event in RUNS:
            seen.append(["CODE", f"{event} {args!r}"[:300]])
        if (
            event == "open"
            and isinstance(args[0], str)
            and isinstance(args[2], int)
            and args[2] & (os.O_WRONLY | os.O_RDWR)
        ):
            seen.append(["WROTE", str(args[0])[:300]])

    sys.addaudithook(audit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found: list[Any] = ["tokens", generated(out)]
    except AroptError as error:
        named = bool(error.where or error.why) and error.code != 1
        found = ["refused" if named else "INTERNAL", str(error)]
    except MemoryError as error:
        found = ["MEMORY", str(error)]
    except BaseException as error:  # whatever a reader must not raise
        found = ["INTERNAL", f"{type(error).__name__}: {error}"[:500]]
    used = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) * 1024
    if used > MEMORY or "can't allocate memory" in str(found[1]) or "bad_alloc" in str(found[1]):
        return ["MEMORY", f"{used >> 20} MiB; {found[1]}"[:500]]
    return seen[0] if seen else found


def snapshot(folder: Path) -> dict[str, Any]:
    """All that lies in a folder and beside it, with sizes and times."""
    return {
        str(p): (os.lstat(p).st_mode, os.lstat(p).st_size, os.lstat(p).st_mtime_ns) for p in folder.parent.rglob("*")
    }
