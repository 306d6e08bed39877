"""The report's sections on what was made, in the models of `aropt.pipeline.report`: measurements, roofline, samples."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aropt.bench import timing as bench
from aropt.bench.variants import Origin
from aropt.cli import pictures
from aropt.frontend.facts import Source
from aropt.frontend.texts import decoder
from aropt.ir.program import Program
from aropt.ir.units import rows, rows_for
from aropt.loops.positions import decoding
from aropt.loops.request import example, fitted, room
from aropt.loops.runtime import generate
from aropt.loops.speculate import checks_drafts
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.cost import step_bytes
from aropt.pipeline.schema import Measurement, Roofline, Sample, Timed


def benchmark(
    folder: Path, program: Program, against: Sequence[str], runs: int, tokens: int, threads: int,
    say: Callable[[str], None], origin: Origin,
) -> Timed:  # fmt: skip
    """Times the artifact in `folder`, which holds the program, beside others."""
    prompt, n = example(program, tokens)
    timings = bench.measure(folder, ["aropt", *against], prompt, n, threads, runs, say, origin=origin)
    return timed(timings, program, n, len(rows(program.meta, prompt)), threads)


def timed(
    timings: Mapping[str, bench.Timing],
    program: Program,
    n: int,
    prompt: int,
    threads: int,
    rates: Sequence[float] = (),
) -> Timed:
    """Measurements of `n` new ids after `prompt` rows, speedups of aropt's variant and its roofline.

    Notes say what could not be timed or gave other tokens. `rates`: see `roofline`.
    """
    own, measured, speedup, notes = timings["aropt"], list[Measurement](), {}, []
    for variant, timing in timings.items():
        if timing.error or not timing.runs:
            notes.append(timing.failure())
            continue
        if timing.version:
            notes.append(f"{variant} is {timing.version}.")
        name = f"aropt ({program.meta.get('target', 'eager')})" if variant == "aropt" else variant
        measured += measurements(name, timing, n)
        if variant == "aropt" or not own.runs:
            continue
        speedup[variant] = timing.median / own.median
        if timing.tokens != own.tokens:
            pairs = enumerate(zip(timing.tokens, own.tokens, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(timing.tokens), len(own.tokens)))
            notes.append(f"{variant} gives other tokens than aropt from new token {at} on.")
    found = roofline(timings, program, n, prompt, threads, rates)
    return Timed(bench=measured, speedup=speedup, roofline=found, notes=notes)


def measurements(name: str, timing: bench.Timing, n: int) -> list[Measurement]:
    """Latency and rate of a generation of `n` new ids, and the latency of the first one."""
    first, middle, low, high = sorted(timing.first), timing.median, timing.quantile(0.1), timing.quantile(0.9)
    found: tuple[tuple[Any, Any, float, float, float], ...] = (
        ("generate", "ms", middle, low, high),
        ("generate", "tok/s", n * 1e3 / middle, n * 1e3 / high, n * 1e3 / low),
        ("prefill", "ms", first[len(first) // 2], first[0], first[-1]),
    )
    return [
        Measurement(variant=name, phase=phase, median=median, p10=p10, p90=p90, n=len(timing.runs), unit=unit)
        for phase, unit, median, p10, p90 in found
    ]


def roofline(
    timings: Mapping[str, bench.Timing],
    program: Program,
    n: int,
    prompt: int,
    threads: int,
    rates: Sequence[float] = (),
) -> Roofline | None:
    """Bytes that a decoding step must read, over the bandwidth, over the time of a step; None for other loops.

    A program with drafts takes a number of rounds that is not known from here: the one without them is looked at.
    `rates`: the bandwidth in GB/s as it was measured meanwhile; without them it is measured here.
    """
    variant = "no-draft" if checks_drafts(program.control) else "aropt"
    own = timings.get(variant)
    if own is None or not own.runs or not decoding(program.control):  # others don't go step by step
        return None
    size = step_bytes(program, prompt + rows_for(program.meta, n) // 2)
    rate = statistics.median(rates) if rates else bench.bandwidth(size, threads)
    share = size / rate / 1e6 / (own.median / rows_for(program.meta, n))
    return Roofline(variant=variant, bytes_per_step=size, bandwidth_gb_s=rate, share=share)


def samples(reference: Program, made: Compiled, source: Source) -> list[Sample]:
    """The same prompts through the reference interpreter and through the result: pictures or texts."""
    program, found = made.program, []
    image = program.meta["modality"] == "image"
    for i, prompt in enumerate([fitted(program, p) for p in program.meta["prompts"][:10]]):
        n, drawn = min(64, room(program, prompt)), bool(i % 2) or image
        options: dict[str, Any] = {"seed": i, "temperature": 0.8 if drawn else 0.0}
        before, after = generate(reference, [prompt], n, **options)[0], made.generate([prompt], n, **options)[0]
        label = f"class {prompt[0] - 17}" if image else f"prompt {i}, {'sampled' if drawn else 'greedy'}"
        shows = [shown(tokens, prompt, program, source) for tokens in (before, after)]
        kind: Any = "image" if image else "text"
        found.append(Sample(label=label, before=shows[0], after=shows[1], same=before == after, kind=kind))
    return found


def shown(tokens: list[int], prompt: list[int], program: Program, source: Source) -> Any:
    """Tokens as rows of pixels or as text."""
    if program.meta["modality"] == "image":
        return pictures.pixels(tokens, program.meta).tolist()
    if program.meta["modality"] == "text":
        return decoder(source.texts)([*prompt, *tokens])
    return " ".join(map(str, [*prompt, *tokens]))
