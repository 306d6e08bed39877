"""Masked diffusion beside its peers: the same weights, the same commit rule, one run, tokens compared policy by policy.

    python -m perf.canvas --python PYTHON --fast-dllm CHECKOUT --d2cache CHECKOUT [--runs 6] [--threads 2]

CHECKOUT are clones of NVlabs/Fast-dLLM and Kamichanw/d2Cache, PYTHON one that has what they import (see
perf/peer_canvas.py). Without them only aropt's own variants run. Writes perf/results/canvas.json and prints the table.
Weights: text-mdlm's, under LLaDA's names, and random ones of the same size, on which stale rows change most tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from aropt.targets.ort.threads import own_process
from aropt.targets.scratch import Scratch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "perf" / "results" / "canvas.json"
NEW, BLOCK, TAU = 128, 32, 0.9
ONE_A_ROUND = 2.0  # no probability reaches it
PAUSE = 0.3


@dataclass(frozen=True)
class Variant:
    """Who generates: `engine` is aropt, fast-dllm or d2cache. Of aropt: the target, and the cache's pass."""

    name: str
    engine: str = "aropt"
    cache: str = ""
    target: str = "onnxruntime"
    threshold: float = TAU


@dataclass(frozen=True)
class Work:
    """One model and who runs it. `same`: pairs of variants whose tokens must be equal."""

    model: str  # a folder of perf.llada, or a reference model
    variants: tuple[Variant, ...]
    ratios: tuple[tuple[str, str], ...]  # slower, faster
    same: tuple[tuple[str, str], ...] = ()


@dataclass
class Timing:
    """Milliseconds of the timed runs on the first prompt; tokens, forwards and computed rows for each prompt."""

    ms: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    error: str = ""


OWN = (
    Variant("plain loop, eager, one id a round", target="eager", threshold=ONE_A_ROUND),
    Variant("plain loop, eager", target="eager"),
    Variant("plain loop"),
    Variant("dual-cache", cache="dual-cache"),
    Variant("prefix-cache", cache="prefix-cache"),
    Variant("free-cache", cache="free-cache"),
    Variant("dkv-cache", cache="dkv-cache"),
)
PEERS = tuple(Variant(f"{e}, {c}", e, c) for e in ("fast-dllm", "d2cache") for c in ("none", "prefix", "dual"))
SAME = tuple(
    (own, f"{engine}, {cache}")
    for engine in ("fast-dllm", "d2cache")
    for own, cache in (("plain loop, eager", "none"), ("prefix-cache", "prefix"), ("dual-cache", "dual"))
)
RATIOS = (
    ("plain loop, eager, one id a round", "dual-cache"),
    ("plain loop, eager, one id a round", "free-cache"),
    ("fast-dllm, dual", "dual-cache"),
    ("d2cache, prefix", "prefix-cache"),
    ("fast-dllm, none", "plain loop"),
)
BLOCKS = Work(
    "text-bd",
    (Variant("plain loop, eager", target="eager"), Variant("plain loop"), Variant("block-cache", cache="block-cache")),
    (("plain loop, eager", "block-cache"),),
    (("plain loop, eager", "block-cache"),),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="of llada-text-mdlm, llada-bench, text-bd (default: all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--fast-dllm", type=Path)
    parser.add_argument("--d2cache", type=Path)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant, one after the other")
    args = parser.parse_args()
    if args.worker:
        serve(json.loads(args.worker))
        return
    checkouts = {"fast-dllm": args.fast_dllm, "d2cache": args.d2cache}
    there = OWN + tuple(p for p in PEERS if checkouts[p.engine])
    from perf.llada import folder

    models = ROOT / "build" / "models"
    trained = folder(models / "llada-text-mdlm", model="text-mdlm")
    drawn = folder(models / "llada-bench")
    works = [Work(str(path), there, RATIOS, SAME) for path in (trained, drawn)] + [BLOCKS]
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for work in works:
        name = Path(work.model).name
        if args.models and name not in args.models:
            continue
        about = {"env": environment(args.threads), "tokens": NEW, "block": BLOCK, "threshold": TAU}
        found[name] = about | described(work, measure(work, checkouts, args))
        print(table(name, found[name]), flush=True)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def environment(threads: int) -> dict[str, Any]:
    from aropt.pipeline.describe import environment as machine

    return machine(threads).model_dump()


