"""A draft model of the command line: the pass that takes it, in which forms it is tried, and what it may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from aropt.cli.options import Doing
from aropt.errors import UsageError
from aropt.frontend.facts import Source
from aropt.ir.program import Program
from aropt.loops.draft_model import WHERE, check
from aropt.loops.scheme import scheme_of
from aropt.passes.tree_draft import SOURCES
from aropt.pipeline.registry import inserted, make, parse, untold
from aropt.rewriting.contract import Pass

TREES = "tree-draft"
SHAPES = ("chain:3", "chain:5", "2x1x1", "grown:3x2:4", "grown:5x2:7")  # of the tree, the usual one first


def asked_drafts(do: Doing) -> list[str]:
    """The draft models that a command names, by --draft or as an option of the pass.

    Raises UsageError for --draft without the pass that takes it.
    """
    if do.draft and TREES in (do.no_pass or ()):
        raise UsageError(what=f"{do.draft} can't draft", where=f"--draft, --no-pass {TREES}",
                         why="the pass that takes a draft model is left out", hint="leave one of them out")  # fmt: skip
    told = [options.get("draft", "") for name, options in map(parse, do.passes or ()) if name == TREES]
    return [m for m in dict.fromkeys([do.draft or "", *told]) if m and (m == do.draft or m not in SOURCES)]


def with_draft(chosen: Sequence[Pass], draft: str, timed: bool) -> list[Pass]:
    """The passes with the draft model: where TREES is asked for, or where nothing will tell whether it pays.

    Raises UsageError where TREES is asked for with another one.
    """
    told = [p for p in chosen if p.name == TREES]
    other = next((d for p in told if (d := options(p)["draft"]) not in (draft, options(make(TREES))["draft"])), "")
    if other:
        raise UsageError(what=f"two draft models: {draft} and {other}", where=f"--draft, --pass {TREES}",
                         why="one of them drafts", hint=f"leave --draft out, or {TREES}:draft")  # fmt: skip
    if told:
        return [make(TREES, {**options(p), "draft": draft}) if p in told else p for p in chosen]
    return list(chosen) if timed else inserted(chosen, drafted(draft, SHAPES[0]))


def tries(do: Doing) -> list[list[Pass]]:
    """Passes that stay where they pay, each in several ways: with a draft model, trees of its drafts as well."""
    told = any(parse(text)[0] == TREES for text in do.passes or ())
    trees = [drafted(do.draft, shape) for shape in SHAPES] if do.draft and not told else []
    return untold(do.passes or (), do.no_pass or (), trees)


def drafted(draft: str, shape: str) -> Pass:
    return make(TREES, {"draft": draft, "shape": shape})


def options(one: Any) -> dict[str, str]:
    """A pass's options, as text."""
    return {f.name: str(getattr(one, f.name)) for f in dataclasses.fields(one)}


def check_draft(draft: str, program: Program, source: Source) -> None:
    """Raises UsageError for a draft model of a program that it can't draft for."""
    why = ""
    if not scheme_of(program).forced:
        why = "this model unmasks a canvas, and writes no ids one after the other"
    else:
        found, told = check(draft, program.meta), [bytes(range(32, 127)).decode(), "caf\u00e9 \u2713"]
        if source.texts and found.texts and any(source.texts.encode(t) != found.texts.encode(t) for t in told):
            why = "its tokenizer reads texts as other ids"
    if why:
        hint = "give a smaller model of the same family, or leave --draft out"
        raise UsageError(what=f"{draft} can't draft for {program.name}", where=WHERE, why=why, hint=hint)
