"""Trees of drafts by their parents, of four ids."""

from __future__ import annotations

import torch

from aropt.loops.accept import Tree

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
