"""What each pass changes in a small program, as text: one golden a pass, and no pass without one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aropt.ir.printer import diff
from aropt.ir.program import Program
from aropt.pipeline.registry import make, names, parse
from aropt.rewriting.contract import Applies, planned
from aropt.targets import find_target
from tests.support.programs import canvas, image, raster, text, written

LONGEST = 320  # lines that a reader can still read
GUIDED = ("guidance", "temperature")
Base = Callable[[], Program]
# {pass with its options: (the program, the passes before it)}
CASES: dict[str, tuple[Base, str]] = {
    "token-shuffle:blocks=0": (raster, ""),
    "canonicalize": (written, ""),
    "int8-linears:least=1,group=32": (written, "canonicalize"),
    "cfg-eliminate": (lambda: free(text(*GUIDED)), ""),
    "cfg-interval": (lambda: text("guidance-interval", "temperature"), ""),
    "cfg-batch": (lambda: text(*GUIDED), ""),
    "kv-cache": (text, ""),
    "prefix-cache": (canvas, ""),
    "dual-cache": (canvas, ""),
    "free-cache": (canvas, ""),
    "dkv-cache": (canvas, ""),
    "vicinity": (canvas, ""),
    "block-cache": (lambda: canvas(block=4), ""),
    "guide-cache": (lambda: canvas("guide-argmax", guided=True), ""),
    "token-shuffle-fusion": (image, "kv-cache"),
    "merge-linears": (written, "canonicalize kv-cache"),
    "fuse-attention": (written, "canonicalize kv-cache"),
    "ngram-draft": (text, "kv-cache"),
    "int8-draft:least=1,group=32": (written, "canonicalize kv-cache"),
    "tree-draft:draft=text,shape=chain:2": (text, "kv-cache"),
    "fuse-canvas": (lambda: canvas(block=4), "block-cache"),
    "fuse-tree": (written, "canonicalize kv-cache merge-linears tree-draft:draft=text,shape=chain:2"),
    "fuse-rules": (lambda: text("temperature", "top-k"), "kv-cache"),
    "fuse-sampler": (text, "kv-cache"),
    "prune": (text, "kv-cache fuse-sampler"),
}

ROWS = ("dkv-cache", "dual-cache", "free-cache", "prefix-cache", "vicinity")  # they differ in the rows they choose
SHOWN: dict[str, tuple[str, ...]] = dict.fromkeys(ROWS, ("rows",)) | {  # graphs, where all would be too long
    "block-cache": ("rows", "place"), "fuse-attention": ("step",), "fuse-sampler": ("step_greedy",),
    "prune": ("step_greedy",), "token-shuffle": ("model",), "int8-draft": (), "ngram-draft": ("draft",),
    "guide-cache": ("guide", "guide_rows"), "tree-draft": (), "fuse-tree": ("tree",),
    "cfg-interval": ("branch", "join", "part"),
}  # fmt: skip


def free(program: Program) -> Program:
    """The program, its weights said to need no guidance."""
    return program.replace(meta={**program.meta, "guidance_free": True})


def only(program: Program, shown: tuple[str, ...] | None) -> Program:
    """The program with these graphs alone."""
    kept = {n: g for n, g in program.graphs.items() if shown is None or n in shown}
    return program.replace(graphs=kept)


def passed(program: Program, name: str) -> Program:
    """The program after a pass, which must apply."""
    one = make(*parse(name))
    plan = planned(one, program, find_target("onnxruntime"))
    assert isinstance(plan, Applies), plan
    return one.run(program)


@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: chosen.partition(":")[0])
def test_golden(chosen: str, golden: Callable[[str], None]) -> None:
    base, earlier = CASES[chosen]
    program = base()
    for name in earlier.split():
        program = passed(program, name)
    shown = SHOWN.get(parse(chosen)[0])
    found = diff(*(only(one, shown) for one in (program, passed(program, chosen))))
    assert len(found.splitlines()) <= LONGEST
    golden(found)


def test_every_pass_has_a_golden() -> None:
    assert sorted(parse(chosen)[0] for chosen in CASES) == sorted(names())
