"""Rounds that check a token tree for each sequence of a batch: what is drafted goes in, what counts comes out.

    lead       the prompt's first id as the window that rounds go on from
    spread     the tree's rows: the newest id, then the drafts, level by level (written by a drafter, see drafters.py)
    node_rows  the logits of all nodes
    accept     which nodes count, and the ids that they give (see accept.py)
    merge      the ids of all rounds, in order

A round writes `window` int64 [B, D + 1], the ids of a sequence's path and the one after it, -1 after them. `counts`
int64 [B] says how many new ids each sequence has: they accept different lengths. Its newest id is no row of the state
yet: it is the tree's root.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.frontend.trace import capture_function
from aropt.ir.program import Graph, Role, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.loops.accept import MATCH, Acceptance, acceptance
from aropt.loops.speculate import together
from aropt.rewriting.tree import Nodes

BOOL, F32, I64 = torch.bool, torch.float32, torch.int64
SCALAR, ROWS = Spec(I64), Spec(I64, ("B",))
MOST = 64  # nodes: their attention to each other grows with the square
HINT = (
    "write chain:4, or the children of a node on each level, as 3x2x1, or each draft's parent, as 0-0-1, or grown:4x3:8"
    " for the 8 likeliest of 4 levels of 3 nodes"
)


@dataclass(frozen=True)
class Shape:
    """A tree by the parent of each node; node 0 is the root, and nodes of a level stand together."""

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        wrong = next((i for i, p in enumerate(self.parents[1:], 1) if not 0 <= p < i), 0)
        if wrong:
            raise refused(f"the parent of node {wrong} is {self.parents[wrong]}, which does not come before it")
        if list(self.depth) != sorted(self.depth):
            raise refused("a node stands before one that is less deep")
        if not 2 <= len(self.parents) <= MOST:
            raise refused(f"it has {len(self.parents) - 1} drafts, and may have 1 to {MOST - 1}")

    @classmethod
    def parse(cls, text: str) -> Shape:
        """The shape that a text says (see HINT). Raises UsageError."""
        kind, _, number = text.partition(":")
        try:
            if kind == "chain":
                return cls(tuple(range(-1, int(number))))
            if "-" in text:
                return cls((-1, *map(int, text.split("-"))))
            widths = [int(part) for part in text.split("x")]
        except ValueError:
            raise refused(f"'{text}' is no tree") from None
        parents, level = [-1], [0]
        for width in widths:
            above, level = level, list(range(len(parents), len(parents) + len(level) * width))
            if not level or level[-1] >= MOST:
                raise refused(f"'{text}' has no drafts, or more than {MOST - 1}")
            parents += [node for node in above for _ in range(width)]
        return cls(tuple(parents))

    @cached_property
    def depth(self) -> tuple[int, ...]:
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if parent >= 0 else 0)
        return tuple(found)

    @property
    def chain(self) -> bool:
        """Whether each node but the last has one child."""
        return self.parents == tuple(range(-1, self.nodes - 1))

    @property
    def nodes(self) -> int:
        return len(self.parents)

    @property
    def widest(self) -> int:
        """The most children that a node has."""
        return max(map(self.parents.count, self.parents[1:]))

    @property
    def deepest(self) -> int:
        return self.depth[-1]

    @property
    def window(self) -> Spec:
        return Spec(I64, ("B", self.deepest + 1))

    @property
    def offered(self) -> dict[str, Spec]:
        """The values that hold a round's drafts."""
        return {f"level_{d}": Spec(I64, ("B", len(self.level(d)))) for d in range(1, self.deepest + 1)}

    def level(self, depth: int) -> list[int]:
        """The nodes of a depth."""
        return [node for node, d in enumerate(self.depth) if d == depth]

    def drafted(self, depth: int) -> tuple[int, list[int]]:
        """Of what stands below the nodes of that depth: the most children of one, K; each as its place in [.., K]."""
        above, below = self.level(depth), self.level(depth + 1)
        ranks = [sum(self.parents[other] == self.parents[node] for other in range(node)) for node in below]
        most = max(ranks) + 1
        return most, [above.index(self.parents[n]) * most + r for n, r in zip(below, ranks, strict=True)]

    def rows(self, depths: range) -> Nodes:
        """What a step's rows are that compute the nodes of these depths."""
        kept = [node for node, depth in enumerate(self.depth) if depth in depths]
        pairs = None if self.chain else self.pairs[kept][:, kept]
        return Nodes(len(kept), self.deepest + 1, self.chain, pairs)

    @cached_property
    def pairs(self) -> Tensor:
        """bool [n, n]: whether the second node is above the first, or the first itself."""
        found = torch.eye(self.nodes, dtype=torch.bool)
        for node, parent in enumerate(self.parents[1:], 1):
            found[node] |= found[parent]
        return found

    @property
    def checked(self) -> Nodes:
        """What the rows of the step that checks the tree are."""
        return self.rows(range(MOST))

    def tables(self) -> dict[str, Tensor]:
        """What is always the same of `parents`, `depth` and `pairs`; the others are values [B, ..] of a round."""
        return {"parents": torch.tensor(self.parents), "depth": torch.tensor(self.depth), "pairs": self.pairs}


