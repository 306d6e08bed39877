"""The report of one optimization: the schema of report.json, one self-contained HTML page and a result table.

`validate` checks a report, `html` renders report.html, `table` gives the table of the command line and the README.
Nothing here imports torch, so a stored report renders anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# JSON has no NaN, and an error may well be one: it is stored as null and shown as "not finite".
Number = Annotated[float | None, AfterValidator(lambda x: x if x is not None and math.isfinite(x) else None)]
Image = list[list[Annotated[int, Field(ge=0)]]]
CLIP, SHOWN = 3000, 24  # characters of a text and samples shown, so that the page stays below 1 MB


class Strict(BaseModel):
    """Base: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tool(Strict):
    name: str
    version: str


class Env(Strict):
    python: str
    torch: str
    onnxruntime: str | None = None  # None: not installed
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
    level: Literal["bitwise", "rounding", "distribution", "lossy", "retrained"]
    options: dict[str, Any] = {}
    seconds: NonNegative
    nodes: Change
    bytes: Change
    verify: dict[str, Number] = {}
    matches: list[str] = []
    rejected: list[tuple[str, str]] = []
    memory: dict[str, NonNegativeInt] = {}  # bytes of a sequence besides state, by what they are for


class Case(Strict):
    """One validated input. `ratio` is error over noise floor, `ties` the differing tokens below the floor."""

    name: str
    kind: Literal["greedy", "sampled", "ragged", "boundary", "stop"]
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
    where: str = ""  # which graph or part, where it is not an op of the model
    repro: str = ""  # a line of Python that shows it


class Coverage(Strict):
    """What the cases vary in: levels of each factor, pairs of levels that can meet and do, why others can't: pairs."""

    factors: dict[str, list[str]]
    requests: NonNegativeInt
    pairs: NonNegativeInt
    covered: NonNegativeInt
    excluded: dict[str, PositiveInt] = {}
    seed: int = 0


class Verification(Strict):
    status: Literal["pass", "fail"]
    coverage: Coverage | None = None
    metrics: dict[str, Number] = {}
    cases: list[Case] = []
    diverges: Divergence | None = None

    @model_validator(mode="after")
    def _has_evidence(self) -> Verification:
        failed = self.diverges or any(case.status == "fail" for case in self.cases)
        if self.status == "pass" and (failed or not (self.cases or self.metrics)):
            raise ValueError("status is pass, but a case failed, or diverges is set, or nothing was verified")
        return self


class Measurement(Strict):
    """Quantiles over n runs of one variant: the program as given, a peer, or aropt's."""

    variant: str
    phase: Literal["generate", "prefill", "decode"]
    median: NonNegative
    p10: NonNegative
    p90: NonNegative
    n: PositiveInt
    unit: Literal["s", "ms", "us", "tok/s"]


class Roofline(Strict):
    """`share`: the least time that the bytes of a step can take at that bandwidth, over the time measured."""

    variant: str = "aropt"
    bytes_per_step: NonNegativeInt
    bandwidth_gb_s: Positive
    share: NonNegative


class Sample(Strict):
    """The same prompt before and after: a text, or an image as rows of grey levels."""

    label: str
    before: str | Image
    after: str | Image
    same: bool
    kind: Literal["image", "text"]

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Sample:
        shapes = [None if isinstance(x, str) else [len(row) for row in x] for x in (self.before, self.after)]
        rows, is_text = shapes[0], self.kind == "text"
        if shapes[0] != shapes[1] or (rows is None) != is_text or (rows is not None and len({0, *rows}) != 2):
            raise ValueError("before and after are not two texts, or not two images of the same size, as kind says")
        if self.same and self.before != self.after:
            raise ValueError("same is true, but before and after differ")
        return self


class Artifact(Strict):
    path: str
    sha256: str
    bytes: NonNegativeInt


class Calls(Strict):
    """Whether the target steps, runs several rounds a call or the whole loop in one, and the milliseconds of each.

    `graphs`: those that run several rounds a call. `reason`: why a way was not to be had.
    """

    picked: str
    graphs: list[str] = []
    reason: str = ""
    verify: dict[str, Any] = {}
    tokens: NonNegativeInt = 0
    n: NonNegativeInt = 0
    ms: dict[str, Positive] = {}


class Drift(Strict):
    """What lossy passes changed, measured on the lowered program (see validate.drift). `steps`: [KL, top-1] a round."""

    kl: Number
    kl_max: Number
    top1: Number
    agreement: Number
    first: int
    measured: NonNegativeInt
    tokens: NonNegativeInt
    forwards: NonNegativeInt
    exact_forwards: NonNegativeInt
    rows: NonNegativeInt
    exact_rows: NonNegativeInt
    steps: list[tuple[Number, Number]]
    budget: dict[str, NonNegative]
    missed: str = ""
    quality: Number = None  # share of the ids of a task that are right; None: the model has no examples
    exact_quality: Number = None
    judged: NonNegativeInt = 0  # how many ids these are
    shift: Number = None  # of the distribution of ids that are drawn; None: they are those of the exact program
    drawn: NonNegativeInt = 0  # how many ids these are


