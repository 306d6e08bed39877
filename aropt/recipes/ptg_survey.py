"""A survey of parallel text generation (Zhang et al. 2025, 2508.08712): who drafts, and which families aropt has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from aropt.bench.drafted import counted, unchecked
from aropt.bench.ratios import over
from aropt.loops.scheme import MODULES
from aropt.models import load, text
from aropt.pipeline.registry import known
from aropt.recipes import Recipe, Row, Say

MODEL, DRAFT = "text-ar", "text-ar-draft"
PLAIN, SHAPE = "none", "chain:5"
DRAFTERS = {
    "a model of one layer": f"tree-draft:draft={DRAFT},shape={SHAPE}",
    "the text itself": f"tree-draft:draft=text,shape={SHAPE}",
    "the model with weights of eight bits": f"tree-draft:draft=self,shape={SHAPE}",
}
PROMPTS, PROMPT, NEW = 16, 64, 200


@dataclass(frozen=True)
class Family:
    """A family of the survey, and what aropt has of it: passes, kinds of loops, and what is missing."""

    name: str
    passes: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()
    lacking: str = ""


FAMILIES = (
    Family("draft and verify", ("tree-draft", "int8-draft", "ngram-draft", "guide-cache")),
    Family("decomposition and fill", lacking="no loop writes parts of an answer apart from each other"),
    Family(
        "multiple token prediction",
        ("token-shuffle", "token-shuffle-fusion"),
        lacking="of images alone: windows of ids",
    ),
    Family("one-shot", (), ("unmask",), "a canvas of given length in one round; nothing predicts the length"),
    Family("masked", ("block-cache", "prefix-cache", "dual-cache", "free-cache", "dkv-cache", "vicinity"), ("unmask",)),
    Family("edit-based", (), ("unmask",), "ids are written again (rules rcr, remask); none is put in or taken out"),
)


def check(say: Say, quick: bool) -> Iterator[Row]:
    """Ids a verification by each drafter, and which families have a pass or a loop that is there."""
    import aropt

    program, made = aropt.capture(MODEL), {}
    for way, chosen in {PLAIN: "", **DRAFTERS}.items():
        say(f"drafts by {way}: optimizing")
        made[way] = unchecked(program, [chosen] if chosen else [])
    prompts, rows = text.heldout(4 if quick else PROMPTS, PROMPT), []
    for row in counted(made, load(MODEL), prompts, NEW):
        rows.append(row)
        say(f"generating, {len(rows)} of {len(prompts)} prompts")
    for way in DRAFTERS:
        ids = over([(NEW - 1, row["checks"][way]) for row in rows])
        ties = sum(row["differs"][way] is not None for row in rows)
        yield Row(
            f"drafts by {way}, a chain of 5, give the ids of plain greedy decoding in fewer forwards",
            f"{ids['all']:.2f} ids a verification (95 %: {ids['low']:.2f} to {ids['high']:.2f}); all {NEW} ids of each"
            f" answer are the same" + (f", but for {ties} ties of logits" if ties else ""),
            len(rows), "prompts", ids["low"] > 1,
        )  # fmt: skip
    yield coverage()


def coverage() -> Row:
    """Which families aropt has something of, and that this is there."""
    said = []
    for family in FAMILIES:
        has = ", ".join((*family.passes, *(f"the loop {kind}" for kind in family.loops))) or "nothing"
        said.append(f"{family.name}: {has}" + (f" ({family.lacking})" if family.lacking else ""))
    there = {name for family in FAMILIES for name in family.passes} <= known().keys()
    kinds = {kind for family in FAMILIES for kind in family.loops} <= MODULES.keys()
    return Row("of each family there is", "; ".join(said), len(FAMILIES), "families", there and kinds)


RECIPE = Recipe(
    title="parallel text generation, a survey",
    paper="Zhang et al. 2025, 2508.08712",
    runs="aropt compiles the part of it that is drafting and verifying; the table says what it has of the others",
    proxy="text-ar (1.7 million parameters) on held-out text of the Python distribution.",
    check=check,
)
