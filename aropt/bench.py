"""Timing programs side by side: each variant in a process of its own, taking turns, medians with spread.

A worker (`python -m aropt.bench SPEC`, or peers.py for other engines) loads one variant, then generates once for each
line it reads, and answers with the milliseconds and the tokens. The parent alternates between the workers, so that
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aropt import ort_threads, peers
from aropt.errors import UsageError
from aropt.peers import Generate
from aropt.units import flat, rows, rows_for

AGAINST = {
    "eager": "the model as given: a full forward for each token",
    "cached": "the derived cache, run eagerly by torch",
    "inductor": "the derived cache, compiled by torch.compile",
    "inductor-max": "the same with max-autotune, weights frozen (compiles for much longer)",
    "stepping": "the same artifact, a call a round",
    "one-call": "the same artifact, the whole loop in one call of ONNX Runtime",
    "ngram-draft": "the same model with the pass ngram-draft, greedy and one sequence",
    "no-draft": "the same model without it",
    "hf": "transformers' generate with its own cache",
    "hf-static": "transformers' generate with its static cache and its built-in torch.compile",
    "hf-lookup": "transformers' generate with prompt lookup, as many drafts as the pass ngram-draft",
    "ort-genai": "onnxruntime-genai, from its own model builder, float32",
    "openvino": "OpenVINO GenAI, from optimum-intel's export, float32",
    "llamacpp": "llama.cpp's C API, float32",
    "llamacpp-q8": "the same with weights of eight bits (Q8_0)",
}
DEFAULT_AGAINST = ("eager", "cached", "hf")
TARGETS = {"cached": "eager", "stepping": "onnxruntime", "one-call": "onnxruntime"} | dict.fromkeys(
    ("inductor", "inductor-max"), "inductor"
)
SETTINGS = {"inductor-max": {"TORCHINDUCTOR_MAX_AUTOTUNE": "1", "TORCHINDUCTOR_FREEZING": "1"}}  # environment


PAUSE = 0.3  # seconds before each turn: the threads of the one before spin for a while, and would take this one's cores
PATIENCE = 60.0  # seconds
IN_A_ROW = 3  # runs of a turn
LONG = 2000.0  # milliseconds of a run, beside which it does not matter what ran before


@dataclass(frozen=True)
class Spec:
    """What a worker runs: a variant of an artifact, on a prompt; with a temperature it draws (seed 0)."""

    variant: str
    artifact: str
    prompt: list[int]
    n: int
    threads: int
    temperature: float = 0.0


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


def check(against: Sequence[str]) -> None:
    """Raises UsageError for a variant that there is not."""
    for unknown in [v for v in against if v not in AGAINST]:
        raise UsageError(
            what=f"unknown variant '{unknown}'", where="--against", hint="choose from " + ", ".join(AGAINST)
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
) -> dict[str, Timing]:
    """Times `runs` runs of each variant of an artifact, in turns of three, after warm-ups. Keys are variants.

    `between` is called before each turn of the first variant, for what else is to be measured at the same time.

    With more `rounds` the runs are shared out to that many processes of each variant, one after the other: the same
    program may well run at another speed in another process. A variant that has run for `patience` seconds of such a
    round (PATIENCE if not given), and was timed once, is timed no more.
    """
    timings = {v: Timing(v) for v in variants}
    for number in range(rounds):
        specs = [Spec(v, str(artifact), prompt, n, threads) for v in variants if not timings[v].error]
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
        try:
            self.process = subprocess.Popen(
                command(spec),
                env={**os.environ, **threads, **SETTINGS.get(spec.variant, {})},
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


def command(spec: Spec) -> list[str]:
    """The worker's command line. Raises UsageError where another engine can't take the model."""
    if spec.variant not in peers.PEERS:
        return [sys.executable, "-m", "aropt.bench", json.dumps(asdict(spec))]
    from aropt.artifact import model_folder

    model = model_folder(Path(spec.artifact))
    if model is None:
        raise UsageError(what="it takes Hugging Face directories, and the artifact was not made from one")
    job = peers.Job(spec.variant, str(model.resolve()), spec.prompt, spec.n, spec.threads)
    python = os.environ.get(variable(spec.variant)) or sys.executable
    return [python, str(Path(peers.__file__).resolve()), json.dumps(asdict(job))]


def main(text: str) -> None:
    """The worker's loop."""
    spec = Spec(**json.loads(text))
    import torch

    torch.set_num_threads(spec.threads)
    try:
        peers.serve(variant(spec), sys.stdout, spec.variant)
    except Exception as error:  # ONNX Runtime has its own kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        print(json.dumps({"error": why}), flush=True)


