"""Kills commands at random moments and looks at what is left: python -m tests.kills N [SEED].

Half of the moments are drawn from the whole run, half follow a change of the folder that the result goes to. A command
runs in a fork of this process, which has imported everything, so that a moment is one of its work.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from aropt.cli import main as cli
from aropt.errors import AroptError
from aropt.pipeline import store
from aropt.pipeline.manifest import foreign, proven
from aropt.pipeline.registry import known
from aropt.targets.scratch import Scratch
from tests.support.commands import MODEL

SIGNALS = {signal.SIGKILL: "KILL", signal.SIGINT: "INT", signal.SIGTERM: "TERM"}
MARKER = "AROPT_KILLS"  # an environment variable, by which children are found
EAGER = ["--runs", "0", "--target", "eager"]
COMMANDS = {
    "optimize": ["optimize", "{model}", "-o", "{out}", *EAGER],
    "optimize --force": ["optimize", "{model}", "-o", "{out}", "--force", *EAGER],
    "optimize, timed": ["optimize", "{model}", "-o", "{out}", "--force", "--runs", "1", "--target", "eager"],
    "optimize to ONNX": ["optimize", "{model}", "-o", "{out}", "--force", "--runs", "0"],
    "export": ["export", "{artifact}", "-o", "{out}"],
    "export --force": ["export", "{artifact}", "-o", "{out}", "--whole-loop", "--force"],
}
IMPORTED = [
    *(
        "aropt.cli.optimize",
        "aropt.cli.run",
        "aropt.pipeline.report",
        "aropt.targets.eager",
        "aropt.targets.onnxruntime",
    ),
    *("aropt.exporters.onnx", "aropt.exporters.whole_loop", "aropt.targets.ort.run_loop", "onnxruntime", "onnxscript"),
    *known().values(),
]
PATIENCE = 300.0  # seconds that a command may take


@dataclass
class Place:
    """A folder for one command: OUT, things of others beside it, and temporary folders."""

    home: Path
    theirs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("out.failed", ".out.1.partial", ".out.1.old", "tmp/aropt-mine"):
            (self.home / name).mkdir(parents=True)
            (self.home / name / "thesis.txt").write_text("years of work")
        self.theirs = self.files()

    def files(self) -> dict[str, str]:
        """All files but those of OUT."""
        found = sorted(f for f in self.home.rglob("*") if f.is_file() and self.home / "out" not in f.parents)
        return {str(f): f.read_text(errors="replace") for f in found}

    def left(self) -> list[str]:
        """What is there besides OUT and the things of others."""
        known = {parent for name in self.theirs for parent in Path(name).parents}
        kept = [self.home / "tmp", self.home / "out", *known, *map(Path, self.theirs)]
        return [str(p) for folder in (self.home, self.home / "tmp") for p in folder.iterdir() if p not in kept]


def forked(arguments: list[str], place: Place) -> int:
    """The process id of a child that runs the command line, with its output in a file."""
    child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
        log = os.open(place.home.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {MARKER: str(place.home), "TMPDIR": str(place.home / "tmp"), "CI": "1"}
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.home.parent / "inductor")  # torch's own, and meant to stay
        tempfile.tempdir = None
        sys.argv = ["aropt", *arguments]
        cli.main()
    except SystemExit as done:
        os._exit(int(done.code or 0))
    finally:
        os._exit(70)


def ended(child: int) -> int:
    """Its exit status, negative for a signal."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        number, status = os.waitpid(child, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 71


def children(place: Place) -> list[str]:
    """Processes that the command started and that live, five seconds later at most."""

    def alive() -> list[str]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"{MARKER}={place.home}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(folder.name)
        return found

    for _ in range(50):
        if not alive():
            return []
        time.sleep(0.1)
    return alive()


