"""The report of one optimization: the schema of report.json, one self-contained HTML page and a result table.

`validate` checks a report, `html` renders report.html, `table` gives the table of the command line and the README.
Nothing here imports torch, so a stored report renders anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from os.path import commonprefix
from pathlib import Path
from typing import Annotated, Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Image = list[list[Annotated[int, Field(ge=0, le=16)]]]
CLIP, SHOWN = 3000, 24  # characters of a text and samples shown, so that the page stays below 1 MB


def _finite(value: Any) -> Any:
    """JSON has no NaN, and an error may well be one: it is stored as null and shown as "not finite"."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]


class Strict(BaseModel):
    """Base: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tool(Strict):
    name: str
    version: str


class Env(Strict):
    """Where the report was made; None for what is not installed."""

    python: str
    torch: str
    onnxruntime: str | None = None
    transformers: str | None = None
    platform: str
    cpu: str
    gpu: str | None = None
    threads: PositiveInt


class Model(Strict):
    name: str
    source: str
    modality: Literal["image", "text", "tokens"]
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    vocab: PositiveInt
    capacity: PositiveInt
    heldout: dict[str, Any] | None = None


class Change(Strict):
    before: NonNegativeInt
    after: NonNegativeInt


class Pass(Strict):
    """One pass. `bytes` are those touched by a decode step; of a reverted pass, `after` is what it would have been."""

    name: str
    status: Literal["applied", "skipped", "reverted"]
    reason: str = ""
    level: Literal["bitwise", "rounding", "distribution", "lossy"]
    options: dict[str, Any] = {}
    seconds: NonNegative
    nodes: Change
    bytes: Change
    verify: dict[str, Number] = {}
    matches: list[str] = []
    rejected: list[tuple[str, str]] = []


class Case(Strict):
    """One validated input. `ratio` is error over noise floor, `ties` the differing tokens below the floor."""

    name: str
    kind: Literal["greedy", "sampled", "ragged", "boundary"]
    prompt: NonNegativeInt
    tokens: NonNegativeInt
    error: Number
    floor: Number
    ratio: Number
    ties: NonNegativeInt
    status: Literal["pass", "fail"]


class Divergence(Strict):
    """The first op whose output is out of tolerance."""

    module: str
    node: str
    op: str
    error: Number


class Verification(Strict):
    status: Literal["pass", "fail"]
    metrics: dict[str, Number] = {}
    cases: list[Case] = []
    diverges: Divergence | None = None

    @model_validator(mode="after")
    def _has_evidence(self) -> Verification:
        if self.status == "pass" and not (self.cases or self.metrics):
            raise ValueError("status is pass, but there are neither cases nor metrics")
        if self.status == "pass" and (self.diverges or any(case.status == "fail" for case in self.cases)):
            raise ValueError("status is pass, but a case failed or diverges is set")
        return self


class Measurement(Strict):
    variant: str
    phase: Literal["generate", "prefill", "decode"]
    median: NonNegative
    p10: NonNegative
    p90: NonNegative
    n: PositiveInt
    unit: Literal["s", "ms", "us", "tok/s"]


class Roofline(Strict):
    """`share`: the least time that the bytes of a step can take at that bandwidth, over the time measured."""

    bytes_per_step: NonNegativeInt
    bandwidth_gb_s: Positive
    share: NonNegative


class Sample(Strict):
    """The same prompt before and after: a text, or an image as rows of grey levels 0 to 16."""

    label: str
    before: str | Image
    after: str | Image
    same: bool
    kind: Literal["image", "text"]

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Sample:
        shapes = [None if isinstance(x, str) else [len(row) for row in x] for x in (self.before, self.after)]
        if shapes[0] != shapes[1] or (shapes[0] is None) != (self.kind == "text"):
            raise ValueError(f"before and after are not of the same shape, or not of kind {self.kind}")
        if shapes[0] is not None and (not sum(shapes[0]) or len(set(shapes[0])) > 1):
            raise ValueError("an image is a list of rows of equal length")
        if self.same and self.before != self.after:
            raise ValueError("same is true, but before and after differ")
        return self


class Artifact(Strict):
    path: str
    sha256: str
    bytes: NonNegativeInt


class Report(Strict):
    """The content of report.json. `speedup` says how many times as fast aropt's variant is as the one named."""

    schema_version: Literal[1]
    tool: Tool
    env: Env
    model: Model
    target: str
    passes: list[Pass]
    verify: Verification
    bench: list[Measurement] = []
    speedup: dict[str, Positive] = {}
    roofline: Roofline | None = None
    samples: list[Sample] = []
    artifacts: list[Artifact] = []
    notes: list[str] = []


def validate(report: Mapping[str, Any]) -> Report:
    """The report as a typed object; raises pydantic's ValidationError where it breaks the schema."""
    return Report.model_validate(report)


