"""The report: its schema refuses what is wrong, the page shows all of it, and any valid report renders."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aropt.pipeline import report
from tests.support.reports import DIGITS, demo, make_pass, measure


def failed() -> dict[str, Any]:
    """A report of a text model whose verification failed, with a first divergence and differing samples."""
    bad = demo()
    bad["model"] |= {"name": "text-ar", "source": "reference model", "modality": "text", "vocab": 260, "capacity": 1024}
    bad["verify"] |= {
        "status": "fail",
        "diverges": {
            "module": "model.layers.2.self_attn",
            "node": "scaled_dot_product_attention_2",
            "op": "aten.scaled_dot_product_attention.default",
            "error": 0.0473,
        },
    }
    bad["verify"]["cases"][3] |= {"status": "fail", "error": 0.0473, "ratio": 19708.3}
    bad["verify"]["cases"][5] |= {"status": "fail", "error": float("nan"), "ratio": float("inf")}
    bad["bench"], bad["speedup"], bad["roofline"] = [], {}, None
    prompt = "def __init__(self, "
    changed = [row[:] for row in DIGITS[1]]
    changed[3][4], changed[5][2] = 4, 9
    bad["samples"] = [
        {
            "label": "prompt: def __init__(self, ",
            "before": prompt + "name, value):\n    self.name = name\n    self.value = value\n",
            "after": prompt + "name, value):\n    self.name = value\n    return <name> & value\n",
            "same": False,
            "kind": "text",
        },
        {
            "label": "prompt: import os",
            "before": "import os\nimport sys",
            "after": "import os",
            "same": False,
            "kind": "text",
        },
        {"label": "class 3", "before": DIGITS[1], "after": changed, "same": False, "kind": "image"},
        {
            "label": "A mapping object maps",
            "before": "<b>&amp;</b>",
            "after": "<b>&amp;</b>",
            "same": True,
            "kind": "text",
        },
    ]
    return bad


class Page(HTMLParser):
    """What the tests ask of a page: tags balanced, ids, text, addresses, inked pixels by image."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.addresses: list[str] = []
        self.images: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids.add(named.get("id") or "")
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        assert tag not in ("script", "iframe", "link", "object", "embed")
        assert not any(key.startswith("on") for key in named)
        if named.get("class") == "pixels":
            self.images.append(0)
        self.images[-1:] = [n + (tag == "path" and "fill-opacity" in named) for n in self.images[-1:]]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def render(value: dict[str, Any]) -> Page:
    """The parsed page; checks what holds of every page."""
    text = report.html(value)
    page = Page(text)
    assert page.ids >= {"verdict", "speed", "change", "passes", "verification", "samples", "notes", "environment"}
    assert not page.addresses and "url(" not in text and "@import" not in text
    assert len(text.encode()) < 1_000_000
    return page


def test_demo_shows_everything() -> None:
    value = demo()
    page = render(value)
    assert "Verified: same tokens as eager" in page.text
    for shown in ("12.8×", "14.6 ms", "5.35 MB", "5.30 MB", "top-1 agreement 0.962 is below", "no layer has a window"):
        assert shown in page.text
    for key, name in (("passes", "name"), ("bench", "variant"), ("artifacts", "sha256"), ("samples", "label")):
        assert all(row[name] in page.text for row in value[key])
    assert all(row["name"] in page.text for row in value["verify"]["cases"])
    assert all(note in page.text for note in value["notes"])
    assert len(report.html(value)) < 100_000


def test_image_pixels() -> None:
    ink = [sum(level > 0 for row in pixels for level in row) for pixels in DIGITS]
    assert render(demo()).images == [n for n in ink for _ in ("eager", "optimized")]


def test_failure_names_the_module_and_marks_differences() -> None:
    page, text = render(failed()), report.html(failed())
    assert "Failed: not the same output as eager" in page.text and "Verified:" not in page.text
    assert "model.layers.2.self_attn" in page.text and "not finite" in page.text and "Not measured." in page.text
    assert "self.name = <mark>n</mark>" in text and "self.name = <mark>v</mark>" in text
    assert "import os<mark>↵\n</mark>" in text and "import os<mark>end</mark>" in text
    assert text.count('<rect class="first" x="4" y="3"') == 2


def test_a_peer_without_a_speedup_is_not_taken_for_the_result() -> None:
    value = demo()
    del value["speedup"]["inductor"], value["speedup"]["eager + hand-written cache"]
    assert report.deltas(report.validate(value))[0] == ("latency, generate", 187.4, 14.63, "ms")
    value["bench"][3]["variant"] = "renamed"
    value["bench"] = value["bench"][:4]
    assert report.own(report.validate(value)) == "renamed"
    value["bench"] = value["bench"][:1]
    assert report.own(report.validate(value)) is None
    render(value)


