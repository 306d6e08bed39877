"""tree-draft on recurrent state: however many paths are taken into it, it is that of the plain loop."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import aropt
from aropt.ir.program import Program
from aropt.pipeline.registry import make
from tests.support import draft_models

pytest.importorskip("transformers", reason="needs aropt[hf]")
SLOW = pytest.mark.exhaustive


def program(shape: str, capacity: int) -> Program:
    """A Mamba-2 with drafts of its own, or with a cached step alone."""
    made = aropt.capture(draft_models.mamba2(), capacity=capacity)
    passes = [make("canonicalize"), make("kv-cache")]
    for one in [*passes, *([make("tree-draft", {"draft": "self", "shape": shape})] if shape else [])]:
        made = one.run(made)
    return made


def states(made: Program, new: int) -> dict[int, list[Tensor]]:
    """The recurrent state after each round, by how many new ids there are."""
    found: dict[int, list[Tensor]] = {}
    names = [n for n, s in made.state.items() if s.kind == "recurrent"]

    def keep(values: dict[str, Any]) -> None:
        count = int(values["counts"][0]) if "counts" in made.state else int(values["count"])
        found[count] = [values[n].double().clone() for n in names]

    aropt.generate(made, [[5, 6, 7]], new, plain=True, temperature=1.0, seed=1, on_round=keep)
    return found


@pytest.mark.parametrize(("shape", "new"), [("2x1x1", 240), pytest.param("2x1x1", 1200, marks=SLOW),
                                            pytest.param("chain:5", 1200, marks=SLOW)])  # fmt: skip
def test_it_does_not_drift(shape: str, new: int) -> None:
    """Sums in another order round otherwise; what a round adds fades as the state itself does."""
    plain, fast = states(program("", new + 8), new), states(program(shape, new + 8), new)
    assert set(fast) < set(plain) and len(fast) < new / 2
    errors = {n: max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(fast[n], plain[n])) for n in fast}
    early, late = (max(e for n, e in errors.items() if (n > new / 2) is side) for side in (False, True))
    assert 0 < late <= 4 * early and late < 1e-5
