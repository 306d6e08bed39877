"""Rounds that check drafts on recurrent state: what was rejected leaves no trace in it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

import aropt
from aropt.ir.program import Graph, Program
from aropt.pipeline.registry import make
from aropt.restrict.all_rows import wide
from aropt.restrict.stash import COUNTS, stashed
from tests.support.run import generate
from tests.support.sweep import RECURRENT, build

pytest.importorskip("transformers", reason="needs aropt[hf]")
BASE = ("canonicalize", "kv-cache")


def program(name: str, *passes: str) -> tuple[Program, dict[str, str], str]:
    """The model after kv-cache and these passes; their statuses; whether it was verified."""
    chosen = [make(n) for n in (*BASE, *passes)]
    made = aropt.optimize(aropt.capture(build(name), capacity=40), target="eager", passes=chosen)
    return made.program, {p["name"]: p["status"] for p in made.report["passes"]}, made.report["verify"]["status"]


@pytest.mark.exhaustive  # test_mixers has one that is quick
@pytest.mark.parametrize("name", RECURRENT)
def test_drafts_change_no_token(name: str) -> None:
    """Greedy ids with drafts are those without, whether drafts are mostly right or mostly wrong."""
    plain, _, _ = program(name)
    drafted, statuses, verified = program(name, "ngram-draft")
    assert statuses["ngram-draft"] == "applied" and verified == "pass"
    for prompt in ([5, 6, 7, 5, 6, 7, 5, 6, 7], [9], [3, 3, 3, 3]):
        assert list(map(list, generate(plain, [prompt], 20))) == list(map(list, generate(drafted, [prompt], 20)))


def outputs(graph: Graph, weights: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        results = graph.bind(dict(weights))(*(given[name] for name in graph.inputs))
    return dict(zip(graph.outputs, results, strict=True))


@pytest.mark.parametrize("name", ["mamba", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("kimi_linear",))])
def test_replay_is_the_step_on_the_rows_that_count(name: str) -> None:
    """For each number of accepted rows; and a row more changes the state."""
    made, _, _ = program(name)
    graph = wide(next(g for g in made.graphs.values() if g.role == "forward"), made.weights)
    assert graph is not None
    names = [n for n in graph.outputs if n in made.state and made.state[n].kind == "recurrent"]
    found = stashed(graph, names, made.weights)
    assert found is not None
    check, replay = found
    assert not set(names) & set(check.outputs) and set(replay.outputs) == set(names)
    generator, rows = torch.Generator().manual_seed(0), 5
    given = {n: s.create({"B": 1, "S": 16}) for n, s in made.state.items() if n in graph.inputs}
    for n in names:
        given[n] = torch.rand(given[n].shape, generator=generator)
    ids = torch.randint(4, 90, (1, rows), generator=generator)

    def fed(count: int) -> dict[str, Tensor]:
        at = torch.arange(count)
        return {**given, "ids": ids[:, :count], "slots": at + 3, "positions": at[None] + 3}

    stash = outputs(check, made.weights, fed(rows))
    for accepted in range(1, rows + 1):
        want = outputs(graph, made.weights, fed(accepted))
        counts = torch.where(torch.arange(rows) < accepted, 0, -1)[None]
        got = outputs(replay, made.weights, {**given, **stash, COUNTS: counts})
        for n in names:
            torch.testing.assert_close(got[n], want[n], rtol=1e-4, atol=1e-5)
        if accepted < rows:
            more = outputs(replay, made.weights, {**given, **stash, COUNTS: torch.zeros(1, rows, dtype=torch.int64)})
            assert not any(torch.allclose(more[n], want[n], rtol=1e-4, atol=1e-5) for n in names)