def test_text_is_escaped() -> None:
    text = report.html(failed())
    assert "return &lt;name&gt; &amp; value" in text and "&lt;b&gt;&amp;amp;&lt;/b&gt;" in text
    assert "<b>&amp;</b>" not in text and "<name>" not in text


@pytest.mark.parametrize(
    ("levels", "claim"),
    [
        (["bitwise"], "same tokens as eager"),
        (["rounding", "distribution"], "same distribution as eager"),
        (["distribution", "lossy", "rounding"], "within the stated budget"),
    ],
)
def test_verdict_claims_no_more_than_the_levels_allow(levels: list[str], claim: str) -> None:
    value = demo()
    value["passes"] = [make_pass(level, level, 0.1, (1, 1), (1, 1)) for level in levels]
    assert f"Verified: {claim}" in render(value).text


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the dicts of a report are, except those whose keys are free."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    below = [p for key, child in inner for p in paths(child, (*at, key))]
    free = at[-1:] in (("speedup",), ("heldout",), ("metrics",), ("options",)) or (
        at[:1] == ("passes",) and at[-1] == "verify"
    )
    return ([at] if isinstance(value, dict) and not free else []) + below


@pytest.mark.parametrize("path", paths(demo()), ids=lambda path: ".".join(map(str, path)) or "top")
def test_unknown_key_is_refused(path: tuple[Any, ...]) -> None:
    value = demo()
    report.validate(value)
    inside: Any = value
    for key in path:
        inside = inside[key]
    inside["mediam"] = 1
    with pytest.raises(ValidationError, match="mediam"):
        report.validate(value)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("schema_version",), 2),
        (("passes", 0, "status"), "done"),
        (("verify", "cases", 0, "status"), "fail"),
        (("verify",), {"status": "pass"}),
        (("bench", 0, "unit"), "parsecs"),
        (("bench", 0, "median"), float("nan")),
        (("samples", 0, "kind"), "text"),
        (("samples", 0, "after"), DIGITS[1]),
        (("samples", 0, "before"), [[1, 2], [3]]),
        (("samples", 0, "before"), [[17]]),
    ],
)
def test_wrong_value_is_refused(path: tuple[Any, ...], wrong: Any) -> None:
    value = demo()
    *parents, last = path
    inside: Any = value
    for key in parents:
        inside = inside[key]
    inside[last] = wrong
    with pytest.raises(ValidationError):
        report.validate(value)


def test_not_finite_is_stored_as_null() -> None:
    stored = report.validate(failed()).model_dump(mode="json")
    again = json.loads(json.dumps(stored, allow_nan=False))
    assert again["verify"]["cases"][5]["error"] is None
    assert report.html(again) == report.html(failed())


def test_rendering_is_deterministic_and_changes_nothing() -> None:
    value = demo()
    before = copy.deepcopy(value)
    assert report.html(value) == report.html(value) and value == before


def test_large_report_stays_small() -> None:
    value = failed()
    value["samples"] = [
        {"label": str(i), "before": "a" * 50_000, "after": "a" * 40_000 + "b", "same": False, "kind": "text"}
        for i in range(200)
    ]
    value["passes"][0]["matches"] = [f"node {i}" for i in range(100_000)]
    page = render(value)
    assert "176 more in report.json." in page.text and "99950 more in report.json." in page.text


