"""Guided diffusion: an autoregressive model judges what a round would write, and never writes (FlashDLM, 2505.21467).

Each round the canvas model drafts every mask of the block at hand. The guide reads the canvas with the drafts in it,
once, and the drafts are kept from the left up to the first that it does not accept; the first of all is kept in any
case. So the ids are always the canvas model's own, and a good guide lets a round write many of them.

With `guide-product` both decide: a draft is kept while it is the best by the product of both models' probabilities, or
within a margin of it, and the first that is not gives way to what is, among the canvas model's OFFERS likeliest ids
(after adaptive parallel decoding, Israel et al. 2025, 2506.00413). So a round writes one id more.

In a program: `draft` (the canvas with candidates), `guide` (its forward), `judge` (rows it agrees with), `agree` (these
in their places). The plain program runs the guide's whole forward; the pass guide-cache restricts it to new rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import UsageError
from aropt.frontend.trace import capture_function
from aropt.ir.control import Call, Control
from aropt.ir.control import calls as every
from aropt.ir.edit import call_by_name, inline
from aropt.ir.program import Graph, Input, Meta, Spec
from aropt.ir.torch_compat import build
from aropt.loops.unmask.blocks import current_block

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
CANVAS, PICKED = Spec(I64, ("B", "T")), Spec(I64, ("B", "R"))
PREFIX = "guide."  # of its weights' names
PRODUCT, OFFERS = "guide-product", 8  # the judge that chooses too, and of how many ids
OFFERED = {"offer": I64, "chance": F32}  # what it chooses from: [B, R, OFFERS]


@dataclass(frozen=True)
class Guide:
    """A captured autoregressive model: forward `graph`, its weights under PREFIX, its capacity."""

    name: str
    graph: Graph
    weights: dict[str, Tensor]
    vocab: int
    capacity: int


def argmax(logits: Tensor, draft: Tensor) -> Tensor:
    """The draft is the guide's own choice."""
    return logits.argmax(-1) == draft


def top_k(logits: Tensor, draft: Tensor, guide_k: Tensor) -> Tensor:
    """The draft is among its k most likely ids; of equal ones all count."""
    return (logits > of(logits, draft)).to(I64).sum(-1) < guide_k


def relative(logits: Tensor, draft: Tensor, guide_share: Tensor) -> Tensor:
    """The draft is among its two most likely ids, and has a share of the most likely one's probability."""
    own = of(logits, draft).squeeze(-1)
    return ((logits > own.unsqueeze(-1)).to(I64).sum(-1) < 2) & (own >= logits.amax(-1) + torch.log(guide_share))


def threshold(logits: Tensor, draft: Tensor, guide_threshold: Tensor) -> Tensor:
    """The draft has at least this probability."""
    return torch.log_softmax(logits, -1).gather(-1, draft.unsqueeze(-1)).squeeze(-1) >= torch.log(guide_threshold)


def of(logits: Tensor, draft: Tensor) -> Tensor:
    return logits.gather(-1, draft.unsqueeze(-1))


def product(
    logits: Tensor,
    draft: Tensor,
    offer: Tensor,
    chance: Tensor,
    guide_weight: Tensor,
    guide_margin: Tensor,
    temperature: Tensor,
) -> tuple[Tensor, Tensor]:
    """Whether the draft is near the best by both models, and what to write: it, or the best.

    `chance`: the canvas model's part (see `offers`).
    """
    logs = torch.log_softmax(logits / torch.where(temperature > 0, temperature, 1.0), -1)
    worth = chance + guide_weight * logs.gather(-1, offer)
    best = worth.argmax(-1, keepdim=True)
    own = torch.where(offer == draft.unsqueeze(-1), worth, -torch.inf).amax(-1)
    fits = own >= worth.gather(-1, best).squeeze(-1) - guide_margin
    return fits, torch.where(fits, draft, offer.gather(-1, best).squeeze(-1))


