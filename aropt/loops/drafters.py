"""Where the drafts of a tree come from: what runs in the prompt's round, and what writes `level_1` .. in each round.

A drafter is graphs, state and calls. All draft by the target's own rule with the noise of the place that a draft is
for, so that they guess draws as well as choices; a node's children are the ids that the rule puts first. Where drafts
are accepted by their chances, they are draws with noise of their own, and `drafted_0` .. say by which logits.

    own_model   another, smaller model with a state of its own (Leviathan et al. 2023, 2211.17192)
    own_step    a cheaper form of the target's step, on the target's state, which no step for nodes writes
    from_before what the round before says of the places after its ids (jacobi.py): a chain
    from_text   what followed the latest ids where they stood before (prompt lookup): a chain
    from_masks  rows of masks beside the nodes that are checked (own_masks.py): a chain
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from aropt.ir.control import Call
from aropt.ir.edit import call_by_name
from aropt.ir.program import Graph, Program, Spec, StateSpec
from aropt.loops.accept import DRAFTS, MATCH, Acceptance, beside
from aropt.loops.rules import chosen, draw, draws, rule
from aropt.loops.speculate import LATEST
from aropt.loops.trees import Drafts, Made, Shape

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
SCALAR, ROWS = Spec(I64), Spec(I64, ("B",))
NODES = {"ids": "nodes", "positions": "node_positions"}


@dataclass(frozen=True)
class Ranked:
    """A loop's rule as a call, and as a function of how many of the ids are wanted that it puts first.

    `accept`: how drafts are accepted; `chances`: the function of the logits that the rule draws by; `drawn`: it draws.
    """

    call: Call
    best: Callable[[int], tuple[Callable[..., Tensor], dict[str, Spec]]]
    chances: Callable[[], tuple[Callable[..., Tensor], dict[str, Spec]]]
    accept: Acceptance = MATCH
    drawn: bool = False


def ranking(program: Program, call: Call, accept: Acceptance) -> Ranked:
    """The rule of a loop that the call runs; where it makes choices, drafts of these count that it makes too."""
    meta, sampled = program.meta, draws(program.graphs[call.graph])
    function = partial(rule, chosen(tuple(meta["rules"])), int(meta["vocab"]), sampled, (), meta.get("never", ()))
    return Ranked(call, function, partial(function, chances=True), accept if sampled else MATCH, sampled)


@dataclass
class Drafter:
    """Calls before the prompt's round, in it after its rows are placed, and in each round.

    A drafter whose rows are computed by the call that checks nodes adds them in `widened`, says which values that call
    reads (`fed`) and how its `logits` are called, takes them apart in `narrowed`, and drafts in `settled`, once it is
    known which nodes count.
    """

    state: dict[str, StateSpec] = field(default_factory=dict)
    before: list[Call] = field(default_factory=list)
    prompt: list[Call] = field(default_factory=list)
    rounds: list[Call] = field(default_factory=list)
    widened: list[Call] = field(default_factory=list)
    fed: Mapping[str, str] = field(default_factory=lambda: NODES)
    logits: str = "logits"
    narrowed: list[Call] = field(default_factory=list)
    settled: list[Call] = field(default_factory=list)


def guess(made: Made, shape: Shape, depth: int, rule: Ranked, rows: list[int]) -> Call:
    """The call that drafts the children of a level's nodes, whose logits are those of `rows`."""
    if rule.accept.reads("drafted"):
        return drawn(made, shape, depth, rule, rows)
    count, (most, chosen) = len(shape.level(depth)), shape.drafted(depth)
    function, inputs = rule.best(most)
    given = {n: s for n, s in inputs.items() if n not in ("logits", "streams", "position")}
    sampled = "position" in inputs

    def draft(logits: Tensor, **values: Tensor) -> Tensor:
        found, batch = logits.index_select(1, values["rows"]).to(F32).flatten(0, 1), logits.shape[0]
        held = {n: values[n] for n in given}
        if sampled:
            places = (values["origin"] + depth + 1).unsqueeze(1).expand(batch, count)
            held |= {"position": places.flatten()}
            held |= {"streams": values["streams"].unsqueeze(1).expand(batch, count).flatten()}
        return function(found, **held).reshape(batch, count * most).index_select(1, values["chosen"])

    more = {"origin": ROWS, "streams": ROWS} if sampled else {}
    graph = made.add(
        f"guess_{rule.call.graph}_{depth}", draft, {"logits": Spec(F32, ("B", "R", made.vocab)), **given, **more},
        [f"level_{depth + 1}"], tables={"chosen": torch.tensor(chosen), "rows": torch.tensor(rows)},
    )  # fmt: skip
    reads = {n: rule.call.reads.get(n, n) for n in graph.inputs} | {"logits": "draft_logits"}
    return Call(graph.name, {n: reads[n] for n in graph.inputs}, {n: n for n in graph.outputs})


