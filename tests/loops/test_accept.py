"""Acceptance rules against plain walks over the trees, against what they should draw, and as graphs."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from aropt.ir.program import Spec
from aropt.kernels import noise
from aropt.loops import accept
from aropt.loops.accept import COINS, REST, Accepted, Tree, acceptance, beside, match
from aropt.loops.rules import gumbel_noise
from tests.support.chances import VOCAB, chain, tree

ops.load_all()


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


def walked(given: Tree, row: int, accepted: Callable[[int], list[int]], otherwise: Callable[[int], int]) -> Any:
    """What a decoder finds that follows accepted children of one sequence: the first of the longest walks."""
    tokens, room, stop = given.tokens[row].tolist(), int(given.room[row]), given.stop.tolist()
    found: list[tuple[list[int], list[int]]] = []
    level: list[tuple[list[int], list[int]]] = [([0], [])]
    for path, ids in level if room else []:
        children = accepted(path[-1])
        found += [] if children else [(path, [*ids, otherwise(path[-1])])]
        for child in children:
            more = [*ids, tokens[child]]
            ends = more[-1] in stop or len(more) == room
            (found if ends else level).append((path if ends else [*path, child], more))  # type: ignore[arg-type]
    path, ids = min(found, key=lambda walk: (-len(walk[0]), walk[0][-1]), default=([0], []))
    return path[-1], path, ids, len(ids), bool(ids) and ids[-1] in stop


def children(given: Tree, row: int, node: int) -> list[int]:
    return [c for c in range(1, given.tokens.shape[1]) if given.parents[row, c] == node]


def deepest(given: Tree) -> int:
    return int(given.depth.max())


@settings(max_examples=200, deadline=None, derandomize=True)
@given(trees())
@example((tree([[-1, 0, 0, 2]], [[3, 1, 1, 2]], [-1], [5]), torch.tensor([[1, 0, 2, 0]])))  # alike: the second goes on
def test_match_is_a_walk(case: tuple[Tree, Tensor]) -> None:
    given, picks = case
    found = match(given, deepest(given), picks)
    for b, got in enumerate(rows(found)):
        after = picks[b].tolist()

        def accepted(node: int, b: int = b, after: list[int] = after) -> list[int]:
            return [c for c in children(given, b, node) if given.tokens[b, c] == after[node]]

        assert got == walked(given, b, accepted, after.__getitem__)
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


def offers(
    p: Tensor, q: Tensor, drafts: list[tuple[int, int]], coins: Tensor, ratio: Callable[..., float], replaced: bool
) -> tuple[list[int], Tensor]:
    """Of children (node, id) of a node the one that is accepted, and what is left of p."""
    for child, token in drafts:
        if coins[child] < ratio(p, q, token):
            return [child], p
        p = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
        if not replaced:
            q = q * (torch.arange(len(q)) != token)
            q = q / q.sum()
    return [], p


def divided(over: Tensor, under: Tensor) -> float:
    return float(over / under) if under > 0 else math.inf * (over > 0)


def offered_walks(given: Tree, values: dict[str, Any], replaced: bool, group: Callable[..., list[int]]) -> list[Any]:
    """What a decoder finds that offers one child after the other; `group`: ids that a draft's are weighed with."""
    found, nodes = [], given.tokens.shape[1]
    seed, streams, position = (values[n] for n in ("seed", "streams", "position"))
    coins = noise.reference(beside(seed, COINS), streams, position, nodes)
    for b in range(len(streams)):
        done: dict[int, tuple[list[int], Tensor]] = {}
        for node in range(nodes):
            p, q = (values[n][b, node].double().softmax(0) for n in ("logits", "drafted"))
            drafts = [(c, int(given.tokens[b, c])) for c in children(given, b, node)]

            def ratio(p: Tensor, q: Tensor, token: int, b: int = b, node: int = node) -> float:
                ids = group(values["logits"][b, node], p, token)
                return divided(p[ids].sum(), q[ids].sum()) if p[token] > 0 else 0

            done[node] = offers(p, q, drafts, coins[b], ratio, replaced)

        def drawn(node: int, b: int = b, done: dict[int, tuple[list[int], Tensor]] = done) -> int:
            one, depth = slice(b, b + 1), given.depth[b, node]
            chance = gumbel_noise(VOCAB, beside(seed, REST), streams[one], position[one] + depth)
            return int((done[node][1].log() - chance).argmax())

        found.append(walked(given, b, lambda node, done=done: done[node][0], drawn))  # type: ignore[misc]
    return found