def offers(logits: Tensor, noise: Tensor | None, slots: Tensor, like: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The OFFERS likeliest ids of each row and what they are worth without the guide, in their places [B, T, OFFERS].

    `logits` [B, R, V] of rows in `slots` [B, R]; `noise` is subtracted from logarithms, so that a draw from the product
    has the canvas model's own. `like` [B, T]: the canvas.
    """
    (batch, length), kinds = like.shape, min(OFFERS, logits.shape[2])
    logs = torch.log_softmax(logits, -1)
    ids = torch.topk(logs if noise is None else logs - noise, kinds, -1).indices
    worth = (1 - weight) * logs.gather(-1, ids)
    if noise is not None:
        worth = worth - noise.gather(-1, ids)
    to = slots.unsqueeze(-1).expand(-1, -1, kinds)
    empty = torch.zeros(batch, length + 1, kinds)
    return empty.to(I64).scatter(1, to, ids)[:, :-1], empty.scatter(1, to, worth)[:, :-1]


JUDGES: dict[str, tuple[Callable[..., Any], dict[str, Input]]] = {
    "guide-argmax": (argmax, {}),
    "guide-top-k": (top_k, {"guide_k": Input(Spec(I64), 5, "ids of the guide that count", 0)}),
    "guide-relative": (
        relative,
        {"guide_share": Input(Spec(F32), 0.5, "share of the guide's best", 0.0, 1.0)},
    ),
    "guide-threshold": (
        threshold,
        {"guide_threshold": Input(Spec(F32), 0.1, "probability under the guide", 0.0, 1.0)},
    ),
    PRODUCT: (
        product,
        {
            "guide_weight": Input(Spec(F32), 0.7, "the guide's power in the product, the model's the rest", 0.0, 1.0),
            "guide_margin": Input(Spec(F32), 0.0, "nats by which a draft may be worse than the best", 0.0),
        },
    ),
}


def make(name: str, graph: Graph, weights: dict[str, Tensor], vocab: int, capacity: int) -> Guide:
    """A guide from a captured forward, its weights renamed."""
    moved = {PREFIX + n: w for n, w in weights.items()}
    return Guide(name, renamed(graph, {n: PREFIX + n for n in weights}, moved), moved, vocab, capacity)


def renamed(graph: Graph, names: Mapping[str, str], weights: Mapping[str, Tensor]) -> Graph:
    """The graph "guide" with other names for some of its weights, which `weights` has."""
    copy = fx.Graph()
    results = inline(copy, graph, {n: copy.placeholder(n) for n in graph.inputs})
    copy.output(tuple(results.values()))
    for node in copy.nodes:
        if node.op == "get_attr":
            node.target = names.get(str(node.target), str(node.target))
    return build("guide", copy, graph.inputs, list(graph.outputs), weights)


def check(guide: Guide, meta: Meta) -> None:
    """Raises UsageError unless the guide reads the ids that the canvas model writes, and as many."""
    vocab, capacity = meta["vocab"], meta["capacity"]
    if guide.vocab != vocab:
        raise UsageError(
            what=f"the guide has a vocabulary of {guide.vocab} ids, the model one of {vocab}",
            where=f"--guide {guide.name}",
            why="it judges the model's ids as they are",
            hint="choose a guide with the same tokenizer",
        )
    if guide.capacity < capacity:
        raise UsageError(
            what=f"the guide takes {guide.capacity} ids, the model {capacity}",
            where=f"--guide {guide.name}",
            hint=f"give --capacity {guide.capacity}",
        )
    if meta.get("shift"):
        raise UsageError(
            what="a guide can't judge a model whose rows predict the next id", where=f"--guide {guide.name}",
            hint="leave the guide out",
        )  # fmt: skip


def completed(rules: tuple[str, ...], guide: Guide | None) -> tuple[str, ...]:
    """The rules with a judge where there is a guide. Raises UsageError for a judge without one."""
    judges = [r for r in rules if r in JUDGES]
    if judges and guide is None:
        raise UsageError(
            what=f"the rule '{judges[0]}' needs a guide", hint="name one: --guide MODEL, or guide= in Python"
        )
    return rules if guide is None or judges else (*rules, "guide-argmax")


def graphs(guide: Guide, judge: str, mask: int) -> dict[str, Graph]:
    """The graphs of a guided round."""
    both = OFFERED if judge == PRODUCT else {}

    def draft(
        tokens: Tensor, candidate: Tensor, lengths: Tensor, origin: Tensor, block: Tensor, **offers: Tensor
    ) -> tuple[Tensor, ...]:
        active = current_block(tokens, lengths, origin, block, mask)[0]
        drafted = torch.where(active, candidate, tokens)
        after = (torch.arange(tokens.shape[1]) + 1).clamp(max=tokens.shape[1] - 1)
        return drafted, drafted.index_select(1, after), *(x.index_select(1, after) for x in offers.values())

    def agree(fits: Tensor, **chosen: Tensor) -> tuple[Tensor, ...]:
        rows = torch.arange(fits.shape[1])
        before, known = (rows - 1).clamp(min=0), rows > 0
        accepted = fits.index_select(1, before) & known
        if not chosen:
            return (accepted,)
        return accepted, torch.where(known, chosen["choice"].index_select(1, before), chosen["candidate"])

    test, params = JUDGES[judge]
    rows = {n: Spec(I64, ("B",)) for n in ("lengths", "origin")}
    given = {"tokens": CANVAS, "candidate": CANVAS, **rows, "block": Spec(I64)}
    kinds = min(OFFERS, guide.vocab)
    judged = {"guide_logits": Spec(F32, ("B", "R", guide.vocab)), "following": PICKED}
    judged |= {n: Spec(t, ("B", "R", kinds)) for n, t in both.items()} | {n: i.spec for n, i in params.items()}
    judged |= {"temperature": Spec(F32)} if both else {}

    def fits(guide_logits: Tensor, following: Tensor, **values: Tensor) -> Any:
        return test(guide_logits.to(F32), following, **values)

    placed_offers = {n + "s": Spec(t, ("B", "T", kinds)) for n, t in both.items()}
    placed = {"fits": Spec(BOOL, ("B", "T")), **({"choice": CANVAS, "candidate": CANVAS} if both else {})}
    return {
        "draft": capture_function("draft", draft, given | placed_offers, ["drafted", "following", *both]),
        "guide": replace(guide.graph, outputs={"guide_logits": guide.graph.outputs["logits"]}, aliases={}),
        "judge": capture_function("judge", fits, judged, ["fits", *(["choice"] if both else [])], "rule"),
        "agree": capture_function("agree", agree, placed, ["accepted", *(["candidate"] if both else [])]),
    }


def calls(made: dict[str, Graph]) -> list[Call]:
    """The calls of a guided round, between the candidates and the commit."""
    forward = Call("guide", {"ids": "drafted"}, {"guide_logits": "guide_logits"})
    return [call_by_name(made["draft"]), forward, call_by_name(made["judge"]), call_by_name(made["agree"])]


def whole(control: Control) -> bool:
    """Whether a guide reads the whole canvas, padding too: batches then have rows of one length."""
    return any(call.reads == {"ids": "drafted"} for call in every(control))


def guiding(control: Control) -> tuple[Call, Call, Call]:
    """The calls of a round whose guide reads the whole canvas that depend on the rows it reads: its forward, what
    judges by that, and what puts the judgements in their places.
    """
    forward = next(call for call in every(control) if call.reads == {"ids": "drafted"})
    judge = reader(control, forward)
    return forward, judge, reader(control, judge)


def reader(control: Control, call: Call) -> Call:
    """The first call that reads what another writes."""
    return next(one for one in every(control) if set(call.writes.values()) & set(one.reads.values()))


def accepted_rows(active: Tensor, accepted: Tensor, beyond: bool) -> Tensor:
    """From the left up to the first mask that is not accepted, or to the one before it, but at least one: bool [B, T].

    `beyond`: that one too, as the guide had a part in what it is.
    """
    wrong = (active & ~accepted).to(I64)
    before = wrong.cumsum(1) - (wrong if beyond else 0)
    return active & ((before == 0) | (active.to(I64).cumsum(1) == 1))