def drawn(made: Made, shape: Shape, depth: int, rule: Ranked, rows: list[int]) -> Call:
    """As `guess`, but each child is a draw with noise of its own, by the logits `drafted_d` [B, nodes, V]."""
    count, (most, chosen) = len(shape.level(depth)), shape.drafted(depth)
    function, inputs = rule.chances()
    given = {n: s for n, s in inputs.items() if n != "logits"}

    def draft(
        logits: Tensor, seed: Tensor, streams: Tensor, origin: Tensor, **values: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        found, batch = logits.index_select(1, values["rows"]).to(F32).flatten(0, 1), logits.shape[0]
        chances = function(found, **{n: values[n] for n in given})
        streams, places = (v.unsqueeze(1).expand(batch, count).flatten() for v in (streams, origin + depth + 1))
        ids = [draw(chances, beside(seed, DRAFTS + rank), streams, places) for rank in range(most)]
        level = torch.stack(ids, 1).reshape(batch, count * most).index_select(1, values["chosen"])
        return level, chances.reshape(batch, count, made.vocab)

    graph = made.add(
        f"draw_{rule.call.graph}_{depth}", draft,
        {"logits": Spec(F32, ("B", "R", made.vocab)), "seed": SCALAR, "streams": ROWS, "origin": ROWS, **given},
        [f"level_{depth + 1}", f"drafted_{depth}"],
        tables={"chosen": torch.tensor(chosen), "rows": torch.tensor(rows)},
    )  # fmt: skip
    reads = {n: rule.call.reads.get(n, n) for n in graph.inputs} | {"logits": "draft_logits"}
    return Call(graph.name, reads, {n: n for n in graph.outputs})


def certain(made: Made, shape: Drafts) -> Call:
    """The call that says by which logits a chain of given ids was drawn: each is the only one that could be."""

    def one(**levels: Tensor) -> tuple[Tensor, ...]:
        ids = [level.unsqueeze(2) == torch.arange(made.vocab) for level in levels.values()]
        return tuple(torch.where(here, 0.0, -torch.inf) for here in ids)

    levels = {f"level_{d + 1}": Spec(I64, ("B", 1)) for d in range(shape.deepest)}
    return call_by_name(made.add("certain", one, levels, [f"drafted_{d}" for d in range(shape.deepest)]))


def grown(made: Made, shape: Shape, depth: int, root: bool) -> Call:
    """The call that says which rows the drafter computes next: the nodes down to a depth, `root` among them or not."""
    kept = [node for node, d in enumerate(shape.depth) if (0 if root else 1) <= d <= depth]
    levels = {f"level_{d}": Spec(I64, ("B", len(shape.level(d)))) for d in range(1, depth + 1)}
    tables = {"depth": torch.tensor([shape.depth[n] for n in kept])}

    def grow(window: Tensor, origin: Tensor, live: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        newest = window.gather(1, ((window >= 0).to(I64).sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
        ids = torch.cat([*([newest] if root else []), *(given[n] for n in levels)], 1)
        places = origin.unsqueeze(1) + given["depth"]
        return ids, torch.where(live.unsqueeze(1) & (places < made.capacity), places, -1)

    inputs = {"window": shape.window, "origin": ROWS, "live": Spec(BOOL, ("B",)), **levels}
    return call_by_name(made.add(f"grow_{depth}", grow, inputs, ["draft_ids", "draft_positions"], tables=tables))


@dataclass(frozen=True)
class Growth:
    """How drafts of a shape come one level after the other, where the rule drafts from logits after each node.

    `rows(depth, root)`: the call that says which rows are computed next, the nodes down to a depth, `root` among them
    or not; `children(depth, root)`: the call that drafts below that depth by these rows' logits; `last`: what follows.
    """

    rows: Callable[[int, bool], Call]
    children: Callable[[int, bool], Call]
    last: Sequence[Call] = ()


def fixed(made: Made, shape: Shape, rule: Ranked) -> Growth:
    """A tree that is always the same."""

    def children(depth: int, root: bool) -> Call:
        before = 0 if root or depth == 0 else 1
        return guess(made, shape, depth, rule, [node - before for node in shape.level(depth)])

    return Growth(partial(grown, made, shape), children)


def where(made: Made) -> Call:
    """The call that says where the newest ids stand, and which sequences go on."""

    def newest(lengths: Tensor, counts: Tensor, limit: Tensor, done: Tensor) -> tuple[Tensor, ...]:
        return lengths + counts - 1, ~done & (counts < limit)

    inputs = {"lengths": ROWS, "counts": ROWS, "limit": SCALAR, "done": Spec(BOOL, ("B",))}
    return call_by_name(made.add("newest", newest, inputs, ["origin", "live"]))


def drafting(call: Call, prefix: str) -> Call:
    """A step for nodes on what `grown` writes; the state's names begin with the prefix, and so does the stash's."""
    given = {"ids": "draft_ids", "positions": "draft_positions", "pairs": "draft_pairs"}
    reads = {n: given.get(n, prefix + v) for n, v in call.reads.items()}
    writes = {n: "draft_logits" if n == "logits" else prefix + v for n, v in call.writes.items()}
    return Call(call.graph, reads, writes)


def own_step(made: Made, growth: Growth, levels: Sequence[Graph]) -> Drafter:
    """Drafts by a cheaper form of the target's step: for the root, for it and the first level, and so on."""
    made.graphs |= {g.name: g for g in levels}
    rounds = [where(made)]
    for depth, level in enumerate(levels):
        rounds += [growth.rows(depth, True), drafting(call_by_name(level), ""), growth.children(depth, True)]
    return Drafter(rounds=[*rounds, *growth.last])


@dataclass(frozen=True)
class Model:
    """Another model's step, the same for a chain and for the first levels of a tree; all names begin with draft_."""

    step: Graph
    chain: Graph
    settle: Graph
    levels: Sequence[Graph]
    state: Mapping[str, StateSpec]


def own_model(made: Made, shape: Drafts, growth: Growth, model: Model) -> Drafter:
    """Drafts by a model of its own: each round it reads the ids that came last, then the tree as it grows."""
    made.graphs |= {g.name: g for g in (model.step, model.chain, model.settle, *model.levels)}
    fed = {"ids": "feed", "slots": "slots", "positions": "positions"}
    step = Call(
        model.step.name,
        {n: fed.get(n, "draft_" + n) for n in model.step.inputs},
        {n: "draft_" + n for n in model.step.outputs},
    )
    chain = call_by_name(model.chain)
    settle = Call(
        model.settle.name,
        {n: {"path": "window_path", "start": "window_start", "origin": "window_origin"}.get(n, "draft_" + n)
         for n in model.settle.inputs},
        {n: "draft_" + n for n in model.settle.outputs},
    )  # fmt: skip
    count = shape.deepest + 1

    def follow(window: Tensor, origin: Tensor, live: Tensor, pads: Tensor) -> tuple[Tensor, ...]:
        there, ahead = (window >= 0) & live.unsqueeze(1), torch.arange(count)
        first = origin - there.to(I64).sum(1) + 1
        positions = torch.where(there, first.unsqueeze(1) + ahead, -1)
        return window.clamp(min=0), positions, torch.where(there, ahead, -1), pads + first, first

    def last(draft_logits: Tensor, window: Tensor) -> Tensor:
        place = ((window >= 0).to(I64).sum(1) - 1).clamp(min=0)
        return draft_logits.gather(1, place.reshape(-1, 1, 1).expand(-1, 1, made.vocab))

    made.add(
        "follow", follow, {"window": shape.window, "origin": ROWS, "live": Spec(BOOL, ("B",)), "pads": ROWS},
        ["draft_ids", "draft_positions", "window_path", "window_start", "window_origin"],
    )  # fmt: skip
    made.add(
        "last_drafted",
        last,
        {"draft_logits": Spec(F32, ("B", "R", made.vocab)), "window": shape.window},
        ["draft_logits"],
    )
    rounds = [where(made), call_by_name(made.graphs["follow"]), drafting(chain, "draft_"), settle]
    rounds += [call_by_name(made.graphs["last_drafted"]), growth.children(0, False)]
    for depth, level in enumerate(model.levels, 1):
        rounds += [growth.rows(depth, False), drafting(call_by_name(level), "draft_"), growth.children(depth, False)]
    state = {"draft_" + n: s for n, s in model.state.items()}
    return Drafter(state, prompt=[step], rounds=[*rounds, *growth.last])


def from_text(made: Made, shape: Drafts, rule: Ranked) -> Drafter:
    """Drafts a chain from the ids so far, the newest first in `history` int64 [B, C], -1 after them."""
    size, count = max(8, min(made.capacity, LATEST)), shape.deepest
    history = Spec(I64, ("B", size))

    def remember(prompt: Tensor, lengths: Tensor) -> Tensor:
        places = torch.arange(size)
        ids = prompt.index_select(1, (prompt.shape[1] - 1 - places).clamp(min=0))
        return torch.where(places < lengths.unsqueeze(1), ids, -1)

    def recall(window: Tensor, history: Tensor) -> tuple[Tensor, ...]:
        new = (window >= 0).to(I64).sum(1, keepdim=True)
        rows = torch.cat([window.flip(1), history], 1)
        history = rows.gather(1, (window.shape[1] - new + torch.arange(size)).clamp(max=rows.shape[1] - 1))
        alike = [(history[:, 1 + i : size - 2 + i] == history[:, i : i + 1], 4.0 / 2**i) for i in range(3)]
        first, second, third = [torch.where(same, worth, 0.0) for same, worth in alike]
        start = (first + second + third).argmax(1, keepdim=True)
        drafts = history.gather(1, start - torch.arange(count) % (start + 1)).clamp(min=0)
        return history, *(drafts[:, i : i + 1].clone() for i in range(count))

    levels = [f"level_{d}" for d in range(1, count + 1)]
    prompt = {"prompt": Spec(I64, ("B", "P")), "lengths": ROWS}
    before = call_by_name(made.add("remember", remember, prompt, ["history"], "prologue"))
    rounds = [
        call_by_name(made.add("recall", recall, {"window": shape.window, "history": history}, ["history", *levels]))
    ]
    rounds += [certain(made, shape)] if rule.accept.reads("drafted") else []
    return Drafter({"history": StateSpec("tokens", history, -1)}, before=[before], rounds=rounds)
