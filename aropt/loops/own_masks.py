"""Drafts by rows of masks in the very call that checks the drafts before them (TiDAR, Liu et al. 2025, 2511.08923).

A round's rows are a chain of n nodes, the newest id and its drafts, and after them n groups of n masks. Group a stands
where the ids after a accepted drafts will, and sees these nodes and its own masks, those after a row too. Which group
counts is known once the nodes are: its first mask stands at the place of the id that the round picks, and the others
are the next round's drafts. A round after the prompt's has none yet, and drafts zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aropt.ir.control import Call
from aropt.ir.edit import call_by_name
from aropt.ir.program import Spec, StateSpec
from aropt.loops.drafters import Drafter, Ranked
from aropt.loops.trees import Drafts, Made
from aropt.rewriting.tree import Nodes

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
ROWS = Spec(I64, ("B",))
FED = {"ids": "all_nodes", "positions": "all_positions"}


def from_masks(made: Made, shape: Drafts, mask: int, rule: Ranked) -> Drafter:
    """Drafts a chain by masks of the id `mask`; the step for nodes lets a row see later ones, where `pairs` says so."""
    nodes, drafts = shape.nodes, shape.deepest
    ahead = Spec(I64, ("B", drafts))
    levels = [f"level_{d}" for d in range(1, nodes)]
    recall = made.add(
        "recall_masked", lambda foreseen: tuple(foreseen[:, d : d + 1].clone() for d in range(drafts)),
        {"foreseen": ahead}, levels,
    )  # fmt: skip

    def widen(nodes: Tensor, node_positions: Tensor, origin: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        batch, live = nodes.shape[0], node_positions[:, :1] >= 0
        places = origin.unsqueeze(1) + given["places"]
        places = torch.where(live & (places < made.capacity), places, -1)
        masks = given["masks"].unsqueeze(0).expand(batch, -1)
        return torch.cat([nodes, masks], 1), torch.cat([node_positions, places], 1)

    spec = Spec(I64, ("B", nodes))
    wider = made.add(
        "widen", widen, {"nodes": spec, "node_positions": spec, "origin": ROWS}, list(FED.values()),
        tables={"places": places(nodes), "masks": torch.full((nodes * nodes,), mask)},
    )  # fmt: skip
    own = made.add(
        "own_rows", lambda all_logits: (all_logits[:, :nodes].clone(), all_logits[:, nodes:].clone()),
        {"all_logits": Spec(F32, ("B", nodes + nodes * nodes, made.vocab))}, ["logits", "draft_logits"],
    )  # fmt: skip
    return Drafter(
        {"foreseen": StateSpec("tokens", ahead, 0)}, rounds=[call_by_name(recall)],
        widened=[call_by_name(wider)], fed=FED, logits="all_logits", narrowed=[call_by_name(own)],
        settled=[foresee(made, nodes, rule)],
    )  # fmt: skip


def places(nodes: int) -> Tensor:
    """int64 [n n]: how far after the newest id each mask stands."""
    group, mask = torch.arange(nodes).unsqueeze(1), torch.arange(nodes)
    return (group + 1 + mask).flatten()


def masked(nodes: int) -> Nodes:
    """The rows of a round."""
    return Nodes(nodes + nodes * nodes, nodes, pairs=pairs(nodes), ahead=True)


def pairs(nodes: int) -> Tensor:
    """bool [R, R]: whether the second of all rows is seen by the first."""
    group = torch.arange(nodes).repeat_interleave(nodes)
    chain = torch.ones(nodes, nodes, dtype=torch.bool).tril()
    above = torch.arange(nodes) <= group.unsqueeze(1)
    unseen = torch.zeros(nodes, nodes * nodes, dtype=torch.bool)
    return torch.cat([torch.cat([chain, unseen], 1), torch.cat([above, group.unsqueeze(1) == group], 1)])


def foresee(made: Made, nodes: int, rule: Ranked) -> Call:
    """The call that drafts from the group of masks after the nodes that were accepted, but for its first one."""
    function, inputs = rule.best(1)
    given = {n: s for n, s in inputs.items() if n not in ("logits", "streams", "position")}
    drafts, sampled = nodes - 1, "position" in inputs

    def draft(draft_logits: Tensor, window: Tensor, **values: Tensor) -> Tensor:
        batch, vocab = window.shape[0], made.vocab
        group = ((window >= 0).to(I64).sum(1) - 1).clamp(min=0)
        rows = group.unsqueeze(1) * nodes + 1 + torch.arange(drafts)
        found = draft_logits.gather(1, rows.unsqueeze(2).expand(-1, -1, vocab)).to(F32).flatten(0, 1)
        held = {n: values[n] for n in given}
        if sampled:
            at = (values["origin"] + group + 1).unsqueeze(1) + 1 + torch.arange(drafts)
            held |= {"position": at.flatten()}
            held |= {"streams": values["streams"].unsqueeze(1).expand(batch, drafts).flatten()}
        return function(found, **held).reshape(batch, drafts)

    more = {"origin": ROWS, "streams": ROWS} if sampled else {}
    read = {"draft_logits": Spec(F32, ("B", nodes * nodes, made.vocab)), "window": Spec(I64, ("B", nodes))}
    graph = made.add(f"foresee_{rule.call.graph}", draft, {**read, **given, **more}, ["foreseen"])
    reads = {n: rule.call.reads.get(n, n) for n in graph.inputs if n in given}
    return Call(graph.name, {n: reads.get(n, n) for n in graph.inputs}, {"foreseen": "foreseen"})
