"""Programs of five ids whose drafts are accepted by each rule, and slips of rejection that tests have to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import aropt
from aropt.ir.program import Program
from aropt.ir.verify import verify
from aropt.loops import accept, drafters
from aropt.loops.accept import ACCEPT, COINS, Accepted, Tree
from aropt.loops.rules import chosen
from aropt.pipeline.registry import make
from aropt.rewriting.contract import Pass
from tests.support import draft_models

FILE, OFFERED = Path(draft_models.__file__), accept.offered


@cache
def captured() -> Program:
    return aropt.capture(draft_models.few(), capacity=24)


def passes(rule: str, shape: str, draft: str, most: int = 100_000) -> list[Pass]:
    """Those that give the program drafts, for batches of so many sequences."""
    named = f"{FILE}:{draft}" if hasattr(draft_models, draft) else draft
    options = {"draft": named, "shape": shape, "accept": rule, "most": str(most)}
    return [make("canonicalize"), make("kv-cache"), make("tree-draft", options)]


@cache
def drafted(rule: str, shape: str, draft: str = "few_draft") -> Program:
    """The program with a tree of drafts; nothing is lowered."""
    program = captured()
    for one in passes(rule, shape, draft):
        program = one.run(program)
    verify(program)
    return program


def another(tree: Tree, deepest: int, drafted: Tensor, **given: Any) -> Accepted:
    return accept.rejection(tree, deepest, drafted=drafted.roll(1, 2), **given)


def believed(tree: Tree, deepest: int, logits: Tensor, drafted: Tensor, **given: Any) -> Accepted:
    return accept.rejection(tree, deepest, drafted, drafted, **given)


def unreduced(*given: Any) -> Any:
    return OFFERED(*given)[0], given[1]


SLIPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "drafts of other chances": lambda m: m.setitem(ACCEPT, "rejection", replace(ACCEPT["rejection"], apply=another)),
    "drafts are believed": lambda m: m.setitem(ACCEPT, "rejection", replace(ACCEPT["rejection"], apply=believed)),
    "nothing is taken away": lambda m: m.setattr(accept, "offered", unreduced),
    "drafts by the noise of coins": lambda m: m.setattr(drafters, "DRAFTS", COINS),
    "top-k is forgotten": lambda m: m.setattr(drafters, "chosen", lambda names: chosen(("temperature",))),
}


def slipped(slip: str, monkeypatch: pytest.MonkeyPatch) -> Program:
    """A program of rejection with a slip."""
    SLIPS[slip](monkeypatch)
    return drafted.__wrapped__("rejection", "chain:2")  # not to be kept
