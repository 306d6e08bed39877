"""The reference, asked what it makes of given ids: its forward in fp32 and fp64.

An answer depends on the request and the rounds alone. It is kept, so that each request is computed once, however many
passes are validated against the same reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from aropt.ir import ops
from aropt.ir.control import Call, calls, loops
from aropt.ir.executor import Values
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program, dict_root
from aropt.loops.requests.cases import Case, Requests, requests
from aropt.loops.scheme import scheme_of

NUDGE = 1e-5  # a thousandth of a step of the largest values of eight bits
NUDGED = "nudge."  # before the names of factors
EPS = torch.finfo(torch.float32).eps
KEPT = 2**28  # bytes of logits
AT_ONCE = 2**22  # logits of one forward for several prompts, and of what is kept of a case
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Forward:
    """What the forward makes of ids [T, ...], as a batch of one: its results in fp32 and in fp64, and their noise."""

    ids: Tensor
    single: Values
    double: Values

    @functools.cached_property
    def floor(self) -> float:
        return max(noise_floor(v, self.double[n]) for n, v in self.single.items() if v.is_floating_point())

    def begins(self, ids: Tensor, causal: bool) -> bool:
        """Whether it has the results for these ids [T, ...] too."""
        known = len(ids) <= len(self.ids) if causal else len(ids) == len(self.ids)
        return known and torch.equal(self.ids[: len(ids)], ids)

    def until(self, ids: Tensor) -> Forward:
        """The results for these ids, which it begins with."""
        if len(ids) == len(self.ids):
            return self
        single, double = ({n: v[:, : len(ids)] for n, v in values.items()} for values in (self.single, self.double))
        return Forward(ids, single, double)


class Oracle:
    """The reference: its forward in fp32 and fp64, and what it answered."""

    def __init__(self, reference: Program, seed: int = 0, thorough: bool = False) -> None:
        self.program, self.seed, self.thorough = reference, seed, thorough
        self.eager = Eager(reference)
        self.model, self.branches = forward_of(reference)
        self.known: dict[Any, Any] = {}
        self.kept = 0  # bytes
        self.causal = scheme_of(reference).forced
        self.ahead: dict[Ids, Forward] = {}  # of the case that is looked at
        self.before: dict[Ids, Forward] = {}  # and of the one before: a stop id only ends it earlier
        self.answers: dict[Case, list[list[int]]] = {}  # without stop ids, as programs that passed gave them
        self.double: fx.GraphModule | None = None

    @functools.cached_property
    def requests(self) -> Requests:
        """What programs are compared with it on."""
        return requests(self.program, self.seed, self.thorough)

    @property
    def exact(self) -> fx.GraphModule:
        """The forward in fp64."""
        if self.double is None:
            graph = self.program.graphs[self.model.graph]
            self.double = in_double(graph.fx, {w: self.program.weights[w] for w in graph.weights()})
        return self.double

    def rest(self) -> None:
        """Gives the memory of the weights in fp64 back until the forward is asked again."""
        self.double = None
        self.ahead, self.before = {}, {}

    def begin(self) -> None:
        """Another case: of the forwards that are kept, those of the one before are."""
        self.ahead, self.before = {}, self.ahead

    def foresee(self, rows: Sequence[Tensor]) -> list[Forward]:
        """What the forward makes of each of these ids [T, ...]; as few calls as there is room for, of those not known.

        The shorter ones are padded after their ends, which the others of a causal forward don't see.
        """
        keys = [tuple(ids.flatten().tolist()) for ids in rows]
        found = {key: self.begun(key, ids) for key, ids in zip(keys, rows, strict=True)}
        groups: dict[int, list[Ids]] = {}
        fresh = {key: ids for key, ids in zip(keys, rows, strict=True) if found[key] is None}
        for key, ids in fresh.items():
            groups.setdefault(0 if self.causal else len(ids), []).append(key)
        for group in groups.values():
            at_once = self.fits([fresh[key] for key in group])
            for some in [group] if at_once else [[key] for key in group]:
                found |= zip(some, self.together([fresh[key] for key in some]), strict=True)
        return [self.keep(key, made) for key in keys if (made := found[key]) is not None]

    def together(self, rows: Sequence[Tensor]) -> Iterator[Forward]:
        """One call for all of these ids."""
        longest, inner = max(map(len, rows)), (0, 0) * (rows[0].dim() - 1)  # a window's ids
        joined = torch.stack([functional.pad(ids, (*inner, 0, longest - len(ids))) for ids in rows])
        found = self.forward({"ids": joined})
        for i, ids in enumerate(rows):
            single, double = ({n: v[i : i + 1] for n, v in values.items()} for values in found)
            yield Forward(joined[i], single, double).until(ids)

    def fits(self, rows: Sequence[Tensor]) -> bool:
        """Whether there is room for the logits of one call for all of these ids."""
        longest = max(map(len, rows), default=0)
        return sum(longest * ids[0].numel() for ids in rows) * self.program.meta["vocab"] <= AT_ONCE

    def at_once(self, size: int) -> int:
        """How many logits of that size there is room for, one at least."""
        return max(1, AT_ONCE // size)

    def begun(self, key: Ids, ids: Tensor) -> Forward | None:
        """What is known of these ids, in a causal forward also as the beginning of longer ones."""
        found = self.ahead.get(key) or self.before.get(key)
        if found is None and self.causal:
            found = next((made for longer, made in self.before.items() if longer[: len(key)] == key), None)
        return found and found.until(ids)

    def keep(self, key: Ids, made: Forward) -> Forward:
        """Returns it, and keeps it while what is kept of the case takes no more room than AT_ONCE."""
        if held([*self.ahead.values(), made]) <= AT_ONCE:
            self.ahead[key] = made
        return made

    def forward(self, inputs: Values, state: Values | None = None) -> tuple[Values, Values]:
        """The forward's results in fp32, and in fp64 from the fp64 values of its state (otherwise from fp32's)."""
        graph = self.program.graphs[self.model.graph]
        wide = [(state or {}).get(n, inputs[n]) for n in graph.inputs]
        with torch.inference_mode():
            single = self.eager.call(self.model.graph, inputs)
            doubles = self.nudged([v.double() if v.is_floating_point() else v for v in wide])
            found = [
                farthest(single[n], *made) for n, made in zip(graph.outputs, zip(*doubles, strict=True), strict=True)
            ]
        return single, dict(zip(graph.outputs, found, strict=True))

    def nudged(self, inputs: list[Tensor]) -> list[Any]:
        """What the forward in fp64 returns; where it has nudges, also with these the other way."""
        factors, found = [b for name, b in self.exact.named_buffers() if name.startswith(NUDGED)], []
        for _ in range(2 if factors else 1):
            found.append(self.exact(*inputs))
            for factor in factors:
                factor.neg_().add_(2)
        return found

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept by `key` while there is room for it: `size` bytes."""
        if key in self.known:
            return self.known[key]
        made = make()
        if self.kept + made.size <= KEPT:
            self.kept += made.size
            self.known[key] = made
        return made