def variant(spec: Spec) -> Generate:
    """How a variant generates."""
    if spec.temperature and spec.variant in ("eager", "hf", "hf-static", "hf-lookup"):
        raise UsageError(what=f"{spec.variant} is timed greedily", hint="leave the temperature out")
    if spec.variant == "eager":
        return eager(spec)
    if spec.variant in ("hf", "hf-static", "hf-lookup"):
        return huggingface(spec)
    if spec.variant in ("ngram-draft", "no-draft"):
        drafts = ["ngram-draft"] if spec.variant == "ngram-draft" else []
        return stepping(again(spec, [*lossy(spec), *drafts]), spec)
    from aropt.artifact import load

    target = TARGETS.get(spec.variant)
    program = load(spec.artifact, target=target, threads=spec.threads)
    applied = {e.name for e in program.ledger}
    if target in ("eager", "inductor") and (
        "int8-draft" in applied or (target == "eager" and "int8-linears" in applied)
    ):
        return stepping(again(spec, [], target), spec)  # there it makes floats of all weights in each round
    if target == "onnxruntime":
        program.executor.whole = whole_loop(program) if spec.variant == "one-call" else None
        program.executor.rounds = {}
    if getattr(program.executor, "whole", None) is not None:
        return one_call(program, spec)
    return several_rounds(program, spec) if getattr(program.executor, "rounds", None) else stepping(program, spec)


def whole_loop(program: Any) -> Any:
    """The program as one model, in a folder that lives as long as its session; checked against stepping."""
    from aropt.exporters import run_loop
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.whole import Whole

    kept = tempfile.TemporaryDirectory(prefix="aropt-")
    path = Path(kept.name) / "model.onnx"
    export_program(program, path, contrib=True, graphs=program.executor.translated)
    run_loop.compare(path, program)
    whole = Whole(path, program.executor.threads)
    whole.kept = kept
    return whole


def stepping(program: Any, spec: Spec) -> Generate:
    """The program's own loop, a call a round."""

    def generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        stamps: list[float] = []

        def stamp(_: object) -> bool:
            stamps.append(time.perf_counter())
            return False  # only the first round is of interest, and watching the others would slow them down

        tokens = program.generate([spec.prompt], spec.n, on_round=stamp, temperature=spec.temperature)
        return tokens[0], (stamps[0] - start) * 1e3

    return generate


class Enough(Exception):
    """Ends a generation that has shown its first token."""


def several_rounds(program: Any, spec: Spec) -> Generate:
    """Several rounds a call, where nothing is streamed: the first token's time is that of a streamed generation."""

    def first() -> float:
        def stop(_: object) -> None:
            raise Enough

        start = time.perf_counter()
        with suppress(Enough):
            program.generate([spec.prompt], spec.n, on_round=stop, temperature=spec.temperature)
        return (time.perf_counter() - start) * 1e3

    def generated() -> list[list[int]]:
        found: list[list[int]] = program.generate([spec.prompt], spec.n, temperature=spec.temperature)
        return found

    def generate() -> tuple[list[int], float, float]:
        shown = [first() for _ in range(3)][-1]
        generated()  # the threads of the sessions above wait busily for a while
        start = time.perf_counter()
        tokens = generated()
        return tokens[0], shown, (time.perf_counter() - start) * 1e3

    return generate