class Drafts(Protocol):
    """What passes and rounds ask of a shape: how many nodes a tree has, how deep it is, what is known beforehand."""

    @property
    def chain(self) -> bool: ...

    @property
    def checked(self) -> Nodes: ...

    @property
    def nodes(self) -> int: ...

    @property
    def widest(self) -> int: ...

    @property
    def deepest(self) -> int: ...

    @property
    def window(self) -> Spec: ...

    @property
    def offered(self) -> dict[str, Spec]: ...

    def tables(self) -> dict[str, Tensor]: ...

    def rows(self, depths: range) -> Nodes: ...


def state(tree: Drafts) -> dict[str, StateSpec]:
    """What survives a round, besides what the step and its drafter keep."""
    return {
        "begun": StateSpec("flag", Spec(BOOL), 0),
        "window": StateSpec("tokens", tree.window, -1),
        "counts": StateSpec("lengths", ROWS, 0),
    }


def refused(why: str) -> UsageError:
    return UsageError(what="this is no tree of drafts", where="shape", why=why, hint=HINT)


@dataclass
class Made:
    """Graphs for a model of so many ids and positions, and the tables that they read as weights."""

    graphs: dict[str, Graph]
    weights: dict[str, Tensor]
    vocab: int
    capacity: int

    def add(
        self,
        name: str,
        function: Callable[..., Any],
        inputs: Mapping[str, Spec],
        outputs: Sequence[str],
        role: Role = "bookkeeping",
        tables: Mapping[str, Tensor] = {},
    ) -> Graph:
        """Captures a function; `tables` are values of its last inputs that are always the same."""
        held = {n: Spec(t.dtype, tuple(t.shape)) for n, t in tables.items()}
        made = capture_function(name, function, {**inputs, **held}, list(outputs), role)
        for node in [n for n in made.fx.nodes if n.op == "placeholder" and n.name in held]:
            with made.fx.inserting_before(node):
                node.replace_all_uses_with(made.fx.get_attr(f"trees.{name}.{node.name}"))
            made.fx.erase_node(node)
        self.weights |= {f"trees.{name}.{n}": t.contiguous() for n, t in tables.items()}
        self.graphs[name] = build(name, made.fx, dict(inputs), list(outputs), self.weights, role)
        return self.graphs[name]