class Memory(Strict):
    """Bytes: of weights; of one sequence's state by kind, with all rows of the capacity; and, measured, of all values
    that are held after a round of an answer of so many tokens.
    """

    weights: NonNegativeInt
    state: dict[str, NonNegativeInt]
    peak: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Tried(Strict):
    """Ways of drafting that took turns on the model's prompts: `ms` of a turn, `ids` that a round gives, `rows`: the
    milliseconds of one round over so many rows without drafts, `left`: why others were not timed.
    """

    name: str
    kept: str = ""
    ms: dict[str, Positive] = {}
    ids: dict[str, Positive] = {}
    rows: dict[int, Positive] = {}
    left: dict[str, str] = {}
    prompts: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Window(Strict):
    """An image by windows of s x s ids: rounds, and milliseconds (smallest and largest of n runs beside the median)."""

    window: PositiveInt
    rounds: PositiveInt
    median: Positive
    p10: Positive
    p90: Positive
    n: PositiveInt


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
    calls: Calls | None = None
    memory: Memory | None = None
    tried: list[Tried] = []
    drift: Drift | None = None
    windows: list[Window] = []
    nodes: dict[str, dict[str, PositiveInt]] = {}
    samples: list[Sample] = []
    artifacts: list[Artifact] = []
    uncached: str = ""  # why the program stores no keys and values, if it does not
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
    for scale, name in {"B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")), "s": ((1, "s"), (0, "ms"))}.get(unit, ()):
        if value >= scale:
            return f"{number(value / (scale or 1e-3))} {name}"
    return f"{number(value)} {unit}".strip()


def verdict(report: Report) -> str:
    """The claim that the evidence allows."""
    levels = {p.level for p in report.passes if p.status == "applied"}
    if "retrained" in levels:
        return "Failed: another model, which needs fine-tuning"
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
    error = f"{number(worst)} times the noise floor" if worst < math.inf else "not finite"
    tokens, ties = sum(case.tokens for case in cases), sum(case.ties for case in cases)
    passed, tied = sum(case.status == "pass" for case in cases), "tie" if ties == 1 else "ties"
    return (
        f"{passed} of {len(cases)} cases pass: {number(tokens)} tokens compared, largest error {error}, {ties} {tied}."
    )


class Timed(BaseModel):
    """The measurements of a report, if there are any, or of a benchmark that made nothing else."""

    bench: list[Measurement] = []
    speedup: dict[str, Positive] = {}
    roofline: Roofline | None = None
    notes: list[str] = []


def merged(report: Report | Timed) -> dict[tuple[str, str], dict[bool, Measurement]]:
    """The measurements of each (phase, variant): under False its latency, under True its rate."""
    found: dict[tuple[str, str], dict[bool, Measurement]] = {}
    for row in report.bench:
        found.setdefault((row.phase, row.variant), {})[row.unit == "tok/s"] = row
    return found


def own(report: Report) -> str | None:
    """The variant that is aropt's: named after the tool or the target, or else the last one not measured against."""
    names = [row.variant for row in report.bench if row.variant not in (*report.speedup, "eager")]
    named = (name for name in names if name.startswith(report.tool.name) or name == report.target)
    return next(named, names[-1] if names else None)


def deltas(report: Report) -> list[tuple[str, float, float, str]]:
    """(what, before, after, unit), where before is eager, or else the first variant measured against."""
    base = "eager" if "eager" in report.speedup else next(iter(report.speedup), "eager")
    found: list[tuple[str, float, float, str]] = []
    rows = {key: units[False] for key, units in merged(report).items() if False in units}
    for phase in ("generate", "prefill", "decode"):
        old, new = rows.get((phase, base)), rows.get((phase, own(report) or ""))
        if old and new and old.unit == new.unit:
            found.append((f"latency, {phase}", old.median, new.median, new.unit))
    kept = [p for p in report.passes if p.status == "applied"]
    if kept:
        found.append(("bytes per decode step", kept[0].bytes.before, kept[-1].bytes.after, "B"))
        found.append(("graph nodes", kept[0].nodes.before, kept[-1].nodes.after, ""))
    return found


def marked(text: str, other: str) -> Markup:
    """The text as HTML, its first difference from the other marked."""
    if text == other:
        return escape(text[:CLIP]) + ("…" if len(text) > CLIP else "")
    at = next((i for i, pair in enumerate(zip(text, other)) if pair[0] != pair[1]), min(len(text), len(other)))
    start = max(0, at - CLIP // 2)
    here = {"": "end", "\n": "↵\n"}.get(text[at : at + 1], text[at : at + 1])
    parts = ("…" if start else "", text[start:at], here, text[at + 1 : start + CLIP])
    return Markup('{}{}<mark>{}</mark><span class="rest">{}</span>').format(*parts)


def html(report: Mapping[str, Any]) -> str:
    """report.html: one page with everything inline, no script and nothing to load."""
    r = validate(report)
    charts: dict[tuple[str, str], list[tuple[Measurement, Measurement | None]]] = {}
    for units in merged(r).values():
        row = units.get(False) or units[True]
        charts.setdefault((row.phase, row.unit), []).append((row, units.get(True)))
    env = Environment(
        loader=PackageLoader("aropt.pipeline"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    env.globals.update(number=number, amount=amount, marked=marked, log10=math.log10)
    page, claim = env.get_template("report.html.j2"), verdict(r)
    return page.render(r=r, verdict=claim, summary=summary(r), deltas=deltas(r), charts=charts, own=own(r), shown=SHOWN)


def table(report: Mapping[str, Any]) -> str:
    """The measurements as a markdown table that also reads well as plain text; a dash for what was not measured."""
    r = Timed.model_validate(report)
    lines = [["variant", "phase", "median latency", "tokens/s", "p10-p90", "n", "speedup against it"]]
    for (phase, variant), units in merged(r).items():
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
