"""Which drafts of a tree count, and what comes after them: acceptance rules of speculative decoding.

A round holds B sequences of n nodes. Node 0, the root, is the newest known id; the others are drafts, each after its
parent. A rule says which children go on from a node and which id comes where none does. What is common to all rules
follows from that in closed form, without a loop over nodes (see `descend`).

Rules that draw take `position` int64 [B], the place of the id after the root, and noise that no id is drawn with: the
same stream and place under another seed (see `beside`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from aropt.ir import ops
from aropt.ir.program import Spec
from aropt.kernels.noise import P
from aropt.loops.rules import draw
from aropt.rewriting.contract import Contract

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
Label = Literal["rounding", "distribution", "lossy"]
Weigh = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
COINS, REST, DRAFTS = 1, 2, 3  # uses of noise; that of the k-th draft of a place is DRAFTS + k, from 0 on


class Tree(NamedTuple):
    """The drafts of a round. A node other than the root whose parent is -1 is padding: it is never accepted.

    Parents, pairs and depth [1, ..] are those of all sequences.
    """

    tokens: Tensor  # int64 [B, n]
    parents: Tensor  # int64 [B, n]: smaller than the node's own index; -1 for the root
    pairs: Tensor  # bool [B, n, n]: whether the second node is the first one or an ancestor of it
    depth: Tensor  # int64 [B, n]: 0 for the root
    stop: Tensor  # int64 [K]: ids that end a text; -1 is none
    room: Tensor  # int64 [B]: how many ids may still come; 0 for a sequence that is finished


class Accepted(NamedTuple):
    """What a round gives. Where there is room, `taken` ids come after the `taken` nodes of the path."""

    leaf: Tensor  # int64 [B]: the deepest node that counts
    path: Tensor  # int64 [B, D + 1]: the nodes from the root to the leaf, -1 after them
    emitted: Tensor  # int64 [B, D + 1]: the ids of the drafts that count and the one after the leaf, -1 after them
    taken: Tensor  # int64 [B]: how many ids are emitted
    ended: Tensor  # bool [B]: whether the last of them is a stop id


def of_all(values: Tensor) -> bool:
    """Whether these are values [1, ..] of all sequences: a size that varies is no int."""
    return isinstance(values.shape[0], int) and values.shape[0] == 1


def within(values: Tensor, places: Tensor) -> Tensor:
    """values[b, places[b, i]] for each i; a negative place reads the first value. Either may be of all sequences."""
    places = places.clamp(min=0)
    if of_all(places):
        return values.index_select(1, places[0])
    return (
        of_node(values.unsqueeze(2), places.flatten()).reshape(places.shape)
        if of_all(values)
        else values.gather(1, places)
    )


def of_node(values: Tensor, node: Tensor) -> Tensor:
    """values[b, node[b], :]."""
    if of_all(values):
        return values[0].index_select(0, node)
    return values.gather(1, node.reshape(-1, 1, 1).expand(-1, 1, values.shape[2])).squeeze(1)


def descend(tree: Tree, goes_on: Tensor, deepest: int) -> tuple[Tensor, Tensor]:
    """The leaf [B] and the path [B, deepest + 1], if `goes_on` [B, n] says which nodes may follow their parents.

    A draft counts if no node up to the root does not. The id after each node of the path is emitted, so a draft does
    not count if it is a stop id, after which nothing comes, or if the ids before it fill the room. Where siblings are
    alike several nodes of one depth count: the path leads to the first of the deepest ones.
    """
    stops = (tree.tokens.unsqueeze(2) == tree.stop).any(2)
    counts = goes_on & ~stops & (tree.depth < tree.room.unsqueeze(1)) & (tree.parents >= 0)
    root = torch.arange(tree.tokens.shape[1]) == 0
    good = ~(tree.pairs & ~(counts | root).unsqueeze(1)).any(2)
    leaf = torch.where(good, tree.depth, -1).to(F32).argmax(1)
    level = torch.arange(deepest + 1).reshape(1, 1, -1, 1)
    above = tree.pairs.unsqueeze(2) & (tree.depth.reshape(-1, 1, 1, tree.depth.shape[1]) == level)  # of each node
    return leaf, of_node(torch.where(above.any(3), above.to(F32).argmax(3), -1), leaf)


def emit(tree: Tree, goes_on: Tensor, leaf: Tensor, path: Tensor, otherwise: Tensor) -> Accepted:
    """The result for a path. After its leaf comes a child that goes on but does not count, else the id `otherwise`."""
    children = goes_on & (tree.parents == leaf.unsqueeze(1))
    drafted = within(tree.tokens, children.to(F32).argmax(1, keepdim=True))
    extra = torch.where(children.any(1, keepdim=True), drafted, otherwise.unsqueeze(1))
    drafts = torch.cat([within(tree.tokens, path[:, 1:]), extra], 1)
    last = within(tree.depth, leaf.unsqueeze(1))
    return given(tree, leaf, path, torch.where(torch.arange(path.shape[1]) == last, extra, drafts), extra)


def given(tree: Tree, leaf: Tensor, path: Tensor, ids: Tensor, extra: Tensor) -> Accepted:
    """The result of the ids after each node of a path, the last of which is `extra` [B, 1]."""
    room = tree.room > 0
    taken = torch.where(room, within(tree.depth, leaf.unsqueeze(1)).squeeze(1) + 1, 0)
    emitted = torch.where((path >= 0) & room.unsqueeze(1), ids, -1)
    return Accepted(leaf, path, emitted, taken, (extra == tree.stop).any(1) & room)


def match(tree: Tree, deepest: int, picks: Tensor) -> Accepted:
    """A draft counts if the target itself picks it after its parent: `picks` int64 [B, n], one after each node.

    If these are drawn with the noise of their places, the ids are those of decoding without drafts.
    """
    scan = ops.load("accept_scan").overload
    return Accepted(*scan(tree.tokens, picks, tree.parents, tree.pairs, tree.depth, tree.stop, tree.room, deepest))


def beside(seed: Tensor, use: int) -> Tensor:
    """A seed for another use of noise: no two of them, and no other seed below p, give the same (see kernels/noise)."""
    return seed + use * P


def at(values: Tensor, tokens: Tensor) -> Tensor:
    """values[b, i, tokens[b, i]]."""
    return values.gather(2, tokens.unsqueeze(2)).squeeze(2)


def alone(p: Tensor, q: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """The chances of the ids themselves."""
    return at(p, token), at(q, token)


def offered(
    tree: Tree, p: Tensor, q: Tensor, coins: Tensor, weigh: Weigh, width: int, replaced: bool
) -> tuple[Tensor, Tensor]:
    """Offers each node's first `width` children, one after the other: who goes on, and what is left of p [B, n, V].

    A child is accepted with the chance that is the quotient of what `weigh` gives for p, q and the ids of children. For
    each that is not, q is taken from p.
    """
    order, ids = torch.arange(p.shape[1]), torch.arange(p.shape[2])
    alike = tree.parents.unsqueeze(2) == tree.parents.unsqueeze(1)
    rank = (alike & (order < order.unsqueeze(1))).to(I64).sum(2)
    child_of = tree.parents.unsqueeze(1) == order.unsqueeze(1)
    chosen = torch.full_like(tree.parents, -1)
    for turn in range(width):
        turns = child_of & (rank == turn).unsqueeze(1)
        child = torch.where(turns.any(2), turns.to(F32).argmax(2), -1)
        token = within(tree.tokens, child).clamp(min=0)
        over, under = weigh(p, q, token)
        free = (child >= 0) & (chosen < 0)
        # by a product and strictly: an id that the target never writes has chance 0, whatever q is
        taken = free & (within(coins, child) * under < over)
        rest = (p - q).clamp(min=0)
        total = rest.sum(2, keepdim=True)  # 0 only by rounding: where p is q all are accepted
        refused = (free & ~taken).unsqueeze(2) & (total > 0)
        p = torch.where(refused, rest / torch.where(total > 0, total, 1.0), p)
        chosen = torch.where(taken, child, chosen)
        if not replaced:
            q = torch.where(token.unsqueeze(2) == ids, 0.0, q)
            left = q.sum(2, keepdim=True)
            q = q / torch.where(left > 0, left, 1.0)
    return within(chosen, tree.parents) == order, p


def rejection(
    tree: Tree, deepest: int, logits: Tensor, drafted: Tensor, seed: Tensor, streams: Tensor, position: Tensor,
    width: int | None = None, replaced: bool = True, weigh: Weigh = alone,
) -> Accepted:  # fmt: skip
    """Accepts a draft with chance p/q, and draws from the rest otherwise (Leviathan et al. 2023; Miao et al. 2024).

    The target's `logits` and the draft's `drafted` [B, n, V] are those after each node. The children of a node are
    draws from the latter, in the order of drawing, each from what the ones before it leave if not `replaced`; a node
    has at most `width`. Children of different nodes may share their noise, as one path alone counts.
    """
    nodes, p, q = logits.shape[1], logits.softmax(2), drafted.softmax(2)
    coins = torch.ops.aropt.noise(beside(seed, COINS), streams, position, nodes)
    goes_on, p = offered(tree, p, q, coins, weigh, nodes - 1 if width is None else width, replaced)
    leaf, path = descend(tree, goes_on, deepest)
    place = position + within(tree.depth, leaf.unsqueeze(1)).squeeze(1)
    drawn = draw(of_node(p, leaf).log(), beside(seed, REST), streams, place)
    return emit(tree, goes_on, leaf, path, drawn)


def grouped(
    tree: Tree, deepest: int, logits: Tensor, drafted: Tensor, seed: Tensor, streams: Tensor, position: Tensor,
    near: Tensor, embeddings: Tensor, distance: Tensor, width: int | None = None, replaced: bool = True, ranks: int = 7,
) -> Accepted:  # fmt: skip
    """As `rejection`, but p and q are those of a group of ids like the draft's (So et al. 2025).

    The group: of `ranks` ids below the draft's in the target's order, itself and ranks - 1 above it, those whose chance
    differs by less than `near` and whose row of `embeddings` [W, E] has a squared distance below `distance`, which is
    not asked for if one of the ids has no row. An id that the target never writes is refused all the same.
    """
    order, rows = torch.sort(logits, dim=2, stable=True).indices, embeddings.shape[0]

    def weigh(p: Tensor, q: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        rank = (order == token.unsqueeze(2)).to(F32).argmax(2, keepdim=True)
        places = rank + torch.arange(-ranks, ranks)
        there = (places >= 0) & (places < order.shape[2])
        ids, own = order.gather(2, places.clamp(0, order.shape[2] - 1)), at(p, token)
        known = (ids < rows).all(2, keepdim=True)
        apart = embeddings[ids.clamp(max=rows - 1)] - embeddings[token.clamp(max=rows - 1)].unsqueeze(2)
        chances = p.gather(2, ids)
        group = there & ((chances - own.unsqueeze(2)).abs() < near) & (~known | ((apart * apart).sum(3) < distance))
        over, under = (torch.where(group, x, 0.0).sum(2) for x in (chances, q.gather(2, ids)))
        return torch.where(own > 0, over, 0.0), under

    return rejection(tree, deepest, logits, drafted, seed, streams, position, width, replaced, weigh)


def typical(tree: Tree, deepest: int, logits: Tensor, picks: Tensor, epsilon: Tensor, delta: Tensor) -> Accepted:
    """A draft counts if its chance is above min(epsilon, delta * exp(-entropy)) (Cai et al. 2024).

    The deepest one is taken, and after it what the target picks: `picks` int64 [B, n].
    """
    chances = logits.log_softmax(2)
    p = chances.exp()
    bar = torch.minimum(epsilon, delta * torch.where(p > 0, p * chances, 0.0).sum(2).exp())
    places = tree.parents.clamp(min=0) * p.shape[2] + tree.tokens.clamp(min=0)
    goes_on = p.flatten(1).gather(1, places) > within(bar, tree.parents)
    leaf, path = descend(tree, goes_on, deepest)
    return emit(tree, goes_on, leaf, path, within(picks, leaf.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class Acceptance:
    """A rule, and how its ids compare with those of decoding without drafts.

    They are the same but for near ties that rounding turns over, or others of the same distribution, or neither.
    """

    name: str
    apply: Callable[..., Accepted]
    label: Label
    inputs: dict[str, Spec]  # besides those of Tree; "N" stands for the number of nodes, "V" for that of ids
    numbers: dict[str, float] = field(default_factory=dict)  # of the rule's paper

    @property
    def graph(self) -> str:
        """The name of its graph in a program."""
        return "accept" if self.name == "match" else f"accept_{self.name}"

    def reads(self, value: str) -> bool:
        return value in self.inputs

    def fixed(self) -> dict[str, Tensor]:
        """Values of inputs that are always the same; no id has a row of embeddings: groups are by chances alone."""
        values = {n: torch.tensor(v) for n, v in self.numbers.items()}
        return {**values, "embeddings": torch.zeros(1, 1)} if self.reads("embeddings") else values


ROW, EACH = Spec(I64, ("B",)), Spec(F32, ("B", "N", "V"))
PICKS, SCALE = {"picks": Spec(I64, ("B", "N"))}, Spec(F32)
DRAWN = {"logits": EACH, "drafted": EACH, "seed": Spec(I64), "streams": ROW, "position": ROW}
GROUP = {"near": SCALE, "embeddings": Spec(F32, ("W", "E")), "distance": SCALE}
BAR = {"logits": EACH, **PICKS, "epsilon": SCALE, "delta": SCALE}
MATCH = Acceptance("match", match, "rounding", PICKS)
ACCEPT = {
    one.name: one
    for one in (
        MATCH,
        Acceptance("rejection", rejection, "distribution", DRAWN),
        Acceptance("typical", typical, "lossy", BAR, {"epsilon": 0.09, "delta": 0.3}),
        Acceptance("grouped", grouped, "lossy", DRAWN | GROUP, {"near": 0.15, "distance": 0.5}),
    )
}


def levelled(contract: Contract, by: Acceptance) -> Contract:
    """The contract of a pass whose drafts are accepted so: of another level than its own it runs where asked for."""
    if by.label == contract.level:
        return contract
    return replace(contract, level=by.label, budget=("shift",) if by.label == "lossy" else (), when="asked", tries=())


def acceptance(
    name: str, nodes: int, deepest: int, vocab: int = 0, **options: Any
) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Spec]]:
    """The rule of that name as a function of tensors, and its inputs; `options`: what it is given besides tensors."""
    rule, sizes = ACCEPT[name], {"N": nodes, "V": vocab}
    given = {n: Spec(s.dtype, tuple(sizes.get(str(d), d) for d in s.dims)) for n, s in rule.inputs.items()}
    row = Spec(I64, ("B", nodes))
    inputs = {
        "tokens": row, "parents": row, "pairs": Spec(BOOL, ("B", nodes, nodes)), "depth": row,
        "stop": Spec(I64, ("K",)), "room": ROW, **given,
    }  # fmt: skip

    def function(**values: Tensor) -> tuple[Tensor, ...]:
        tree = Tree(**{n: values.pop(n) for n in Tree._fields})
        return tuple(rule.apply(tree, deepest, **values, **options))  # a graph's outputs are a plain one

    return function, inputs