def rounds(made: Made, shape: Drafts, most: int, accept: Acceptance = MATCH) -> None:
    """The graphs that do not depend on where drafts come from. `most`: sequences of a batch that is speculated.

    `accept`: how drafts of ids that are drawn are accepted; those of choices, where the rule picks them.

    Nodes beyond the capacity, which never count, have no position, as nothing may see them: of a chain, a row sees
    all rows whose positions are not after its own.
    """
    deepest, vocab = shape.deepest, made.vocab
    tables = shape.tables()
    depth, kept = {} if "depth" in tables else {"depth": Spec(I64, ("B", shape.nodes))}, {"depth"} & set(tables)
    logits = Spec(F32, ("B", "R", vocab))

    def lead(token: Tensor) -> tuple[Tensor, ...]:
        rest = torch.full((token.shape[0], deepest), -1)
        return torch.cat([token.unsqueeze(1), rest], 1), (token >= 0).to(I64)

    def spread(
        window: Tensor, lengths: Tensor, pads: Tensor, counts: Tensor, limit: Tensor, done: Tensor, streams: Tensor,
        **given: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        newest = window.gather(1, ((window >= 0).to(I64).sum(1, keepdim=True) - 1).clamp(min=0)).clamp(min=0)
        at, live = lengths + counts - 1, ~done & (counts < limit)
        places = at.unsqueeze(1) + given["depth"]
        return (
            torch.cat([newest, *(given[name] for name in shape.offered)], 1),
            torch.where(live.unsqueeze(1) & (places < made.capacity), places, -1), (places + 1).flatten(),
            streams.unsqueeze(1).expand_as(places).flatten(), pads + at, at, torch.where(live, limit - counts, 0),
        )  # fmt: skip

    made.add(
        "open", lambda finished, begun, lengths: (begun | finished, torch.ones_like(lengths).sum() <= most),
        {"finished": Spec(BOOL), "begun": Spec(BOOL), "lengths": ROWS}, ["begun", "speculates"], "prologue",
    )  # fmt: skip
    made.add("opened", lambda count: count > 0, {"count": SCALAR}, ["begun"])
    made.add("lead", lead, {"token": ROWS}, ["window", "counts"], "commit")
    made.add(
        "spread", spread,
        {"window": shape.window, "lengths": ROWS, "pads": ROWS, "counts": ROWS, "limit": SCALAR,
         "done": Spec(BOOL, ("B",)), "streams": ROWS, **shape.offered, **depth},
        ["nodes", "node_positions", "node_places", "node_streams", "start", "origin", "room"],
        tables={name: tables[name] for name in kept},
    )  # fmt: skip
    made.add("node_rows", lambda logits: logits.to(F32).flatten(0, 1), {"logits": logits}, ["row"])
    for one in [MATCH] if accept == MATCH else [MATCH, accept]:
        accepting(made, shape, tables, one)
    made.add(
        "merge", together, {"first": Spec(I64, ("B", "F")), "windows": Spec(I64, ("B", "W", deepest + 1))},
        ["generated"], "epilogue",
    )  # fmt: skip


def accepting(made: Made, shape: Drafts, tables: Mapping[str, Tensor], by: Acceptance) -> None:
    """The graph that says which nodes count. Drafts that are accepted by their chances are of a tree of one shape."""
    offered = {"width": shape.widest} if by.reads("drafted") else {}
    rule, wanted = acceptance(by.name, shape.nodes, shape.deepest, made.vocab, **offered)
    levels = [f"drafted_{d}" for d in range(shape.deepest)] if by.reads("drafted") else []
    counts_of = [1, *(int(spec.dims[1]) for spec in shape.offered.values())]  # nodes of each depth
    flat, nodes = f"{shape.nodes}*B", shape.nodes
    varying = {n: wanted[n] for n in ("parents", "depth", "pairs") if n not in tables}
    drawn: dict[str, Spec] = {
        **({"picks": Spec(I64, (flat,))} if by.reads("picks") else {}),
        **({"node_logits": Spec(F32, (flat, made.vocab))} if by.reads("logits") else {}),
        **{n: Spec(F32, ("B", counts_of[d], made.vocab)) for d, n in enumerate(levels)},
        **({"seed": SCALAR, "streams": ROWS, "origin": ROWS} if by.reads("seed") else {}),
    }

    def accept(
        nodes: Tensor, room: Tensor, counts: Tensor, limit: Tensor, done: Tensor, stop: Tensor, **held: Tensor
    ) -> tuple[Tensor, ...]:
        given = {n: v for n, v in held.items() if n in wanted}
        given |= {n: held[n].unsqueeze(0) for n in tables}
        given |= {"tokens": nodes, "stop": stop, "room": room}
        if "picks" in drawn:
            given["picks"] = held["picks"].reshape(-1, shape.nodes)
        if "node_logits" in drawn:
            given["logits"] = held["node_logits"].reshape(-1, shape.nodes, made.vocab)
        if levels:  # nobody asks what comes after leaves of the last level
            above = given["parents"] = given["parents"].expand(room.shape[0], -1).clone()
            last = torch.zeros(room.shape[0], counts_of[-1], made.vocab)
            given |= {"drafted": torch.cat([*(held[n] for n in levels), last], 1), "position": held["origin"] + 1}
        _, path, window, taken, ended = rule(**{name: given[name] for name in wanted})
        path = torch.where((room > 0).unsqueeze(1), path, -1)
        counts, done = counts + taken, done | ended
        return path, window, counts, done, (done | (counts >= limit)).all(), *([above] if levels else [])

    shown = ["node_parents"] if levels else []  # by which validation draws again; read here, so that it stays
    made.add(
        by.graph, accept,
        {"nodes": Spec(I64, ("B", nodes)), **drawn, "room": ROWS, "counts": ROWS, "limit": SCALAR,
         "done": Spec(BOOL, ("B",)), "stop": Spec(I64, ("K",)), **varying},
        ["path", "window", "counts", "done", "finished", *shown], "commit", {**tables, **by.fixed()},
    )  # fmt: skip