def prompts(model: str) -> list[list[int]]:
    """Three prompts: the reference model's, or those of perf.llada."""
    if "text" in model:
        from aropt.frontend.sources import resolve

        name = Path(model).name.removeprefix("llada-")
        return [[int(t) for t in p] for p in resolve(name, None, False).meta["prompts"][:3]]
    from perf.llada import PROMPTS

    return PROMPTS


def measure(work: Work, checkouts: dict[str, Path | None], args: argparse.Namespace) -> dict[str, Timing]:
    """Every variant in a process of its own, taking turns; the first turns compare tokens, the others are timed."""
    timings = {v.name: Timing() for v in work.variants}
    ids = prompts(work.model)
    for number in range(args.rounds):  # the same program may run at another speed in each process
        workers: dict[str, Worker] = {}
        try:
            for variant in work.variants:  # one after the other: threads that wait for each other spin
                name = variant.name
                print(f"{Path(work.model).name}: {name}", file=sys.stderr, flush=True)
                workers[name] = Worker(variant, work.model, ids, checkouts, args)
                timings[name].error = timings[name].error or workers[name].ready()
            alive = {n: w for n, w in workers.items() if not timings[n].error}
            if number == 0:
                for name, worker in alive.items():
                    for i in range(len(ids)):
                        answer = worker.go(i)
                        timings[name].tokens.append(answer["tokens"])
                        timings[name].forwards.append(answer["nfe"])
                        timings[name].rows.append(answer.get("rows", -1))
            for _ in range(args.runs // args.rounds):
                for name, worker in alive.items():
                    time.sleep(PAUSE)
                    timings[name].ms.append(worker.go(0)["ms"])
        finally:
            for worker in workers.values():
                worker.stop()
    return timings


class Worker:
    """One variant: a process for each prompt where the engine takes one prompt a process, else one for all."""

    def __init__(
        self, variant: Variant, model: str, ids: list[list[int]], checkouts: dict[str, Path | None], args: Any
    ) -> None:
        job = {"model": model, "threads": args.threads, **asdict(variant)}
        if variant.engine == "aropt":
            commands = [[sys.executable, "-m", "perf.canvas", "--worker", json.dumps({**job, "prompts": ids})]]
        else:
            script = str(ROOT / "perf" / "peer_canvas.py")
            commands = [
                [args.python, script, json.dumps(peer_job(variant, model, p, checkouts, args.threads))] for p in ids
            ]
        environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
        self.processes = [
            subprocess.Popen(
                c,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd=ROOT,
            )
            for c in commands
        ]

    def answers(self, number: int) -> dict[str, Any]:
        """The next line of JSON."""
        process = self.processes[min(number, len(self.processes) - 1)]
        assert process.stdout is not None
        line = next((text for text in process.stdout if text.startswith("{")), '{"error": "the worker ended"}')
        return dict(json.loads(line))

    def ready(self) -> str:
        """What keeps it from running, or nothing."""
        first = [self.answers(i) for i in range(len(self.processes))]
        return next((str(a.get("error") or a.get("missing")) for a in first if "ready" not in a), "")

    def go(self, number: int) -> dict[str, Any]:
        """One generation from a prompt."""
        process = self.processes[min(number, len(self.processes) - 1)]
        assert process.stdin is not None
        process.stdin.write(f"{number}\n")
        process.stdin.flush()
        answer = self.answers(number)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


def peer_job(variant: Variant, model: str, prompt: list[int], checkouts: dict[str, Path | None], threads: int) -> Any:
    """What perf/peer_canvas.py is asked."""
    config = json.loads(Path(model, "config.json").read_text())
    return {
        "peer": variant.engine,
        "checkout": str(checkouts[variant.engine]),
        "config": config,
        "weights": str(Path(model, "model.safetensors")),
        "prompt": prompt,
        "gen_length": NEW,
        "block_length": BLOCK,
        "threshold": variant.threshold,
        "cache": variant.cache,
        "threads": threads,
    }


def serve(job: dict[str, Any]) -> None:
    """A worker of aropt: builds the variant, then generates from the prompt whose number it reads."""
    import torch

    torch.set_num_threads(job["threads"])
    own_process()
    with Scratch() as folder:
        try:
            made = built(job, Path(folder))
        except Exception as error:  # a variant that fails is a line of the result
            say(error=f"{type(error).__name__}: {error}".splitlines()[0])
            return
        params = {"threshold": job["threshold"]} | ({} if made.program.meta.get("block") else {"block": BLOCK})
        counts = [counted(made, prompt, params) for prompt in job["prompts"]]
        say(ready=job["name"])
        for line in sys.stdin:
            prompt, (forwards, rows) = job["prompts"][int(line)], counts[int(line)]
            start = time.perf_counter()
            (tokens,) = made.generate([prompt], NEW, **params)
            say(ms=(time.perf_counter() - start) * 1e3, tokens=tokens, nfe=forwards, rows=rows)


def built(job: dict[str, Any], folder: Path) -> Any:
    """The program of a variant, lowered."""
    import aropt
    from aropt.ir.interpreter import Eager
    from aropt.pipeline.checks import Instruments
    from aropt.pipeline.registry import pipeline

    if Path(job["model"]).is_dir():
        from perf.llada import load_folder

        model = load_folder(Path(job["model"]))
        program = aropt.capture(model, loop="unmask", mask=model.mask, prompts=job["prompts"], rules=("threshold",))
    else:
        program = aropt.capture(job["model"], rules=("threshold",))
    if job["target"] == "eager":
        return aropt.Compiled(program, Eager(program))
    names = [job["cache"]] if job["cache"] else []
    passes = pipeline(names, () if job["cache"] else ["block-cache"])
    return aropt.optimize(
        program, job["target"], passes, check=False, folder=folder, threads=job["threads"],
        instruments=Instruments(budget={"kl": float("inf")}),
    )  # fmt: skip


def counted(made: Any, prompt: list[int], params: dict[str, float]) -> tuple[int, int]:
    """Forwards and computed rows of a generation."""
    rounds: list[int] = []

    def count(values: Any) -> None:
        width = values["tokens"].shape[1]
        rounds.append(int((values["slots"] < width).sum()) if "slots" in values else width)

    made.generate([prompt], NEW, on_round=count, **params)
    return len(rounds), sum(rounds)


def say(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)


def described(work: Work, timings: dict[str, Timing]) -> dict[str, Any]:
    """The results as they are stored."""
    rows = {name: line(t) for name, t in timings.items() if not t.error}
    ratios = [[a, b, rows[a]["ms"] / rows[b]["ms"]] for a, b in work.ratios if a in rows and b in rows]
    equal = [
        [a, b, sum(x == y for x, y in zip(timings[a].tokens, timings[b].tokens, strict=True)), len(timings[a].tokens)]
        for a, b in work.same
        if a in rows and b in rows
    ]
    return {
        "rows": rows,
        "ratios": ratios,
        "same": equal,
        "errors": {n: t.error for n, t in timings.items() if t.error},
    }


def line(timing: Timing) -> dict[str, Any]:
    """One variant's figures; forwards and rows are those of the timed prompt."""
    ordered = sorted(timing.ms)
    return {
        "ms": statistics.median(ordered),
        "least": ordered[0],
        "most": ordered[-1],
        "n": len(ordered),
        "forwards": timing.forwards[0],
        "tokens_per_forward": NEW / timing.forwards[0],
        "rows": timing.rows[0],
    }


def table(name: str, found: dict[str, Any]) -> str:
    """Markdown: the variants, the ratios asked for, and which tokens are equal."""
    return "\n".join([f"\n### {name}\n", *lines(found)])


def lines(found: dict[str, Any]) -> Iterator[str]:
    yield "| variant | median | least to most | forwards | ids a forward | rows computed |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"

    def show(rows: Any) -> str:
        return str(rows) if rows >= 0 else ""

    for variant, r in found["rows"].items():
        yield (
            f"| {variant} | {r['ms']:.0f} ms | {r['least']:.0f} to {r['most']:.0f} | {r['forwards']} | "
            f"{r['tokens_per_forward']:.1f} | {show(r['rows'])} |"
        )
    yield ""
    for slow, fast, ratio in found["ratios"]:
        yield f"* {fast} is {ratio:.1f} times as fast as {slow}."
    for a, b, equal, count in found["same"]:
        yield f"* {a} gives the tokens of {b} for {equal} of {count} prompts."
    for variant, error in found["errors"].items():
        yield f"* {variant} was not run: {error}"


if __name__ == "__main__":
    main()