def drawn_values(given: Tree, seed: int) -> dict[str, Any]:
    """Logits of target and draft at random, some ids impossible, and what noise is drawn for."""
    torch.manual_seed(seed)
    batch, nodes = given.tokens.shape
    logits, drafted = torch.randn(2, batch, nodes, VOCAB)
    logits = logits.masked_fill((torch.rand(logits.shape) < 0.2) & (torch.arange(VOCAB) > 0), -torch.inf)
    return {
        "logits": logits, "drafted": drafted, "seed": torch.tensor(seed), "streams": torch.arange(batch) + seed,
        "position": torch.randint(100, (batch,)),
    }  # fmt: skip


def bushes(seed: int, apart: bool) -> Tree:
    """Trees in which the root and the node after it have four children each, of different ids if `apart`."""
    torch.manual_seed(seed)
    parents, tokens = [], []
    for _ in range(30):
        parents.append([-1, 0, *torch.tensor([0, 0, 0, 1, 1, 1, 1])[torch.randperm(7)].tolist()])
        left = [(torch.randperm(VOCAB) if apart else torch.randint(VOCAB, (VOCAB,))).tolist() for _ in range(2)]
        tokens.append([0, *(left[parent].pop() for parent in parents[-1][1:])])
    return tree(parents, tokens, [-1 if seed % 2 else 3], [b % 3 + 1 for b in range(30)])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(trees(), st.integers(0, 999))
def test_rejection_of_any_tree(case: tuple[Tree, Tensor], seed: int) -> None:
    given, values = case[0], drawn_values(case[0], seed)
    found = accept.rejection(given, deepest(given), **values)
    assert rows(found) == offered_walks(given, values, True, lambda logits, p, token: [token])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("replaced", [True, False])
def test_rejection_offers_one_child_after_the_other(replaced: bool, seed: int) -> None:
    given = bushes(seed, not replaced)
    values = drawn_values(given, seed)
    found = accept.rejection(given, deepest(given), **values, replaced=replaced)
    assert rows(found) == offered_walks(given, values, replaced, lambda logits, p, token: [token])


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("known", [2, 4])
def test_groups_are_of_neighbours(ranks: int, known: int) -> None:
    given = bushes(ranks, apart=False)
    values = drawn_values(given, known)
    near, embeddings, distance = 0.3, torch.randn(known, 2), 2.0
    found = accept.grouped(
        given, deepest(given), **values, near=torch.tensor(near), embeddings=embeddings,
        distance=torch.tensor(distance), ranks=ranks,
    )  # fmt: skip

    def group(logits: Tensor, p: Tensor, token: int) -> list[int]:
        order = sorted(range(VOCAB), key=lambda i: (float(logits[i]), i))
        place = order.index(token)
        ids = [i for i in order[max(0, place - ranks) : place + ranks] if abs(p[i] - p[token]) < near]
        if max(order[max(0, place - ranks) : place + ranks]) >= known:
            return ids
        return [i for i in ids if ((embeddings[i] - embeddings[token]) ** 2).sum() < distance]

    assert rows(found) == offered_walks(given, values, True, group)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(trees(), st.integers(0, 999), st.sampled_from([0.05, 0.3]), st.sampled_from([0.1, 0.9]))