def test_table() -> None:
    value = demo()
    value["bench"].append(measure("a|b\nc", "prefill", 3.0, 0.1, "us"))
    header, rule, *rows = (line.strip("|").split(" | ") for line in report.table(value).splitlines())
    cells = {(row[0].strip(), row[1].strip()): [cell.strip() for cell in row[2:]] for row in rows}
    assert [cell.strip() for cell in header][2:] == ["median latency", "tokens/s", "p10-p90", "n", "speedup against it"]
    assert rule and len({len(line) for line in report.table(value).splitlines()}) == 1
    assert cells["eager", "generate"] == ["187 ms", "342", "182-199 ms", "30", "12.8×"]
    assert cells["aropt (onnxruntime)", "generate"] == ["14.6 ms", "4,375", "14.3-15.2 ms", "30", "-"]
    assert cells["eager", "decode"][-1] == "-"
    assert cells["a\\|b c", "prefill"][0] == "3 us"
    benchmark = {name: value[name] for name in ("env", "bench", "speedup", "notes")}
    assert report.table(benchmark) == report.table(value), "aropt bench has no more than this"
    assert len(report.table({"notes": []}).splitlines()) == 2, "of a report from Python, which timed nothing"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1,234"),
        (41.23, "41.2"),
        (0.0123, "0.0123"),
        (1.5e-7, "1.5e-7"),
        (-2.5, "-2.50"),
        (3e12, "3.0e12"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert report.number(value) == text


# Reports drawn from the schema, their texts from the characters that HTML and tables treat as special, and from all.
TEXT = st.text("<>&\"'|{}%\n é漢", max_size=12) | st.text(max_size=12)
COUNT = st.integers(0, 10**13)
SIZE = st.floats(0, 1e300)
ANY = st.floats(allow_nan=True, allow_infinity=True) | st.none()
POSITIVE = st.floats(1e-300, 1e300)
CHANGE = st.fixed_dictionaries({"before": COUNT, "after": COUNT})
STATUS = st.sampled_from(["pass", "fail"])
FREE = st.dictionaries(TEXT, TEXT | ANY | st.booleans() | st.lists(TEXT, max_size=2) | st.just({}), max_size=3)


@st.composite
def samples(draw: st.DrawFn) -> dict[str, Any]:
    width, height = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    rows = st.lists(st.lists(st.integers(0, 16), min_size=width, max_size=width), min_size=height, max_size=height)
    kind, value = draw(st.sampled_from([("text", TEXT), ("image", rows)]))
    before, after = draw(value), draw(value)
    same = draw(st.booleans())
    return {"label": draw(TEXT), "before": before, "after": before if same else after, "same": same, "kind": kind}


def record(**fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(fields)


def some(values: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(values, max_size=3)


PASSES = record(
    name=TEXT,
    status=st.sampled_from(["applied", "skipped", "reverted"]),
    reason=TEXT,
    level=st.sampled_from(["bitwise", "rounding", "distribution", "lossy"]),
    options=FREE,
    seconds=SIZE,
    nodes=CHANGE,
    bytes=CHANGE,
    verify=st.dictionaries(TEXT, ANY, max_size=2),
    matches=some(TEXT),
    rejected=some(st.tuples(TEXT, TEXT)),
)
CASES = record(
    name=TEXT,
    kind=st.sampled_from(["greedy", "sampled", "ragged", "boundary"]),
    prompt=COUNT,
    tokens=COUNT,
    error=ANY,
    floor=ANY,
    ratio=ANY,
    ties=COUNT,
    status=STATUS,
)
BENCH = record(
    variant=TEXT,
    phase=st.sampled_from(["generate", "prefill", "decode"]),
    median=SIZE,
    p10=SIZE,
    p90=SIZE,
    n=st.integers(1, 10**6),
    unit=st.sampled_from(["s", "ms", "us", "tok/s"]),
)
REPORTS = record(
    schema_version=st.just(1),
    tool=record(name=TEXT, version=TEXT),
    env=st.just(demo()["env"]),
    model=FREE.map(lambda free: {**demo()["model"], "heldout": free}),
    target=TEXT,
    passes=some(PASSES),
    verify=record(
        status=STATUS,
        metrics=st.dictionaries(TEXT, ANY, min_size=1, max_size=3),
        cases=some(CASES),
        diverges=st.none() | record(module=TEXT, node=TEXT, op=TEXT, error=ANY),
    ),
    bench=some(BENCH),
    speedup=st.dictionaries(TEXT, POSITIVE, max_size=3),
    roofline=st.none() | record(variant=TEXT, bytes_per_step=COUNT, bandwidth_gb_s=POSITIVE, share=SIZE),
    samples=some(samples()),
    artifacts=some(record(path=TEXT, sha256=TEXT, bytes=COUNT)),
    notes=some(TEXT),
)


@settings(deadline=None, max_examples=20)
@given(REPORTS)
def test_any_valid_report_renders(value: dict[str, Any]) -> None:
    verify = value["verify"]
    if verify["diverges"] or any(row["status"] == "fail" for row in verify["cases"]):
        verify["status"] = "fail"
    page = render(value)
    inked = [s[side] for s in value["samples"] if s["kind"] == "image" for side in ("before", "after")]
    assert page.images == [sum(level > 0 for row in pixels for level in row) for pixels in inked]
    assert not re.search(r"\bnan\b|\binf\b", report.table(value).split("\n", 1)[0])
    assert len(report.table(value).splitlines()) == 2 + len({(row["phase"], row["variant"]) for row in value["bench"]})
