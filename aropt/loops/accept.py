"""Which drafts of a tree count, and what comes after them: acceptance rules of speculative decoding.

A round holds B sequences of n nodes. Node 0, the root, is the newest known id; the others are drafts, each after its
parent. A rule says which children go on from a node and which id comes where none does. What is common to all rules
follows from that in closed form, without a loop over nodes (see `descend`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aropt.ir.program import Spec

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
Label = Literal["rounding", "distribution", "lossy"]


class Tree(NamedTuple):
    """The drafts of a round. A node other than the root whose parent is -1 is padding: it is never accepted."""

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


def within(values: Tensor, places: Tensor) -> Tensor:
    """values[b, places[b, i]] for each i; a negative place reads the first value."""
    return values.gather(1, places.clamp(min=0))


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
    above = tree.pairs.gather(1, leaf.reshape(-1, 1, 1).expand(-1, 1, tree.pairs.shape[2]))
    levels = above & (tree.depth.unsqueeze(1) == torch.arange(deepest + 1).reshape(1, -1, 1))
    return leaf, torch.where(levels.any(2), levels.to(F32).argmax(2), -1)


def emit(tree: Tree, leaf: Tensor, path: Tensor, extra: Tensor) -> Accepted:
    """The result for a path, and for the ids `extra` [B] after its leaf."""
    last, room = within(tree.depth, leaf.unsqueeze(1)), tree.room > 0
    drafts = torch.cat([within(tree.tokens, path[:, 1:]), extra.unsqueeze(1)], 1)
    places = torch.arange(path.shape[1])
    ids = torch.where(places < last, drafts, torch.where(places == last, extra.unsqueeze(1), -1))
    ended = (extra.unsqueeze(1) == tree.stop).any(1) & room
    return Accepted(
        leaf, path, torch.where(room.unsqueeze(1), ids, -1), torch.where(room, last.squeeze(1) + 1, 0), ended
    )


def match(tree: Tree, deepest: int, picks: Tensor) -> Accepted:
    """A draft counts if the target itself picks it after its parent: `picks` int64 [B, n], one after each node.

    If these are drawn with the noise of their places, the ids are those of decoding without drafts.
    """
    leaf, path = descend(tree, within(picks, tree.parents) == tree.tokens, deepest)
    return emit(tree, leaf, path, within(picks, leaf.unsqueeze(1)).squeeze(1))


@dataclass(frozen=True)
class Acceptance:
    """A rule and how its ids compare with those of decoding without drafts.

    "rounding": they are the same, but for near ties that another shape of the products turns over. "distribution": they
    are others that are as likely. "lossy": neither.
    """

    apply: Callable[..., Accepted]
    label: Label
    inputs: dict[str, Spec]  # besides those of Tree; "N" stands for the number of nodes, "V" for that of ids


ACCEPT = {
    "match": Acceptance(match, "rounding", {"picks": Spec(I64, ("B", "N"))}),
}


def acceptance(
    name: str, nodes: int, deepest: int, vocab: int = 0
) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, Spec]]:
    """The rule of that name for trees of so many nodes, and its inputs: a function of tensors that gives `Accepted`."""
    rule, sizes = ACCEPT[name], {"N": nodes, "V": vocab}
    given = {n: Spec(s.dtype, tuple(sizes.get(str(d), d) for d in s.dims)) for n, s in rule.inputs.items()}
    row = Spec(I64, ("B", nodes))
    inputs = {
        "tokens": row, "parents": row, "pairs": Spec(BOOL, ("B", nodes, nodes)), "depth": row,
        "stop": Spec(I64, ("K",)), "room": Spec(I64, ("B",)), **given,
    }  # fmt: skip

    def function(**values: Tensor) -> tuple[Tensor, ...]:
        tree = Tree(**{n: values.pop(n) for n in Tree._fields})
        return tuple(rule.apply(tree, deepest, **values))  # a graph's outputs are a plain one

    return function, inputs