def one_call(program: Any, spec: Spec) -> Generate:
    """The whole loop in one call, which shows no first token: that is the time of a generation of one."""

    def timed(n: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        tokens = program.generate([spec.prompt], n, temperature=spec.temperature)
        return tokens[0], (time.perf_counter() - start) * 1e3

    def generate() -> tuple[list[int], float, float]:
        first = timed(1)[1]
        tokens, ms = timed(spec.n)
        return tokens, first, ms

    return generate


def eager(spec: Spec) -> Generate:
    """The model as its owner runs it without a cache: forward over all tokens, argmax, append; or the plain canvas."""
    import torch

    from aropt.api import capture
    from aropt.artifact import loop_of, source_of
    from aropt.trace import Forward

    loop, rules, guide = loop_of(Path(spec.artifact))
    if loop == "unmask":
        return stepping(capture(source_of(Path(spec.artifact)), loop=loop, rules=rules, guide=guide), spec)
    source = source_of(Path(spec.artifact))
    forward, prompt = Forward(source.module), rows(source.meta, spec.prompt)

    def generate() -> tuple[list[int], float]:
        start, first = time.perf_counter(), 0.0
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            for _ in range(rows_for(source.meta, spec.n)):
                token = forward(ids)[:, -1].argmax(-1)
                ids = torch.cat([ids, token.unsqueeze(1)], 1)
                first = first or (time.perf_counter() - start) * 1e3
        return flat(ids[:, len(prompt) :])[0][: spec.n], first

    return generate


def lossy(spec: Spec) -> list[str]:
    """The lossy passes of an artifact, as the command line has them."""
    from aropt.artifact import load

    found = [e for e in load(spec.artifact, target="eager", threads=spec.threads).ledger if e.level == "lossy"]
    return [f"{e.name}:" + ",".join(f"{k}={v}" for k, v in e.options.items()) for e in found]


def again(spec: Spec, chosen: Sequence[str], target: str = "onnxruntime") -> Any:
    """The artifact's model with these passes and the usual ones, not validated: its tokens are compared with the
    artifact's.
    """
    from aropt.api import capture, optimize
    from aropt.artifact import loop_of, source_of
    from aropt.passbase import loops
    from aropt.passmanager import Instruments, pipeline

    program = capture(source_of(Path(spec.artifact)), rules=loop_of(Path(spec.artifact))[1])
    trusting = Instruments(check=False, trust=True, budget={"kl": float("inf")})
    made = optimize(program, target, pipeline(chosen), check=False, threads=spec.threads, instruments=trusting)
    if "ngram-draft" in chosen and not loops(made.control, "speculate"):
        raise UsageError(what="the pass ngram-draft does not apply to this model", hint="leave it out of --against")
    return made


def huggingface(spec: Spec) -> Generate:
    """transformers' generate with its default (dynamic) cache, or with a static one and its built-in torch.compile, or
    with drafts from the text itself.
    """
    import torch

    from aropt.artifact import source_of

    model = source_of(Path(spec.artifact)).module
    if not hasattr(model, "generate"):
        raise UsageError(what="this model has no generate() of transformers", hint="leave hf out of --against")
    options = {"hf-static": static_cache, "hf-lookup": lookup}.get(spec.variant, dict)()

    class First:
        def __init__(self) -> None:
            self.stamps: list[float] = []

        def put(self, value: object) -> None:
            self.stamps.append(time.perf_counter())

        def end(self) -> None:
            pass

    ids = torch.tensor([spec.prompt])

    def generate() -> tuple[list[int], float]:
        streamer, start = First(), time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=spec.n,
                eos_token_id=None,
                pad_token_id=0,
                streamer=streamer,
                **options,
            )
        return out[0, len(spec.prompt) :].tolist(), (streamer.stamps[1] - start) * 1e3

    return generate


def lookup() -> dict[str, Any]:
    """Options of generate(): prompt lookup with as many drafts as ours."""
    from aropt.passes.ngram_draft import NgramDraft

    return {"prompt_lookup_num_tokens": NgramDraft().drafts}


def static_cache() -> dict[str, Any]:
    """Options of generate(): a static cache, and the step compiled."""
    from transformers import CompileConfig

    compiling = CompileConfig(fullgraph=True, mode="default")
    compiling._compile_all_devices = True  # otherwise it compiles for accelerators only, and stays eager here
    return {"cache_implementation": "static", "compile_config": compiling}


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
    ort_threads.own_process()
    main(sys.argv[1])
