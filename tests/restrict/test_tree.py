"""A step for the nodes of a token tree: each node is computed as the last row of its path, and a path can be kept."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import aropt
from aropt.ir.program import Graph, Program
from aropt.pipeline.registry import make
from aropt.restrict.all_rows import wide
from aropt.rewriting.tree import Nodes, forms
from tests.support.sweep import RECURRENT, build

pytest.importorskip("transformers", reason="needs aropt[hf]")
CAPACITY = 40
QUICK = ("llama", "gemma2", "bamba", "mamba")
OTHERS = ("gpt2", "bloom", *(name for name in RECURRENT if name not in QUICK))
NAMES = [*QUICK, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS)]
PROGRAMS: dict[str, Program] = {}


def program(name: str) -> Program:
    if name not in PROGRAMS:
        passes = [make("canonicalize"), make("kv-cache")]
        PROGRAMS[name] = aropt.optimize(
            aropt.capture(build(name), capacity=CAPACITY), target="eager", passes=passes
        ).program
    return PROGRAMS[name]


def outputs(graph: Graph, weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        results = graph.bind(dict(weights))(*(values[name] for name in graph.inputs))
    return dict(zip(graph.outputs, results, strict=True))


@st.composite
def parents(draw: st.DrawFn) -> list[int]:
    """Of 1 to 9 nodes, the root first; a third of them are chains."""
    count = draw(st.integers(1, 9))
    if draw(st.integers(0, 2)) == 0:
        return list(range(-1, count - 1))
    return [-1, *(draw(st.integers(0, i - 1)) for i in range(1, count))]


def path_to(node: int, above: list[int]) -> list[int]:
    return [*path_to(above[node], above), node] if node >= 0 else []


def pairs_of(above: list[int]) -> Tensor:
    found = torch.zeros(len(above), len(above), dtype=torch.bool)
    for node in range(len(above)):
        found[node, path_to(node, above)] = True
    return found


@pytest.mark.parametrize("name", NAMES)
@given(above=parents(), seed=st.integers(0, 2**20), pads=st.integers(0, 2), known=st.booleans())
@settings(
    max_examples=4, phases=[Phase.generate], deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_a_node_is_the_last_row_of_its_path(name: str, above: list[int], seed: int, pads: int, known: bool) -> None:
    """In a batch of two prompts, one of them padded; then a path of each sequence is kept.

    `known`: the tree is a constant of the graphs.
    """
    made = program(name)
    step = next(g for g in made.graphs.values() if g.role == "forward")
    chain = above == list(range(-1, len(above) - 1))  # one of two forms, the simpler one where it will do
    weights, n = dict(made.weights), len(above)
    longest = max(range(n), key=lambda i: len(path_to(i, above)))
    sizes = (n, len(path_to(longest, above))) if known else ("R", "P")
    nodes = Nodes(*sizes, chain, pairs_of(above) if known and not chain else None)
    verify, both = wide(step, weights), forms(step, weights, nodes)
    assert verify is not None
    generator, size = torch.Generator().manual_seed(seed), 5
    prompt = torch.randint(4, 90, (2, size), generator=generator)
    ids = torch.randint(4, 90, (2, n), generator=generator)
    values = {name: s.create({"B": 2, "S": 24}) for name, s in made.state.items() if name in step.inputs}
    padding = torch.tensor([0, pads])
    at = torch.arange(size)
    positions = (at - padding[:, None]).clamp(min=-1)
    values |= outputs(step, weights, values | {"ids": prompt, "slots": at, "positions": positions})
    before = {k: v.clone() for k, v in values.items()}
    depth = torch.tensor([len(path_to(i, above)) - 1 for i in range(n)])
    fed = {"ids": ids, "positions": size - padding[:, None] + depth, "pairs": pairs_of(above).expand(2, n, n)}
    got = outputs(both.tree, weights, values | fed)
    assert all(torch.equal(before[k], values[k]) for k in before)  # nothing is written
    paths, after = [path_to(longest, above), path_to(n - 1, above)], []
    for node in range(n):
        path = path_to(node, above)
        slots = size + torch.arange(len(path))
        run = {"ids": ids[:, path], "slots": slots, "positions": slots - padding[:, None]}
        want = outputs(step, weights, values | run)
        torch.testing.assert_close(got["logits"][:, node], want["logits"][:, -1], rtol=1e-4, atol=1e-4)
        after.append(want)
    if chain:
        paths = [list(range(n)), list(range(max(1, n - 2)))]
    kept = torch.full((2, len(paths[0])), -1)
    for i, path in enumerate(paths):
        kept[i, : len(path)] = torch.tensor(path)
    start = torch.tensor([size, size])
    given = values | got | fed | {"path": kept, "start": start, "origin": start - padding}
    state = outputs(both.settle, weights, given)
    for i, path in enumerate(paths):  # what comes next sees the path and nothing else
        run = {"ids": prompt[:, :2], "slots": size + len(path) + torch.arange(2)}
        run["positions"] = run["slots"] - padding[:, None]
        got_next = outputs(step, weights, values | state | run)["logits"][i]
        want_next = outputs(step, weights, values | after[path[-1]] | run)["logits"][i]
        torch.testing.assert_close(got_next, want_next, rtol=1e-4, atol=1e-4)