def moment(place: Place, seconds: float, draw: random.Random) -> Callable[[], bool]:
    """What is waited for: a time, or a change in the folder and a little more."""
    end = time.monotonic() + draw.uniform(0, seconds)
    if draw.random() < 0.5:
        return lambda: time.monotonic() > end
    stage = draw.choice(["partial", "program.json", "weights.safetensors", "loop.json", "manifest.json"])
    later: list[float] = []

    def changed() -> bool:
        pattern = ".out.*.partial" if stage == "partial" else f".out.*.partial/{stage}"
        if not later and [f for f in place.home.glob(pattern) if ".out.1." not in str(f)]:
            later.append(time.monotonic() + draw.choice([0, draw.uniform(0, 0.02), draw.uniform(0, 0.5)]))
        return bool(later) and time.monotonic() > later[0]

    return changed


def whole(out: Path) -> str:
    """What is wrong with the folder; nothing where it is not there or all of it is."""
    if not os.path.lexists(out):
        return ""
    missing = [name for name in proven(out) or ["manifest.json"] if not (out / name).is_file()]
    return f"half: {missing} are missing" if missing else foreign(out)


def faults(place: Place, number: int, code: int, before: bool) -> Iterator[str]:
    """What a killed command did wrong."""
    out = place.home / "out"
    if before and not out.exists():
        yield "lost: OUT"
    if why := whole(out):
        yield why
    if code not in {signal.SIGKILL: (-9, 0), signal.SIGINT: (130, 0), signal.SIGTERM: (143, 0)}[signal.Signals(number)]:
        yield f"exit status {code}"
    if running := children(place):
        yield f"children live: {running}"
    if number != signal.SIGKILL and place.left():
        yield f"left behind: {place.left()}"
    next_run(place)
    if place.left():
        yield f"not swept: {place.left()}"
    if place.files() != place.theirs:
        yield "lost: what is others'"
    if before and not out.exists():
        yield "lost: OUT, by the next run"


def next_run(place: Place) -> None:
    """What any run begins and ends with, in a process of its own."""
    child = os.fork()
    if not child:
        try:
            os.environ["TMPDIR"] = str(place.home / "tmp")
            tempfile.tempdir = None
            Scratch().cleanup()
            with contextlib.suppress(AroptError), store.staged_export(place.home / "out", False):
                raise AroptError("nothing to write")
            os._exit(0)
        finally:
            os._exit(1)
    os.waitpid(child, 0)


def main(count: int, seed: int) -> int:
    """Prints each fault, and a line of all; returns 1 if there was any."""
    draw, found, seen = random.Random(seed), Counter[str](), Counter[str]()
    for module in IMPORTED:
        import_module(module)
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        root = Path(folder)
        (root / "model.py").write_text(MODEL)
        given = {"model": f"{root}/model.py:good", "artifact": str(root / "artifact" / "out")}
        seconds: dict[str, float] = {}
        for name in ("optimize", *COMMANDS):
            place = Place(root / ("artifact" if not seconds else f"whole-{name}").replace(" ", "-"))
            start = time.monotonic()
            arguments = [a.format(**given, out=place.home / "out") for a in COMMANDS[name]]
            if code := ended(forked(arguments, place)):
                print(f"{name} ends with {code} unkilled:\n{place.home.with_suffix('.log').read_text()}")
                return 1
            seconds[name] = time.monotonic() - start
        for number in range(count):
            name, kill = draw.choice(list(COMMANDS)), draw.choice(list(SIGNALS))
            place = Place(root / str(number))
            before = "--force" in COMMANDS[name]
            if before:
                source = root / "artifact" if draw.random() < 0.5 else root / "whole-export"
                os.system(f"cp -r {source}/out {place.home}/out")
            ready = moment(place, seconds[name], draw)
            child = forked([a.format(**given, out=place.home / "out") for a in COMMANDS[name]], place)
            start = time.monotonic()
            while not ready() and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                time.sleep(0.001 if time.monotonic() - start < PATIENCE else 1)
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, kill)
            code = ended(child)
            seen[f"{SIGNALS[kill]} {'hit' if code else 'too late'}"] += 1
            for fault in faults(place, kill, code, before):
                found[fault.split(":")[0]] += 1
                print(f"{number}: {name}, {SIGNALS[kill]}: {fault}", flush=True)
    told = ", ".join(f"{k} {v}" for k, v in sorted(seen.items()))
    print(f"{count} kills ({told}): " + (", ".join(f"{k} {v}" for k, v in found.items()) or "no fault"))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(2**32)))
