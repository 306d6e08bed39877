"""Trees that grow where the drafter is sure (EAGLE-2, Li et al. 2024, 2406.16858, section 4).

On each level the `width` nodes go on whose paths have the best chances, by the drafter's own word; of all that were
drafted the `drafts` best are checked. A chance of a path is at most that of a shorter one, so that nodes above those
that are checked are checked too. Which tree this is differs from round to round and from sequence to sequence: its
`parents`, `depth` and `pairs` are values of the round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aropt.ir.control import Call
from aropt.ir.edit import call_by_name
from aropt.ir.program import Spec
from aropt.loops.drafters import Growth, Ranked, fixed
from aropt.loops.rules import gumbel_noise
from aropt.loops.trees import MOST, Drafts, Made, Shape, refused
from aropt.rewriting.tree import Nodes

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
ROWS = Spec(I64, ("B",))
SURE, NEVER = -1e-3, -50.0  # of a draft's logarithmic chance: so a path is never as good as a shorter one
GROWN = "grown"


@dataclass(frozen=True)
class Grown:
    """`steps` levels of `width` nodes each are drafted, of which the `drafts` best are checked."""

    steps: int
    width: int
    drafts: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.width < 1:
            raise refused(f"it has {self.steps} levels of {self.width} nodes")
        if self.steps * self.width >= MOST:
            raise refused(f"it drafts {self.steps * self.width} nodes, and may draft {MOST - 1}")
        if not self.steps <= self.drafts <= self.steps * self.width:
            raise refused(f"of {self.steps} levels of {self.width} nodes, {self.drafts} are no tree of that depth")

    @classmethod
    def parse(cls, text: str) -> Grown:
        """The shape that a text says, as grown:4x3:8. Raises UsageError."""
        try:
            _, levels, drafts = text.split(":")
            steps, width = map(int, levels.split("x"))
            return cls(steps, width, int(drafts))
        except ValueError:
            raise refused(f"'{text}' is no tree") from None

    @property
    def chain(self) -> bool:
        return False

    @property
    def nodes(self) -> int:
        return self.drafts + 1

    @property
    def widest(self) -> int:
        """The most children that a node may have."""
        return self.width

    @property
    def deepest(self) -> int:
        return self.steps

    @property
    def window(self) -> Spec:
        return Spec(I64, ("B", self.steps + 1))

    @property
    def offered(self) -> dict[str, Spec]:
        """The value that holds a round's drafts."""
        return {"drafts": Spec(I64, ("B", self.drafts))}

    def tables(self) -> dict[str, Tensor]:
        """Nothing of it is always the same."""
        return {}

    @property
    def checked(self) -> Nodes:
        """What the rows of the step that checks the tree are."""
        return Nodes(self.nodes, self.steps + 1)

    def rows(self, depths: range) -> Nodes:
        """What a step's rows are that compute the nodes of these depths."""
        count = sum(self.width if depth else 1 for depth in depths)
        return Nodes(count, self.steps + 1, chain=count == 1)

    def levels(self, name: str, dtype: torch.dtype, depth: int) -> dict[str, Spec]:
        """A value of each level down to a depth."""
        return {f"{name}_{d}": Spec(dtype, ("B", self.width)) for d in range(1, depth + 1)}

    def seen(self, depth: int) -> Spec:
        """`seen`: which nodes down to a depth are above which, or the same."""
        count = 1 + self.width * depth
        return Spec(BOOL, ("B", count, count))


Growing = Callable[[Made, Ranked], Growth]


def shaped(text: str) -> tuple[Drafts, Growing]:
    """The shape that a text says, and how its trees grow. Raises UsageError."""
    if text.partition(":")[0] == GROWN:
        grown = Grown.parse(text)
        return grown, lambda made, rule: growing(made, grown, rule)
    shape = Shape.parse(text)
    return shape, lambda made, rule: fixed(made, shape, rule)


def growing(made: Made, shape: Grown, rule: Ranked) -> Growth:
    """Calls that draft such trees."""
    return Growth(
        lambda depth, root: rows(made, shape, depth, root),
        lambda depth, root: children(made, shape, rule, depth, root),
        (best(made, shape),),
    )


