"""The report of one optimization, whose schema is in schema.py: one self-contained HTML page and a result table.

`validate` checks a report, `html` renders report.html, `table` gives the table of the command line and the README.
Nothing here imports torch, so a stored report renders anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from aropt.pipeline.schema import Measurement, Report, Timed

CLIP, SHOWN = 3000, 24  # characters of a text and samples shown, so that the page stays below 1 MB


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
