"""Trees that grow by the drafter's chances: which nodes are checked, and that the ids are those of the plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aropt.errors import UsageError
from aropt.ir.control import Call
from aropt.ir.program import Graph, Spec
from aropt.loops.drafters import Ranked
from aropt.loops.grown import NEVER, SURE, Grown, growing, shaped
from aropt.loops.rules import chosen, rule
from aropt.loops.trees import Made
from aropt.pipeline.registry import make

VOCAB = 11
SHAPES = ["grown:1x2:2", "grown:3x2:4", "grown:3x3:9", "grown:4x3:5"]


@cache
def graphs(text: str, root: bool, sampled: bool) -> tuple[list[Call], dict[str, Graph], dict[str, Tensor]]:
    """The calls that draft and choose."""
    shape, _ = shaped(text)
    assert isinstance(shape, Grown)
    made = Made({}, {}, VOCAB, 64)
    function = partial(rule, chosen(()), VOCAB, sampled)
    ranked = Ranked(
        Call("rule", {}, {}), lambda best: function(best=best), partial(function, chances=True), drawn=sampled
    )
    growth = growing(made, shape, ranked)
    calls = [growth.children(0, root)]
    for depth in range(1, shape.steps):
        calls += [growth.rows(depth, root), growth.children(depth, root)]
    return [*calls, *growth.last], made.graphs, made.weights


def grown(text: str, root: bool, sampled: bool, table: Tensor, batch: int) -> dict[str, Tensor]:
    """What a round drafts if the logits after a node are table[batch, depth, id]."""
    values: dict[str, Tensor] = {
        "window": torch.tensor([[2] + [-1] * shaped(text)[0].deepest] * batch), "origin": torch.arange(batch) + 3,
        "live": torch.ones(batch, dtype=torch.bool), "temperature": torch.tensor(1.0), "seed": torch.tensor(5),
        "streams": torch.arange(batch), "draft_logits": table[:, 0, 2].unsqueeze(1),
    }  # fmt: skip
    calls, made, weights = graphs(text, root, sampled)
    for call in calls:
        graph = made[call.graph]
        found = run(graph, weights, [values[call.reads[n]] for n in graph.inputs])
        values |= {call.writes[n]: value for n, value in zip(graph.outputs, found, strict=True)}
        if "draft_ids" in graph.outputs:
            depth = values["draft_positions"] - values["origin"].unsqueeze(1)
            values["draft_logits"] = table[torch.arange(batch).unsqueeze(1), depth, values["draft_ids"]]
    return values


def run(graph: Graph, weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    module = torch.nn.Module()
    for name in graph.weights():
        at = module
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                setattr(at, part, torch.nn.Module())
            at = getattr(at, part)
        setattr(at, last, weights[name])
    found: Sequence[Tensor] = torch.fx.GraphModule(module, graph.fx)(*inputs)
    return found


def naive(shape: Grown, logits: Tensor) -> list[tuple[tuple[int, ...], float]]:
    """The paths that are checked, level by level, and their chances: one node after the other."""
    level: list[tuple[tuple[int, ...], float]] = [((2,), 0.0)]
    drafts = []
    for depth in range(shape.steps):
        below = []
        for path, chance in level:
            each = logits[depth, path[-1]].log_softmax(0).topk(shape.width)
            for value, token in zip(each.values.tolist(), each.indices.tolist(), strict=True):
                below.append(((*path, token), chance + min(max(value, NEVER), SURE)))
        level = sorted(below, key=lambda one: -one[1])[: shape.width]
        drafts += level
    kept = sorted(drafts, key=lambda one: -one[1])[: shape.drafts]
    return sorted(kept, key=lambda one: len(one[0]))


@pytest.mark.parametrize("text", SHAPES)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from([0.5, 2.0]))
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_the_likeliest_nodes_are_checked(text: str, seed: int, root: bool, sampled: bool, scale: float) -> None:
    shape, batch = Grown.parse(text), 2
    table = torch.randn(batch, shape.steps + 1, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale
    found = grown(text, root, sampled, table, batch)
    for b in range(batch):
        logits = table[b].clone()
        for depth in range(shape.steps if sampled else 0):  # the rule ranks ids by the noise of their place
            place = torch.tensor([3 + b + depth + 1])
            noise = torch.ops.aropt.noise(torch.tensor(5), torch.tensor([b]), place, VOCAB)
            logits[depth] -= torch.log(-torch.log(noise))
        wanted = naive(shape, logits)
        ids = [2, *found["drafts"][b].tolist()]
        paths = [tuple(ids[node] for node in row.nonzero().flatten().tolist()) for row in found["pairs"][b]]
        assert set(paths[1:]) == {path for path, _ in wanted} and len(paths) == shape.drafts + 1


@pytest.mark.parametrize("scale", [1.0, 40.0, 1e4])
@pytest.mark.parametrize("text", SHAPES[1:])
def test_it_is_a_tree_whatever_the_chances(text: str, scale: float) -> None:
    """Where a drafter is certain, a path is worth less than a shorter one; ids that never come are worth least."""
    shape, batch = Grown.parse(text), 8
    table = torch.randn(batch, shape.steps + 1, VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * scale
    table[:, :, :, 3] = -torch.inf
    found = grown(text, False, False, table, batch)
    parents, depth, pairs = found["parents"], found["depth"], found["pairs"]
    assert (parents[:, 0] == -1).all() and (depth[:, 0] == 0).all() and pairs[:, :, 0].all()
    for b in range(batch):
        for node in range(1, shape.nodes):
            above = int(parents[b, node])
            assert 0 <= above < node and depth[b, node] == depth[b, above] + 1
            assert (pairs[b, node] == (pairs[b, above] | (torch.arange(shape.nodes) == node))).all()
    assert int(depth.max()) <= shape.steps


def test_nothing_is_known_of_it_beforehand() -> None:
    shape, _ = shaped("grown:4x3:8")
    assert not shape.tables() and not shape.chain and shape.checked.pairs is None
    assert (shape.nodes, shape.deepest, shape.widest) == (9, 4, 3)
    assert [shape.rows(range(d)).rows for d in (1, 2, 4)] == [1, 4, 10] and shape.rows(range(1)).chain
    assert shape.offered == {"drafts": Spec(torch.int64, ("B", 8))}


WRONG = [
    ("grown:3", "is no tree"), ("grown:3x2", "is no tree"), ("grown:axb:2", "is no tree"), ("grown:0x2:1", "0 levels"),
    ("grown:3x2:2", "no tree of that depth"), ("grown:3x2:7", "no tree of that depth"), ("grown:16x4:20", "63"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "why"), WRONG)
def test_trees_that_are_none(text: str, why: str) -> None:
    with pytest.raises(UsageError, match=why) as caught:
        make("tree-draft", {"shape": text})
    assert "grown:4x3:8" in str(caught.value.hint)


@pytest.mark.parametrize("options", [{"accept": "rejection"}, {"accept": "grouped"}, {"draft": "text"}])
def test_what_takes_no_grown_tree(options: dict[str, Any]) -> None:
    """Its drafts are the best ids and no draws; and a text says one thing alone."""
    with pytest.raises(UsageError, match=r"draws|chains"):
        make("tree-draft", {"shape": "grown:3x2:4", **options})
    make("tree-draft", {"shape": "grown:3x2:4", "accept": "typical"})
