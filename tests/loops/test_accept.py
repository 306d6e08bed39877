"""Acceptance rules against plain walks over the trees, against what they should draw, and as graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aropt.exporters.onnx import export
from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.dims import resolve
from aropt.loops.accept import ACCEPT, Accepted, Tree, acceptance, match

ops.load_all()
VOCAB = 4


def tree(parents: list[list[int]], tokens: list[list[int]], stop: list[int], room: list[int]) -> Tree:
    """The tree of these parents: pairs and depth follow from them."""
    batch, nodes = len(parents), len(parents[0])
    pairs, depth = torch.eye(nodes, dtype=torch.bool).repeat(batch, 1, 1), torch.zeros(batch, nodes, dtype=torch.int64)
    for b, row in enumerate(parents):
        for i, parent in enumerate(row):
            if parent >= 0:
                pairs[b, i] |= pairs[b, parent]
                depth[b, i] = depth[b, parent] + 1
    return Tree(
        torch.tensor(tokens), torch.tensor(parents), pairs, depth, torch.tensor(stop, dtype=torch.int64),
        torch.tensor(room),
    )  # fmt: skip


def chain(drafts: int) -> list[int]:
    return list(range(-1, drafts))


@st.composite
def trees(draw: st.DrawFn, batch: int = 3) -> tuple[Tree, Tensor]:
    """Trees of one size, some with padding and with siblings that are alike, and picks that often hit."""
    nodes, ids = draw(st.integers(1, 9)), st.integers(0, draw(st.integers(1, VOCAB)) - 1)
    parents = [[-1, *(draw(st.integers(-1 if i > 3 else 0, i - 1)) for i in range(1, nodes))] for _ in range(batch)]
    tokens, picks = [
        [draw(st.lists(ids, min_size=nodes, max_size=nodes)) for _ in range(batch)] for _ in range(2)
    ]  # fmt: skip
    stop = draw(st.lists(st.integers(-1, VOCAB - 1), min_size=1, max_size=2))
    room = draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch))
    return tree(parents, tokens, stop, room), torch.tensor(picks)


def rows(found: Accepted) -> list[tuple[Any, ...]]:
    """The results by sequence, lists without what comes after their end."""
    lists = [[[x for x in row if x >= 0] for row in part.tolist()] for part in (found.path, found.emitted)]
    return list(zip(found.leaf.tolist(), *lists, found.taken.tolist(), found.ended.tolist(), strict=True))


def walked(given: Tree, picks: Tensor, row: int) -> tuple[Any, ...]:
    """What a decoder that follows the picks of one sequence finds: the first of the longest walks."""
    tokens, parents, room = given.tokens[row].tolist(), given.parents[row].tolist(), int(given.room[row])
    found: list[tuple[list[int], list[int]]] = []
    level: list[tuple[list[int], list[int]]] = [([0], [])]
    while level and room:
        found, level = [(path, [*ids, int(picks[row, path[-1]])]) for path, ids in level], []
        for path, ids in found:
            if len(ids) < room and ids[-1] not in given.stop.tolist():
                children = [c for c in range(1, len(tokens)) if parents[c] == path[-1] and tokens[c] == ids[-1]]
                level += [([*path, c], ids) for c in children]
    path, ids = min(found, key=lambda walk: walk[0][-1]) if found else ([0], [])
    return path[-1], path, ids, len(ids), bool(ids) and ids[-1] in given.stop.tolist()


def deepest(given: Tree) -> int:
    return int(given.depth.max())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees())
@example((tree([[-1, 0, 0, 2]], [[3, 1, 1, 2]], [-1], [5]), torch.tensor([[1, 0, 2, 0]])))  # alike: the second goes on
def test_match_is_a_walk(case: tuple[Tree, Tensor]) -> None:
    given, picks = case
    found = match(given, deepest(given), picks)
    assert rows(found) == [walked(given, picks, b) for b in range(len(picks))]
    for part in (found.path, found.emitted):  # nothing comes after a -1
        assert ((part[:, 1:] < 0) | (part[:, :-1] >= 0)).all()


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 7), st.integers(1, 9), st.integers(0, 8))
def test_a_chain_of_right_drafts_counts_up_to_the_room(drafts: int, room: int, wrong: int) -> None:
    """Ids 1, 2, ... are right; the draft of index `wrong` is not."""
    tokens = list(range(drafts + 1))
    if wrong < drafts:
        tokens[wrong + 1] = 0
    given = tree([chain(drafts)], [tokens], [-1], [room])
    found = match(given, drafts, torch.arange(1, drafts + 2).unsqueeze(0))
    taken = min(drafts + 1, wrong + 1, room)
    assert rows(found) == [(taken - 1, list(range(taken)), list(range(1, taken + 1)), taken, False)]


def test_one_id_comes_where_no_draft_is_right() -> None:
    given = tree([[-1, 0, 0, 1, 2]] * 2, [[0, 1, 2, 1, 1]] * 2, [-1], [5, 1])
    found = match(given, 2, torch.full((2, 5), 3))
    assert rows(found) == [(0, [0], [3], 1, False)] * 2


def test_a_stop_id_in_a_tree_ends_the_text() -> None:
    """Its draft is right, and so is the one after it, but neither row counts: nothing comes after a stop id."""
    given = tree([[-1, 0, 1, 2]] * 3, [[0, 1, 2, 3]] * 3, [2, -1], [4, 1, 0])
    found = match(given, 3, torch.tensor([[1, 2, 3, 1]] * 3))
    assert rows(found) == [(1, [0, 1], [1, 2], 2, True), (0, [0], [1], 1, False), (0, [0], [], 0, False)]


def test_padding_is_never_accepted() -> None:
    given = tree([[-1, 0, -1, 2]], [[0, 2, 1, 1]], [-1], [5])
    assert rows(match(given, 2, torch.tensor([[1, 1, 1, 1]]))) == [(0, [0], [1], 1, False)]


def inputs_of(name: str, nodes: int, longest: int, batch: int) -> dict[str, Tensor]:
    """Values for a rule's inputs: a tree drawn at random."""
    torch.manual_seed(nodes + batch)
    parents = [[-1, *(int(torch.randint(max(0, i - longest), i, ())) for i in range(1, nodes))] for _ in range(batch)]
    tokens = torch.randint(VOCAB, (batch, nodes)).tolist()
    given = tree(parents, tokens, [3, -1], [b % 4 for b in range(batch)])._asdict()
    for key, spec in acceptance(name, nodes, longest, VOCAB)[1].items():
        shape = [resolve(d, {"B": batch}) for d in spec.dims if d != "K"]
        if key not in given:
            given[key] = torch.randint(VOCAB, shape) if spec.dtype is torch.int64 else torch.randn(shape)
    return given


@pytest.mark.parametrize("name", ACCEPT)
def test_as_a_graph_and_in_onnx(name: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    for nodes in (1, 6):
        function, inputs = acceptance(name, nodes, nodes - 1, VOCAB)
        graph = capture_function("accept", function, inputs, list(Accepted._fields), "commit")
        export(graph, {}, tmp_path / "m.onnx")
        session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
        for batch in (1, 5):
            values = inputs_of(name, nodes, nodes - 1, batch)
            values = {n: values[n] for n in inputs}
            wanted = function(**values)
            captured = graph.bind({})(*values.values())
            lowered = session.run(None, {n: v.numpy() for n, v in values.items()})
            for want, ours, theirs in zip(wanted, captured, lowered, strict=True):
                assert torch.equal(want, ours) and torch.equal(want, torch.from_numpy(theirs))