def test_typical_is_a_walk(case: tuple[Tree, Tensor], seed: int, epsilon: float, delta: float) -> None:
    (given, picks), logits = case, drawn_values(case[0], seed)["logits"]
    found = accept.typical(given, deepest(given), logits, picks, torch.tensor(epsilon), torch.tensor(delta))
    for b, got in enumerate(rows(found)):

        def accepted(node: int, b: int = b) -> list[int]:
            p = logits[b, node].double().softmax(0)
            bar = min(epsilon, delta * math.exp(-float(torch.special.entr(p).sum())))
            return [c for c in children(given, b, node) if p[given.tokens[b, c]] > bar]

        assert got == walked(given, b, accepted, picks[b].tolist().__getitem__)


def test_an_impossible_id_is_refused_whatever_the_coin() -> None:
    """The coin 0 and a draft that says that it never writes the id."""
    given = tree([[-1, 0, 0]], [[0, 1, 2]], [-1], [5])
    p, q = torch.tensor([[[0.0, 0.0, 1.0]] * 3]), torch.tensor([[[0.5, 0.0, 0.5]] * 3])
    goes_on, rest = accept.offered(given, p, q, torch.zeros(1, 3), accept.alone, 2, True)
    assert goes_on.tolist() == [[False, False, True]]
    assert rest[0, 0].tolist() == [0, 0, 1]
    first = accept.offered(given, p, q, torch.zeros(1, 3), accept.alone, 1, True)[0]
    assert not first.any(), "a child beyond the width is not offered"


def test_what_is_left_of_nothing_is_the_target() -> None:
    """Where p is q a child is refused by rounding, or by the chances of a group."""
    given, p = tree([[-1, 0]], [[0, 1]], [-1], [5]), torch.tensor([[[0.25, 0.5, 0.25]] * 2])
    goes_on, rest = accept.offered(given, p, p, torch.ones(1, 2), accept.alone, 1, True)
    assert not goes_on.any() and torch.equal(rest, p)


def inputs_of(inputs: dict[str, Spec], nodes: int, batch: int) -> dict[str, Tensor]:
    """Values for a rule's inputs, with a tree drawn at random."""
    torch.manual_seed(nodes + batch)
    parents = [[-1, *(int(torch.randint(0, i, ())) for i in range(1, nodes))] for _ in range(batch)]
    tokens = torch.randint(VOCAB, (batch, nodes)).tolist()
    values = tree(parents, tokens, [3, -1], [(b + 1) % 4 for b in range(batch)])._asdict()
    for name, spec in inputs.items():
        if name not in values:
            shape = [resolve(d, {"B": batch, "W": VOCAB + batch - 2, "E": 2}) for d in spec.dims]
            values[name] = torch.randint(VOCAB, shape) if spec.dtype is torch.int64 else torch.randn(shape)
            values[name] = values[name] if shape else values[name].abs()
    return {n: values[n] for n in inputs}


@pytest.mark.parametrize(
    ("name", "nodes", "options"),
    [
        ("match", 1, {}), ("match", 6, {}), ("typical", 6, {}), ("rejection", 1, {}),
        ("rejection", 6, {"width": 2, "replaced": False}), ("grouped", 6, {"width": 2, "ranks": 2}),
    ],
)  # fmt: skip
def test_as_a_graph_and_in_onnx(name: str, nodes: int, options: dict[str, Any], tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    function, inputs = acceptance(name, nodes, nodes - 1, VOCAB, **options)
    graph = capture_function("accept", function, inputs, list(Accepted._fields), "commit")
    export(graph, {}, tmp_path / "m.onnx")
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 2, 50):
        values = inputs_of(inputs, nodes, batch)
        wanted, captured = function(**values), graph.bind({})(*values.values())
        lowered = session.run(None, {n: v.numpy() for n, v in values.items()})
        for want, ours, theirs in zip(wanted, captured, lowered, strict=True):
            assert torch.equal(want, ours) and torch.equal(want, torch.from_numpy(theirs))
        assert batch < 50 or nodes == 1 or len(wanted[3].unique()) > 2
