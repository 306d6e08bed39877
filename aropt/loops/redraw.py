"""Rejection sampling once more: a round's ids by the text of the algorithm (Leviathan et al. 2023, algorithm 1).

What accept.py says of all nodes in closed form, this says of one node after the other, in fp64: drafts are draws by the
drafter's chances, each with noise of its own; one is accepted with chance p/q; else what is left of p is drawn from.

So the ids of a round follow from the logits after its nodes, the drafter's, and the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aropt.ir.control import Loop
from aropt.ir.executor import Values
from aropt.loops.accept import COINS, DRAFTS, REST, beside
from aropt.loops.rules import draw


def redrawn(loop: Loop, values: Values, p: Tensor, given: Values) -> list[bool]:
    """Of each sequence that the round writes ids of, whether these are the ones of the algorithm.

    `values`: those of the round; `p` float64 [B, n, V]: the target's chances after each node; `given`: the request's
    seed, streams, limit and stop.
    """
    tokens, parents, origin, *levels = (values[name] for name in loop.drafts)
    drafted, count = torch.cat(levels, 1), tokens.shape[1]
    seed, streams, stop = given["seed"], given["streams"], given["stop"].tolist()
    coins = torch.ops.aropt.noise(beside(seed, COINS), streams, origin + 1, count)
    found = []
    for b, row in enumerate(values[loop.shown].tolist()):
        ids = [token for token in row if token >= 0]
        if not ids:
            continue
        noise = seed, streams[b : b + 1], origin[b : b + 1] + 1
        whole = walked(tokens[b].tolist(), parents[b].tolist(), p[b], drafted[b], coins[b], noise)
        ends = ids[-1] in stop or int(values["counts"][b]) >= int(given["limit"])
        found.append(ids == whole[: len(ids)] and (len(ids) == len(whole) or ends))
    return found


def walked(
    tokens: list[int], parents: list[int], p: Tensor, drafted: Tensor, coins: Tensor, noise: tuple[Tensor, ...]
) -> list[int]:
    """The ids of the drafts that are accepted and the one after them; [] where a draft is no draw of the drafter.

    `p` [n, V], `drafted` [m, V]: logits after the first m nodes; `coins` [n]; `noise`: seed, stream and the place of
    the id after the root.
    """
    (seed, stream, place), node, ids = noise, 0, list[int]()
    while True:
        rest, taken = p[node], 0
        children = [child for child, parent in enumerate(parents) if parent == node]
        for rank, child in enumerate(children):
            q, token = drafted[node].double().softmax(0), tokens[child]
            if token != int(draw(drafted[node : node + 1], beside(seed, DRAFTS + rank), stream, place + len(ids))):
                return []
            if float(coins[child]) * float(q[token]) < float(rest[token]):
                taken = child
                break
            left = (rest - q).clamp(min=0)
            rest = left / left.sum() if float(left.sum()) > 0 else rest
        if not taken:
            return [*ids, int(draw(rest.log().unsqueeze(0), beside(seed, REST), stream, place + len(ids)))]
        ids.append(tokens[taken])
        node = taken