def number(value: float | None) -> str:
    """Three digits or all of the integer part: 1,234, 41.2; very large or small ones as 1.5e-7."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if value == round(value) and abs(value) < 1e9:
        return f"{round(value):,}"
    if not 1e-3 <= abs(value) < 1e9:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def amount(value: float, unit: str) -> str:
    """A number with its unit; "B" and "s" get a prefix."""
    prefixes = {"B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "s": ((1, "s"), (0, "ms"))}.get(unit, ())
    for scale, name in prefixes:
        if value >= scale:
            return f"{number(value / (scale or 1e-3))} {name}"
    return f"{number(value)} {unit}".strip()


def verdict(report: Report) -> str:
    """The claim that the evidence allows."""
    levels = {p.level for p in report.passes if p.status == "applied"}
    if report.verify.status == "fail":
        return "Failed: not the same output as eager"
    if "lossy" in levels:
        return "Verified: within the stated budget"
    return f"Verified: same {'distribution' if 'distribution' in levels else 'tokens'} as eager"


def summary(report: Report) -> str:
    """What the verdict rests on, in a sentence."""
    cases = report.verify.cases
    if not cases:
        return "No cases were run."
    worst = max(math.inf if case.ratio is None else case.ratio for case in cases)
    failed, tokens, ties = (
        sum(c.status == "fail" for c in cases),
        sum(c.tokens for c in cases),
        sum(c.ties for c in cases),
    )
    return (
        f"{len(cases)} cases, {failed} failed. {number(tokens)} tokens compared, "
        f"largest error {number(worst)} × the noise floor, {number(ties)} ties."
    )


def deltas(report: Report) -> list[tuple[str, float, float, str]]:
    """(what, before, after, unit), where before is eager, or else the first variant measured against."""
    base = "eager" if "eager" in report.speedup else next(iter(report.speedup), "eager")
    found: list[tuple[str, float, float, str]] = []
    for phase in ("generate", "prefill", "decode"):
        rows = [row for row in report.bench if row.phase == phase and row.unit != "tok/s"]
        old = next((row for row in rows if row.variant == base), None)
        new = next((row for row in rows if row.variant != base and row.variant not in report.speedup), None)
        if old and new and old.unit == new.unit:
            found.append((f"latency, {phase}", old.median, new.median, new.unit))
    kept = [p for p in report.passes if p.status == "applied"]
    if kept:
        found.append(("bytes per decode step", kept[0].bytes.before, kept[-1].bytes.after, "B"))
        found.append(("graph nodes", kept[0].nodes.before, kept[-1].nodes.after, ""))
    return found


def marked(text: str, other: str) -> Markup:
    """The text as HTML, its first difference from the other marked."""
    at = len(commonprefix([text, other]))
    if text == other:
        return escape(text[:CLIP]) + ("…" if len(text) > CLIP else "")
    start = max(0, at - CLIP // 2)
    here = {"": "end", "\n": "↵\n"}.get(text[at : at + 1], text[at : at + 1])
    parts = ("…" if start else "", text[start:at], here, text[at + 1 : start + CLIP])
    return Markup('{}{}<mark>{}</mark><span class="rest">{}</span>').format(*parts)


def html(report: Mapping[str, Any]) -> str:
    """report.html: one page with everything inline, no script and nothing to load."""
    r = validate(report)
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in r.bench:
        groups.setdefault((row.phase, row.unit), []).append(row)
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    env = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.globals.update(number=number, amount=amount, marked=marked, log10=math.log10)
    return env.get_template("report.html.j2").render(
        r=r, verdict=verdict(r), summary=summary(r), deltas=deltas(r), groups=groups, shown=SHOWN
    )


def table(report: Mapping[str, Any]) -> str:
    """The measurements as a markdown table that also reads well as plain text; a dash for what was not measured."""
    r = validate(report)
    merged: dict[tuple[str, str], dict[bool, Measurement]] = {}
    for row in r.bench:
        merged.setdefault((row.phase, row.variant), {})[row.unit == "tok/s"] = row
    lines = [["variant", "phase", "median latency", "tokens/s", "p10-p90", "n", "speedup against it"]]
    for (phase, variant), units in merged.items():
        row = units.get(False) or units[True]
        latency = f"{number(row.median)} {row.unit}" if False in units else "-"
        rate = number(units[True].median) if True in units else "-"
        ratio = f"{number(r.speedup[variant])}×" if phase == "generate" and variant in r.speedup else "-"
        spread = f"{number(row.p10)}-{number(row.p90)} {row.unit}"
        name = " ".join(variant.replace("|", "\\|").split())
        lines.append([name, phase, latency, rate, spread, number(row.n), ratio])
    widths = [max(len(line[i]) for line in lines) for i in range(7)]
    lines.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    padded = ([f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)
