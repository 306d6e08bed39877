"""Timing programs side by side: each variant in a process of its own, taking turns, medians with spread.

A worker (`python -m aropt.bench SPEC`) loads one variant, then generates once for each line it reads, and answers with
the milliseconds and the tokens. The parent alternates between the workers, so that drifts of the machine hit all alike.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aropt.errors import AroptError, UsageError

AGAINST = {
    "eager": "the model as given: a full forward for each token",
    "cached": "the derived cache, run eagerly by torch",
    "inductor": "the derived cache, compiled by torch.compile",
    "hf": "transformers' generate with its own cache",
}
DEFAULT_AGAINST = ("eager", "cached", "hf")


@dataclass(frozen=True)
class Spec:
    """What a worker runs: a variant of an artifact, on a prompt."""

    variant: str
    artifact: str
    prompt: list[int]
    n: int
    threads: int


@dataclass
class Timing:
    """Milliseconds of each run, first token included; and the tokens of the last run."""

    variant: str
    runs: list[float]
    first: list[float]
    tokens: list[int]
    error: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.runs)

    def quantile(self, q: float) -> float:
        ordered = sorted(self.runs)
        return ordered[min(len(ordered) - 1, max(0, round(q * (len(ordered) - 1))))]


def measure(
    artifact: Path,
    variants: Sequence[str],
    prompt: list[int],
    n: int,
    threads: int,
    runs: int = 5,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Timing]:
    """Times the variants of an artifact in alternating rounds (after one warm-up each). Keys are variants."""
    workers = {v: Worker(Spec(v, str(artifact), prompt, n, threads)) for v in variants}
    try:
        for variant, worker in workers.items():
            say(f"load {variant}")
            worker.ready()
        alive = {v: w for v, w in workers.items() if not w.timing.error}
        for worker in alive.values():  # a second warm-up: lazy sessions and compilers are in place now
            worker.go(keep=False)
        for number in range(runs):
            say(f"round {number + 1} of {runs}")
            for worker in alive.values():
                worker.go()
        return {v: w.timing for v, w in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()


class Worker:
    """One variant in its own process."""

    def __init__(self, spec: Spec) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "TOKENIZERS_PARALLELISM": "false"}
        self.timing = Timing(spec.variant, [], [], [])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "aropt.bench", json.dumps(asdict(spec))],
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        return {"error": (self.process.stderr.read().strip().splitlines() or ["the worker ended"])[-1][:300]}

    def ready(self) -> None:
        self.timing.error = str(self.answer().get("error", ""))

    def go(self, keep: bool = True) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            self.timing.error = self.timing.error or "the worker ended"
            return
        answer = self.answer()
        if "error" in answer:
            self.timing.error = answer["error"]
        elif keep:
            self.timing.runs.append(answer["ms"])
            self.timing.first.append(answer["first"])
            self.timing.tokens = answer["tokens"]

    def stop(self) -> None:
        self.process.kill()
        self.process.communicate()


Generate = Callable[[], tuple[list[int], float]]  # new tokens, milliseconds to the first one


def main(text: str) -> None:
    """The worker's loop."""
    spec = Spec(**json.loads(text))
    import torch

    torch.set_num_threads(spec.threads)
    try:
        generate = variant(spec)
        generate()
    except (AroptError, ImportError, RuntimeError, ValueError) as error:
        print(json.dumps({"error": str(error).splitlines()[0]}), flush=True)
        return
    print(json.dumps({"ready": spec.variant}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        tokens, first = generate()
        elapsed = (time.perf_counter() - start) * 1e3
        print(json.dumps({"ms": elapsed, "first": first, "tokens": tokens}), flush=True)


def variant(spec: Spec) -> Generate:
    """How a variant generates."""
    if spec.variant == "eager":
        return eager(spec)
    if spec.variant == "hf":
        return huggingface(spec)
    from aropt.artifact import load

    target = {"cached": "eager", "inductor": "inductor"}.get(spec.variant)
    program = load(spec.artifact, target=target, threads=spec.threads)

    def generate() -> tuple[list[int], float]:
        start = time.perf_counter()
        stamps: list[float] = []
        tokens = program.generate(
            [spec.prompt], spec.n, on_round=lambda _: stamps.append(time.perf_counter()) if not stamps else None
        )
        return tokens[0], (stamps[0] - start) * 1e3

    return generate


def eager(spec: Spec) -> Generate:
    """The model as its owner runs it without a cache: forward over all tokens, argmax, append."""
    import torch

    from aropt.artifact import source_of
    from aropt.trace import Forward

    forward = Forward(source_of(Path(spec.artifact)).module)

    def generate() -> tuple[list[int], float]:
        start, first = time.perf_counter(), 0.0
        ids = torch.tensor([spec.prompt])
        with torch.inference_mode():
            for _ in range(spec.n):
                token = forward(ids)[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], 1)
                first = first or (time.perf_counter() - start) * 1e3
        return ids[0, len(spec.prompt) :].tolist(), first

    return generate


def huggingface(spec: Spec) -> Generate:
    """transformers' generate with its default (dynamic) cache."""
    import torch

    from aropt.artifact import source_of

    model = source_of(Path(spec.artifact)).module
    if not hasattr(model, "generate"):
        raise UsageError(what="this model has no generate() of transformers", hint="leave hf out of --against")

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
            )
        return out[0, len(spec.prompt) :].tolist(), (streamer.stamps[1] - start) * 1e3

    return generate


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
    main(sys.argv[1])
