"""Acceptance rules against plain walks over the trees, against what they should draw, and as graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from aropt.loops.accept import ACCEPT, COINS, DRAFTS, REST, Accepted, Tree, acceptance, beside, match
from aropt.loops.rules import draw, gumbel_noise

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


# ids that depend on the one before; id 3 ends a text
TARGET = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.15, 0.45, 0.0, 0.4], [0.05, 0.35, 0.4, 0.2], [0.25] * 4])
DRAFT = torch.tensor([[0.2, 0.1, 0.3, 0.4], [0.3, 0.2, 0.4, 0.1], [0.6, 0.3, 0.1, 0.0], [0.25] * 4])
STOP, LENGTH = 3, 4
SHAPES = {"chain": chain(3), "forks": [-1, 0, 0, 1, 1, 2], "wide": [-1, 0, 0, 0]}  # parents
LOSSY = {
    "epsilon": torch.tensor(0.09), "delta": torch.tensor(0.3), "near": torch.tensor(0.15),
    "embeddings": torch.zeros(1, 1), "distance": torch.tensor(0.5),
}  # fmt: skip
Text = tuple[int, ...]


def chances() -> dict[Text, float]:
    """The chance of each text that begins after id 0; -1 after its end."""
    found = {}
    for ids in itertools.product(range(VOCAB), repeat=LENGTH):
        end = ids.index(STOP) + 1 if STOP in ids else LENGTH
        if not any(ids[end:]):
            steps = zip((0, *ids), ids[:end])
            found[(*ids[:end], *[-1] * (LENGTH - end))] = math.prod(float(TARGET[a, b]) for a, b in steps)
    return found


@dataclass(frozen=True)
class Run:
    """Many texts, each of a noise stream of its own."""

    rule: str
    shape: str
    drafts: str = "iid"  # how children are drawn: iid, apart (without replacement), top (the likeliest)
    said: str = "so"  # what is said of the draft: so, or another one, or drawn in another way
    warmth: float = 1.0  # of the target's picks
    count: int = 20_000
    seed: int = 11

    def __str__(self) -> str:
        said = self.said if self.warmth == 1 else "warmer"
        return f"{self.rule}-{self.shape}-{self.drafts}-{said}-{self.count}-{self.seed}"

    def noise(self, places: Tensor, use: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        return beside(torch.tensor(self.seed), use), torch.arange(self.count), places

    def drafted(self, before: Tensor, rank: int, places: Tensor) -> Tensor:
        """The child of that rank of nodes with these ids."""
        scores = DRAFT.log()[before]
        if self.drafts == "iid":
            return draw(scores, *self.noise(places, DRAFTS + rank))
        scores = scores if self.drafts == "top" else scores - gumbel_noise(VOCAB, *self.noise(places, DRAFTS))
        return scores.topk(rank + 1).indices[:, rank]

    def picks(self, before: Tensor, places: Tensor) -> Tensor:
        """What the target draws after ids, all of them [B]."""
        return draw(TARGET.log()[before] / self.warmth, *self.noise(places))

    def round(self, newest: Tensor, count: Tensor) -> Accepted:
        """One round after `count` [B] ids."""
        parents = SHAPES[self.shape]
        shape, ids = tree([parents], [parents], [STOP], [0]), [newest]
        depth = shape.depth[0].tolist()
        for i, parent in enumerate(parents[1:], 1):
            ids.append(self.drafted(ids[parent], parents[:i].count(parent), count + depth[parent]))
        tokens = torch.stack(ids, 1)
        row = [x.expand(self.count, *x.shape[1:]) for x in (shape.parents, shape.pairs, shape.depth)]
        (seed, streams, _), said = self.noise(count), DRAFT.roll(1, 1) if self.said == "another" else DRAFT
        values = {
            "picks": torch.stack([self.picks(x, count + d) for x, d in zip(ids, depth, strict=True)], 1),
            "logits": TARGET.log()[tokens], "drafted": said.log()[tokens], "seed": seed, "streams": streams,
            "position": count, **LOSSY,
        }  # fmt: skip
        rule = ACCEPT[self.rule]
        options = {"replaced": (self.drafts == "apart") == (self.said == "otherwise")} if "seed" in rule.inputs else {}
        return rule.apply(
            Tree(tokens, *row, shape.stop, LENGTH - count), max(depth), **{n: values[n] for n in rule.inputs}, **options
        )

    def texts(self) -> Tensor:
        """int64 [B, LENGTH], -1 after a stop id."""
        newest, count = torch.zeros(2, self.count, dtype=torch.int64)
        texts = torch.full((self.count, LENGTH + 1), -1)
        while (count < LENGTH).any():
            found = self.round(newest, count)
            places = count.unsqueeze(1) + torch.arange(found.emitted.shape[1])
            texts = texts.scatter(1, torch.where(found.emitted < 0, LENGTH, places), found.emitted)
            newest = found.emitted.gather(1, (found.taken - 1).clamp(min=0).unsqueeze(1)).squeeze(1).clamp(min=0)
            count = torch.where(found.ended, LENGTH, count + found.taken)
        return texts[:, :LENGTH]

    def counts(self) -> dict[Text, int]:
        """How often each text comes: none that is impossible."""
        found, counts = self.texts().unique(dim=0, return_counts=True)
        got = {tuple(text): n for text, n in zip(found.tolist(), counts.tolist(), strict=True)}
        assert all(chances()[text] > 0 for text in got)
        return got


def p_value(counts: dict[Text, int]) -> float:
    """The chance of such counts, or of ones further off, if texts are the target's (chi-square).

    Texts of which fewer than five are expected count as one.
    """
    total = sum(counts.values())
    expected = {text: chance * total for text, chance in chances().items() if chance}
    cells = [(counts.get(text, 0), n) for text, n in expected.items() if n >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(n for _, n in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((n - wanted) ** 2 / wanted for n, wanted in cells)
    half = torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2
    return float(torch.special.gammaincc(*half))


def variation(counts: dict[Text, int]) -> float:
    """The total variation between what was drawn and the target."""
    total = sum(counts.values())
    return sum(abs(counts.get(text, 0) / total - chance) for text, chance in chances().items()) / 2


EXACT = [
    Run("match", "forks"), Run("rejection", "chain"), Run("rejection", "forks"), Run("rejection", "wide"),
    Run("rejection", "forks", "apart"), Run("rejection", "wide", "apart"),
]  # fmt: skip
WRONG = [
    Run("match", "forks", warmth=1.3), Run("rejection", "chain", said="another"),
    Run("rejection", "forks", said="another"), Run("rejection", "wide", "apart", "otherwise"),
    Run("rejection", "wide", "iid", "otherwise"), Run("rejection", "wide", "top"),
]  # fmt: skip


def thorough(runs: list[Run], *seeds: int) -> list[Any]:
    """The runs, and others with more texts that only `make test-all` makes."""
    more = [replace(run, count=100_000, seed=seed) for run in runs for seed in seeds]
    return [*runs, *(pytest.param(run, marks=pytest.mark.exhaustive) for run in more)]


@pytest.mark.parametrize("run", thorough(EXACT, 11, 12, 13), ids=str)
def test_texts_have_the_target_s_distribution(run: Run) -> None:
    assert p_value(run.counts()) > 1e-3


@pytest.mark.parametrize("run", thorough(WRONG, 11), ids=str)
def test_a_wrong_word_on_the_draws_is_seen(run: Run) -> None:
    """Else the test above would not tell much: drafts of another distribution, drawn in another way, or not at all."""
    assert p_value(run.counts()) < 1e-6


@pytest.mark.parametrize("drafts", ["iid", "top"])
def test_match_gives_the_texts_of_plain_decoding(drafts: str) -> None:
    run = Run("match", "forks", drafts, count=2000)
    before, plain = torch.zeros(run.count, dtype=torch.int64), torch.full((run.count, LENGTH), -1)
    ended = torch.zeros(run.count, dtype=torch.bool)
    for i in range(LENGTH):
        before = run.picks(before, torch.full((run.count,), i))
        plain[:, i] = torch.where(ended, -1, before)
        ended |= before == STOP
    assert torch.equal(run.texts(), plain)


def test_lossy_rules_say_so() -> None:
    """Their total variation is far above what as many draws of the target have (pytest -s shows it)."""
    assert {n: r.label for n, r in ACCEPT.items()} == {
        "match": "rounding", "rejection": "distribution", "typical": "lossy", "grouped": "lossy",
    }  # fmt: skip
    found = {name: variation(Run(name, "chain", count=5000).counts()) for name in ACCEPT}
    print("total variation:", ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    for name, rule in ACCEPT.items():
        assert (found[name] > 0.1) == (rule.label == "lossy") and (found[name] < 0.06) == (rule.label != "lossy"), found


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
