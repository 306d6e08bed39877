"""Timing programs side by side: each variant in a process of its own, taking turns, medians with spread.

A worker (`python -m aropt.bench.timing SPEC`, or peers.py for other engines) loads one variant, then generates once for
each line it reads, and answers with the milliseconds and the tokens. The parent alternates between the workers, so that
drifts of the machine hit all alike. A turn is a few generations in a row, as a caller makes them; the one before them,
which finds caches and clock rates as another program left them, is not counted.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aropt.bench import peers
from aropt.bench.variants import NEED_MODEL, REFERENCE, Origin, Spec, variant
from aropt.errors import UsageError
from aropt.targets.ort.threads import own_process
from aropt.targets.scratch import PLACE, Scratch

AGAINST = {
    "eager": "the model as given: a full forward for each token",
    "cached": "the derived cache, run eagerly by torch",
    "inductor": "the derived cache, compiled by torch.compile",
    "inductor-max": "the same with max-autotune, weights frozen (compiles for much longer)",
    "stepping": "the same artifact, a call a round",
    "one-call": "the same artifact, the whole loop in one call of ONNX Runtime",
    "ngram-draft": "the same model with the pass ngram-draft, greedy and one sequence",
    "no-draft": "the same model without it",
    "plain": "the same model without drafts of any kind",
    "hf": "transformers' generate with its own cache",
    "hf-static": "transformers' generate with its static cache and its built-in torch.compile",
    "hf-lookup": "transformers' generate with prompt lookup, as many drafts as the pass ngram-draft",
    "ort-genai": "onnxruntime-genai, from its own model builder, float32",
    "openvino": "OpenVINO GenAI, from optimum-intel's export, float32",
    "llamacpp": "llama.cpp's C API, float32",
    "llamacpp-q8": "the same with weights of eight bits (Q8_0)",
}
DEFAULT_AGAINST = ("eager", "cached", "hf")
SETTINGS = {"inductor-max": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_FREEZING": "1"}}  # environment


PAUSE = 0.3  # seconds before each turn: the threads of the one before spin for a while, and would take this one's cores
PATIENCE = 60.0  # seconds
IN_A_ROW = 3  # runs of a turn
LONG = 2000.0  # milliseconds of a run, beside which it does not matter what ran before


@dataclass
class Timing:
    """Milliseconds of each run, and to its first new token; the tokens of the last run.

    `error` says why there are no runs; `missing`, which packages; `version` is that of another engine.
    """

    variant: str
    runs: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    error: str = ""
    missing: str = ""
    version: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.runs)
        return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))]

    def failure(self) -> str:
        """A sentence: why there are no runs."""
        if self.missing:
            other = f"or set {variable(self.variant)} to a Python that has it"
            return f"{self.variant} is not installed: pip install {self.missing} ({other})"
        return f"{self.variant} could not be timed: {self.error}"


def variable(variant: str) -> str:
    """The environment variable that names the Python of another engine."""
    return "AROPT_PYTHON_" + variant.upper().replace("-", "_")


def check(against: Sequence[str], origin: Origin | None = None) -> None:
    """Raises UsageError for a variant that there is not, or that needs a model where `origin` has none."""
    for unknown in [v for v in against if v not in AGAINST]:
        raise UsageError(
            what=f"unknown variant '{unknown}'", where="--against", hint="choose from " + ", ".join(AGAINST)
        )
    lacking = [v for v in against if origin is not None and not origin.model and v in NEED_MODEL]
    if lacking:
        raise UsageError(
            what=f"{', '.join(lacking)} need the model that the artifact was made from",
            where="--against",
            why="what an artifact says of its source is not followed: loading a model may run code",
            hint="name it: --model MODEL, or choose from " + ", ".join(v for v in AGAINST if v not in NEED_MODEL),
        )


def measure(
    artifact: Path,
    variants: Sequence[str],
    prompt: list[int],
    n: int,
    threads: int,
    runs: int = 5,
    say: Callable[[str], None] = lambda _: None,
    rounds: int = 1,
    patience: float | None = None,
    between: Callable[[], None] = lambda: None,
    origin: Origin = REFERENCE,
) -> dict[str, Timing]:
    """Times `runs` runs of each variant of an artifact, in turns of three, after warm-ups. Keys are variants.

    `origin` is the model for those variants that need it.
    `between` is called before each turn of the first variant, for what else is to be measured at the same time.

    With more `rounds` the runs are shared out to that many processes of each variant, one after the other: the same
    program may well run at another speed in another process. A variant that has run for `patience` seconds of such a
    round (PATIENCE if not given), and was timed once, is timed no more.
    """
    timings = {v: Timing(v) for v in variants}
    for number in range(rounds):
        specs = [Spec(v, str(artifact), prompt, n, threads, origin=origin) for v in variants if not timings[v].error]
        take_turns(
            [Worker(s, timings[s.variant]) for s in specs],
            len(range(number, runs, rounds)),
            say,
            PATIENCE if patience is None else patience,
            between,
        )
    return timings


def take_turns(
    workers: Sequence[Worker],
    runs: int,
    say: Callable[[str], None],
    patience: float,
    between: Callable[[], None] = lambda: None,
) -> None:
    """So many runs of each worker, fewer of one that has run for `patience` seconds; then ends the workers."""
    try:
        for worker in workers:
            say(f"load {worker.timing.variant}")
            worker.ready()
        for worker in workers:  # a second warm-up: lazy sessions and compilers are in place now
            worker.go(keep=False)
        for done in range(0, runs, IN_A_ROW):
            between()
            for worker in workers:
                say(f"runs {done + 1} to {min(done + IN_A_ROW, runs)} of {runs}: {worker.timing.variant}")
                worker.turn(min(IN_A_ROW, runs - done), patience)
    finally:
        for worker in workers:
            worker.stop()


class Worker:
    """One variant in its own process; what it measures goes into `timing`."""

    def __init__(self, spec: Spec, timing: Timing) -> None:
        threads = {"OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.timing = timing
        self.spent = 0.0  # seconds of running
        self.last = 0.0  # milliseconds
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would fill up and block)
        self.process: subprocess.Popen[str] | None = None
        self.scratch = Scratch()  # for what it would remove itself if it weren't killed
        try:
            self.process = subprocess.Popen(
                command(spec),
                env={**os.environ, **threads, PLACE: self.scratch.name, **SETTINGS.get(spec.variant, {})},
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.messages,
            )
        except UsageError as error:
            timing.error = error.what
        except OSError as error:
            timing.error = f"{variable(spec.variant)} names no Python that runs: {error}"

    def answer(self) -> dict[str, Any]:
        """The next line of JSON; an error where the process ended."""
        assert self.process is not None and self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        self.messages.seek(0)
        return {"error": (self.messages.read().strip().splitlines() or ["the worker ended"])[-1][:300]}

    def ready(self) -> None:
        if self.process is None:
            return
        answer = self.answer()
        self.timing.missing = str(answer.get("missing", ""))
        self.timing.version = str(answer.get("version", ""))
        self.timing.error = "not installed" if self.timing.missing else str(answer.get("error", ""))

    def turn(self, runs: int, patience: float) -> None:
        """Runs in a row, after one that is not counted."""
        if self.timing.error or (self.timing.runs and self.spent > patience):
            return
        time.sleep(PAUSE)
        if self.last < LONG:
            self.go(keep=False)
        for _ in range(runs):
            if self.spent < patience or not self.timing.runs:
                self.go()

    def go(self, keep: bool = True) -> None:
        if self.timing.error:
            return
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.timing.error = self.timing.error or "the worker ended"
            return
        answer = self.answer()
        self.last = answer.get("ms", 0.0)
        self.spent += self.last / 1e3
        if "error" in answer:
            self.timing.error = answer["error"]
        elif keep:
            self.timing.runs.append(answer["ms"])
            self.timing.first.append(answer["first"])
            self.timing.tokens = answer["tokens"]

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
        self.messages.close()
        self.scratch.cleanup()


def command(spec: Spec) -> list[str]:
    """The worker's command line. Raises UsageError where another engine can't take the model."""
    if spec.variant not in peers.PEERS:
        return [sys.executable, "-m", "aropt.bench.timing", json.dumps(asdict(spec))]
    model = peers.directory(spec.origin.model)
    if model is None:
        raise UsageError(what=f"it takes Hugging Face directories, and --model is {spec.origin.model or 'not given'}")
    job = peers.Job(spec.variant, str(model.resolve()), spec.prompt, spec.n, spec.threads)
    python = os.environ.get(variable(spec.variant)) or sys.executable
    return [python, str(Path(peers.__file__).resolve()), json.dumps(asdict(job))]


def main(text: str) -> None:
    """The worker's loop."""
    peers.die_with_parent()
    given = json.loads(text)
    spec = Spec(**{**given, "origin": Origin(**given["origin"])})
    import torch

    torch.set_num_threads(spec.threads)
    try:
        peers.serve(variant(spec), sys.stdout, spec.variant)
    except Exception as error:  # ONNX Runtime has its own kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        print(json.dumps({"error": why}), flush=True)


def bandwidth(size: int, threads: int) -> float:
    """GB/s at which torch reads a working set of `size` bytes: median of 7 sums."""
    import torch

    torch.set_num_threads(threads)
    values = torch.ones(max(size // 4, 2**18))
    rates = []
    for _ in range(9):
        start = time.perf_counter()
        repeats = max(1, 2**26 // values.nbytes)
        for _ in range(repeats):
            values.sum()
        rates.append(repeats * values.nbytes / (time.perf_counter() - start) / 1e9)
    return statistics.median(rates[2:])


if __name__ == "__main__":
    own_process()
    main(sys.argv[1])