def forward_of(program: Program) -> tuple[Call, int]:
    """The call of the model's forward in a round, which has weights and leads to the evidence; how many there are."""
    loop = next(loop for loop in loops(program.control) if loop.evidence and not loop.internal)
    body = list(calls(loop.body))
    end = next(i for i, call in enumerate(body) if loop.evidence in call.writes.values())
    found = [call for call in body[: end + 1] if program.graphs[call.graph].weights()]
    return found[-1], sum(call.graph == found[-1].graph for call in found)


class Oracles:
    """The oracle of the latest reference, so that what it answered after one pass is known after the next."""

    def __init__(self, seed: int = 0, thorough: bool = False) -> None:
        self.seed, self.thorough = seed, thorough
        self.latest: Oracle | None = None

    def of(self, reference: Program) -> Oracle:
        if self.latest is None or self.latest.program is not reference:
            self.latest = Oracle(reference, self.seed, self.thorough)
        return self.latest


def held(kept: Sequence[Forward]) -> int:
    """How many values there is memory for: parts of one forward share it, and each keeps all of it."""
    storages = {v.untyped_storage().data_ptr(): v for one in kept for v in one.single.values()}
    return sum(v.untyped_storage().nbytes() // v.itemsize for v in storages.values())


def noise_floor(single: Tensor, double: Tensor) -> float:
    """Largest distance between fp32 and fp64 logits, and at least a few units in the last place; never 0."""
    finite = torch.isfinite(single) & torch.isfinite(double)
    if not finite.any():
        return 4 * EPS
    single, double = single[finite].double(), double[finite]
    units, least = 4 * EPS * float(single.abs().max()), torch.finfo(torch.float32).tiny  # of logits that are all 0
    return max(units, float((single - double).abs().max()), least)


def farthest(single: Tensor, one: Tensor, other: Tensor | None = None) -> Tensor:
    """Of one or two results in fp64, each value that is farther from fp32's."""
    if other is None or not single.is_floating_point():
        return one
    return torch.where((one - single).abs() >= (other - single).abs(), one, other)


def in_double(graph: fx.Graph, weights: dict[str, Tensor]) -> fx.GraphModule:
    """The graph in fp64: weights, constants and casts to fp32.

    What an op rounds coarsely (`OpDef.steps`) is moved by up to NUDGE of itself. Sums in another order move it too,
    over a step here and there, and fp64 alone would show that only where it happens to cross the same one. Steps lie on
    either side: `Oracle.nudged` moves to both.
    """
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))

    def widen(value: Any) -> Any:
        return torch.float64 if value in (torch.float32, torch.bfloat16, torch.float16) else value

    for node in copy.nodes:
        node.args = fx.node.map_aggregate(node.args, widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
    double = {n: w.double() if w.is_floating_point() else w for n, w in weights.items()}
    for node in list(copy.nodes):
        nudge(copy, node, double)
    return fx.GraphModule(dict_root(list(double), double), copy)


def nudge(graph: fx.Graph, node: Any, weights: dict[str, Tensor]) -> None:
    """Multiplies what the node rounds coarsely, if it does, with 1 and a little noise."""
    at = ops.stepping(node) if node.op == "call_function" else None
    if at is None:
        return
    x, name = node.args[at], f"{NUDGED}{node.name}"
    noise = torch.rand(int(x.meta["val"].shape[-1]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[name] = 1 + NUDGE * (2 * noise - 1)
    with graph.inserting_before(node):
        factor = graph.get_attr(name)
        moved = graph.call_function(torch.mul, (x, factor))
    factor.meta["nudge"] = moved.meta["nudge"] = True
    node.args = (*node.args[:at], moved, *node.args[at + 1 :])