def rows(made: Made, shape: Grown, depth: int, root: bool) -> Call:
    """The call that says which rows the drafter computes next, and what they see of each other."""
    depths = torch.arange(1, depth + 1).repeat_interleave(shape.width)
    levels = shape.levels("level", I64, depth)

    def extend(window: Tensor, origin: Tensor, live: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        newest = window.gather(1, ((window >= 0).to(I64).sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
        ids = torch.cat([*([newest] if root else []), *(given[n] for n in levels)], 1)
        places = origin.unsqueeze(1) + given["depths"]
        own = [given["seen"] if root else given["seen"][:, 1:, 1:].clone()] if depth else []
        return ids, torch.where(live.unsqueeze(1) & (places < made.capacity), places, -1), *own

    inputs = {"window": shape.window, "origin": ROWS, "live": Spec(BOOL, ("B",)), **levels}
    graph = made.add(
        f"extend_{depth}", extend, inputs | ({"seen": shape.seen(depth)} if depth else {}),
        ["draft_ids", "draft_positions", *(["draft_pairs"] if depth else [])],
        tables={"depths": torch.cat([torch.zeros(int(root), dtype=I64), depths])},
    )  # fmt: skip
    return call_by_name(graph)


def children(made: Made, shape: Grown, rule: Ranked, depth: int, root: bool) -> Call:
    """The call that drafts below the last level: the best ids, the chances of their paths, and who sees whom."""
    function, inputs = rule.chances()
    given = {n: s for n, s in inputs.items() if n != "logits"}
    count, width = shape.width if depth else 1, shape.width
    last = (shape.width * depth + 1 if root or depth == 0 else shape.width * depth) - count

    def branch(logits: Tensor, **values: Tensor) -> tuple[Tensor, ...]:
        batch = logits.shape[0]
        chances = function(
            logits.index_select(1, values["last"]).to(F32).flatten(0, 1), **{n: values[n] for n in given}
        )
        if "seed" in values:
            streams, places = (values[n].unsqueeze(1).expand(batch, count).flatten() for n in ("streams", "origin"))
            chances = chances - gumbel_noise(made.vocab, values["seed"], streams, places + depth + 1)
        found = torch.topk(chances.log_softmax(1), width)
        ids, chance = (x.reshape(batch, count * width) for x in (found.indices, found.values.clamp(NEVER, SURE)))
        seen = values["seen"] if depth else torch.ones(batch, 1, 1, dtype=BOOL)
        above = torch.zeros_like(ids)
        if depth:
            kept = torch.topk(
                (values[f"chance_{depth}"].unsqueeze(2) + chance.reshape(batch, count, width)).flatten(1), width
            )
            ids, chance, above = ids.gather(1, kept.indices), kept.values, kept.indices // width
        return ids, chance, joined(seen, above + (seen.shape[1] - count))

    noise = {"seed": Spec(I64), "streams": ROWS, "origin": ROWS} if rule.drawn else {}
    held = {f"chance_{depth}": Spec(F32, ("B", width)), "seen": shape.seen(depth)} if depth else {}
    graph = made.add(
        f"branch_{rule.call.graph}_{depth}", branch,
        {"logits": Spec(F32, ("B", "R", made.vocab)), **given, **noise, **held},
        [f"level_{depth + 1}", f"chance_{depth + 1}", "seen"], tables={"last": last + torch.arange(count)},
    )  # fmt: skip
    reads = {n: rule.call.reads.get(n, n) for n in graph.inputs} | {"logits": "draft_logits"}
    return Call(graph.name, {n: reads[n] for n in graph.inputs}, {n: n for n in graph.outputs})


def joined(seen: Tensor, above: Tensor) -> Tensor:
    """`seen` bool [B, m, m] with nodes after those there are, each below the node `above` int64 [B, w]."""
    batch, old, new = seen.shape[0], seen.shape[1], above.shape[1]
    paths = seen.gather(1, above.unsqueeze(2).expand(-1, -1, old))
    own = torch.eye(new, dtype=BOOL).unsqueeze(0).expand(batch, -1, -1)
    return torch.cat([torch.cat([seen, torch.zeros(batch, old, new, dtype=BOOL)], 2), torch.cat([paths, own], 2)], 1)


def best(made: Made, shape: Grown) -> Call:
    """The call that says which of all drafts are checked."""
    steps = shape.steps

    def choose(seen: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        ids, chances = (torch.cat([given[f"{n}_{d}"] for d in range(1, steps + 1)], 1) for n in ("level", "chance"))
        kept = torch.topk(chances, shape.drafts).indices.sort(1).values  # one level after the other
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1)
        pairs = seen.gather(1, rows.unsqueeze(2).expand(-1, -1, seen.shape[2]))
        pairs = pairs.gather(2, rows.unsqueeze(1).expand(-1, shape.nodes, -1))
        order = torch.arange(shape.nodes)
        parents = torch.where(pairs & (order != order.unsqueeze(1)), order, -1).amax(2)
        return ids.gather(1, kept), parents, pairs.to(I64).sum(2) - 1, pairs

    inputs = {"seen": shape.seen(steps), **shape.levels("level", I64, steps), **shape.levels("chance", F32, steps)}
    return call_by_name(made.add("choose", choose, inputs, ["drafts", "parents", "depth", "pairs"]))
