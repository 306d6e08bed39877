"""Iteration smoothing: a masked row's embedding is mixed with what the round before expected there.

Of each row that is computed, `expect` keeps the mean of the embedding table under softmax(logits). In the next round
`blend` hands a growing share of it to rows that are still masked, and the forward adds it to the embedding of their
mask: e(mask) + a softmax(logits) W, where a is 0.15 in the second round of a generation, 0.02 more in each later one,
and at most 0.3. So it is in the code of dInfer (2510.08666, IterationSmooth and H2Embed); a threshold that falls over
the rounds, which its loop has besides, is a matter of the commit rule and not part of this. Rows that a cache leaves
alone keep what was expected of them last, as there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.frontend.trace import capture_function
from aropt.ir.calls import op_name
from aropt.ir.edit import inline
from aropt.ir.program import Graph, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.loops.unmask.blocks import current_block
from aropt.restrict.positions import LIKE, SHAPE_ONLY

aten = torch.ops.aten
F32, I64 = torch.float32, torch.int64
CANVAS, PICKED = Spec(I64, ("B", "T")), Spec(I64, ("B", "R"))
PARAMS = ("smooth_start", "smooth_growth", "smooth_most")


def graphs(model: Graph, weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[dict[str, Graph], StateSpec]:
    """The graphs of a forward in order, and the state "expected", float32 [B, T, width]. Raises as `embedding`."""
    vocab, copy = int(meta["vocab"]), fx.Graph()
    placed = {n: copy.placeholder(n) for n in (*model.inputs, "smoothed")}
    results = inline(copy, model, placed)
    copy.output(tuple(results.values()))
    found = embedding(placed["ids"])
    name = str(found.args[0].target)  # type: ignore[union-attr]
    table = weights[name]
    if table.shape[0] < vocab:
        raise refused(f"table '{name}'", f"it has {table.shape[0]} rows, the logits have {vocab} ids")
    with copy.inserting_after(found):
        added = copy.call_function(aten.add.Tensor, (found, placed["smoothed"]))
    found.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)
    inputs = {**model.inputs, "smoothed": Spec(table.dtype, ("B", "T", table.shape[1]))}
    made = {
        "blend": blend(int(meta["mask"]), table, bool(meta.get("block"))),
        "model": build(model.name, copy, inputs, list(model.outputs), weights),
        "expect": expect(name, table, vocab, bool(meta.get("shift")), weights),
    }
    return made, StateSpec("recurrent", state(table), 0.0)


def state(table: Tensor) -> Spec:
    return Spec(F32, ("B", "T", table.shape[1]))


def embedding(ids: fx.Node) -> fx.Node:
    """The one node that gathers a table's rows at the ids. Raises Unsupported where anything else reads them."""
    readers = [n for n in ids.users if op_name(n) not in SHAPE_ONLY | LIKE]
    named = ", ".join(f"{op_name(n)} ({n.meta.get('where') or n.name})" for n in readers) or "nothing"
    gathers = [n for n in readers if n.target is aten.embedding.default and n.args[1] is ids]
    if len(readers) != 1 or len(gathers) != 1 or getattr(gathers[0].args[0], "op", "") != "get_attr":
        raise refused(named, "the ids of the canvas are not read by one embedding of a table alone")
    return gathers[0]


def refused(where: str, why: str) -> Unsupported:
    return Unsupported(
        what="the rule 'smooth' finds no embedding of the canvas to mix into", where=where, why=why,
        hint="leave --rule smooth out",
    )  # fmt: skip


def blend(mask: int, table: Tensor, own: bool) -> Graph:
    """What is added to the embedding of each computed row: a share of what was expected of masked ones, else 0.

    `own`: the model has blocks of its own, whose rows see no later ones; there only the block at hand is smoothed, from
    its second round on, so that it is enough to compute it.
    """

    def function(
        tokens: Tensor,
        slots: Tensor,
        expected: Tensor,
        rounds: Tensor,
        smooth_start: Tensor,
        smooth_growth: Tensor,
        smooth_most: Tensor,
        **canvas: Tensor,
    ) -> Tensor:
        masked = tokens == mask
        if own:
            active, now = current_block(tokens, canvas["lengths"], canvas["origin"], canvas["block"], mask)
            masked = active & (now == canvas["cursor"]).unsqueeze(1)
        share = torch.minimum(smooth_start + smooth_growth * (rounds - 1).clamp(min=0), smooth_most)
        at = slots.clamp(max=tokens.shape[1] - 1)
        mean = expected.gather(1, at.unsqueeze(2).expand(-1, -1, table.shape[1]))
        return torch.where(masked.gather(1, at).unsqueeze(2), share * mean, 0.0).to(table.dtype)

    inputs = {"tokens": CANVAS, "slots": PICKED, "expected": state(table), "rounds": Spec(I64)}
    inputs |= {n: Spec(F32) for n in PARAMS}
    inputs |= {"block": Spec(I64), **{n: Spec(I64, ("B",)) for n in ("lengths", "origin", "cursor")}} if own else {}
    return capture_function("blend", function, inputs, ["smoothed"])


def expect(name: str, table: Tensor, vocab: int, shift: bool, weights: Mapping[str, Tensor]) -> Graph:
    """The mean embedding that the computed rows predict, in its places; other rows keep theirs."""

    def function(logits: Tensor, slots: Tensor, expected: Tensor, table: Tensor) -> Tensor:
        batch, length, width = expected.shape
        mean = torch.softmax(logits.to(F32), -1) @ table[:vocab].to(F32)
        to = (slots + int(shift)).clamp(max=length).unsqueeze(2).expand(-1, -1, width)
        return torch.cat([expected, torch.zeros(batch, 1, width)], 1).scatter(1, to, mean)[:, :-1]

    inputs = {"logits": Spec(F32, ("B", "R", vocab)), "slots": PICKED, "expected": state(table)}
    traced = capture_function(
        "expect", function, {**inputs, "table": Spec(table.dtype, tuple(table.shape))}, ["expected"]
    )
    copy = fx.Graph()  # a rule holds no weights when it is captured; this one shares the model's
    placed = {n: copy.placeholder(n) for n in inputs} | {"table": copy.get_attr(name)}
    copy.output(tuple(inline(copy, traced, placed).values()))
    return build("expect", copy, inputs, ["expected"], weights, traced.role)
