"""The reference, asked what it makes of given tokens: its logits in fp32 and fp64, and what its rule picks.

An answer depends on the request and the tokens alone. It is kept, so that each request is computed once, however many
passes are validated against the same reference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from aropt.ir import ops
from aropt.ir.control import Call, calls, loops
from aropt.ir.executor import Executor, Values
from aropt.ir.interpreter import Eager, run
from aropt.ir.program import Program, Spec, dict_root
from aropt.ir.units import flat, ids_of, rows, rows_for, window
from aropt.loops.requests.cases import Case, Requests, requests
from aropt.loops.rules import inside
from aropt.loops.scheme import Mismatch

NUDGE = 1e-5  # a thousandth of a step of the largest values of eight bits
NUDGED = "nudge."  # before the names of factors
EPS = torch.finfo(torch.float32).eps
KEPT = 2**28  # bytes of logits
AT_ONCE = 2**22  # logits of one forward for several prompts, and of what is kept of a case
Ids = tuple[int, ...]


@dataclass
class Reply:
    """What the reference makes of one prompt and the tokens after it.

    `logits` float32 [branches, rounds, (W), V] of the rows that choose, `read` how many of the branches each round's
    rule depends on, `rules` each round's rule and what it reads besides, `floor` the noise floor of all rows.
    """

    problem: str = ""  # why it can't end with these tokens
    decided: list[int] = field(default_factory=list)
    rules: list[tuple[str, Values]] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    floor: float = 0.0

    @property
    def size(self) -> int:
        return 0 if self.logits is None else self.logits.nbytes


class Oracle:
    """The reference: its forward in fp32 and fp64, its rule, and what it answered."""

    def __init__(self, reference: Program, seed: int = 0, thorough: bool = False) -> None:
        self.program, self.seed, self.thorough = reference, seed, thorough
        self.eager = Eager(reference)
        self.model, self.branches = forward_of(reference)
        self.known: dict[Any, Any] = {}
        self.kept = 0  # bytes
        self.ahead: dict[Ids, tuple[Tensor, Tensor]] = {}  # logits of the case that is looked at
        self.before: dict[Ids, tuple[Tensor, Tensor]] = {}  # and of the one before: a stop id only ends it earlier
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

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] in fp32 and in fp64."""
        key = tuple(ids.flatten().tolist())
        found = self.begun(key, ids.shape[1])
        if found is None:
            single, double = self.forward({"ids": ids})
            found = self.keep(key, (single["logits"], double["logits"]))
        return found

    def begun(self, key: Ids, rows: int) -> tuple[Tensor, Tensor] | None:
        """The logits of these ids, if they are known, or were as the beginning of longer ones."""
        if key in self.ahead:
            return self.ahead[key]
        longer = next((k for k in self.before if k[: len(key)] == key), None)
        if longer is None:
            return None
        single, double = self.before[longer]
        return self.keep(key, (single[:, :rows], double[:, :rows]))

    def keep(self, key: Ids, logits: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the logits, and keeps them while the case's take no more room than AT_ONCE."""
        if held([*self.ahead.values(), logits]) <= AT_ONCE:
            self.ahead[key] = logits
        return logits

    def look_ahead(self, case: Case, tokens: list[list[int]]) -> None:
        """Runs the forward once for all prompts of a case that are new, the shorter ones padded after their ends."""
        self.ahead, self.before = {}, self.ahead
        known, vocab = self.known, int(self.program.meta["vocab"])
        right = [i for i, ids in enumerate(tokens) if ids and 0 <= min(ids) <= max(ids) < vocab]
        fresh = [i for i in right if (*case.row(i), tuple(tokens[i])) not in known]
        names, found = ("prompt", "negative")[: self.branches], []
        for i in fresh:
            inputs = case.inputs(self.program, [i])
            found += [forced(self, inputs[n], tokens[i]) for n in names]
        found = [ids for ids in found if self.begun(tuple(ids.flatten().tolist()), ids.shape[1]) is None]
        longest = max((ids.shape[1] for ids in found), default=0)
        size = len(found) * longest * math.prod(window(self.program.meta)) * vocab
        if len(found) < 2 or held(list(self.ahead.values())) + size > AT_ONCE:
            return
        inner = (0, 0) * (found[0].dim() - 2)  # a window's ids
        joined = torch.cat([functional.pad(ids, (*inner, 0, longest - ids.shape[1])) for ids in found])
        single, double = self.forward({"ids": joined})
        for i, ids in enumerate(found):
            part = single["logits"][i : i + 1, : ids.shape[1]], double["logits"][i : i + 1, : ids.shape[1]]
            self.keep(tuple(ids.flatten().tolist()), part)

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

    def reply(self, case: Case, i: int, tokens: list[int]) -> Reply:
        """What the reference makes of prompt `i` and these tokens."""
        made: Reply = self.once((*case.row(i), tuple(tokens)), lambda: answer(self, case, i, tokens))
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


def answer(oracle: Oracle, case: Case, i: int, tokens: list[int]) -> Reply:
    """Runs the reference's control on the tokens."""
    forced, meta = Forced(oracle, tokens), oracle.program.meta
    try:
        values = run(oracle.program, case.inputs(oracle.program, [i]), 0, forced)
    except Mismatch as mismatch:
        return Reply(str(mismatch))
    expected = [t for t in flat(values["generated"])[0] if t >= 0]
    if expected != tokens:
        return Reply(f"ends after {len(tokens)} tokens, the reference after {len(expected)}")
    if not forced.forwards:
        return Reply()
    single, double = (torch.cat(branches) for branches in zip(*forced.forwards, strict=True))
    first, read = len(rows(meta, case.prompts[i])) - 1, [forced.read(n) for n in range(len(forced.rules))]
    rules = [(graph, {n: v for n, v in values.items() if n != "logits"}) for graph, values in forced.rules]
    chosen = single[:, first : first + len(rules)].to(torch.float32, copy=True)
    return Reply("", forced.decided(), rules, read, chosen, noise_floor(single, double))


def forced(oracle: Oracle, ids: Tensor, tokens: list[int]) -> Tensor:
    """Prompts [B, P, (W)] and the tokens after them, but for the last row, which is not read."""
    meta = oracle.program.meta
    rows = max(rows_for(meta, len(tokens)) - 1, 0)
    given = torch.tensor(tokens[: ids_of(meta, rows)], dtype=torch.int64).reshape(rows, *window(meta))
    joined = torch.cat([ids, given.expand(ids.shape[0], *given.shape)], 1)
    return joined[:, : ids.shape[1] + rows - (not tokens)]


class Forced(Executor):
    """Runs the reference's control on the candidate's tokens: one full forward; the rule decides, but is overruled."""

    def __init__(self, oracle: Oracle, tokens: list[int]) -> None:
        self.oracle, self.tokens = oracle, tokens
        self.forwards: list[tuple[Tensor, Tensor]] = []  # logits of each branch, in fp32 and in fp64
        self.asked = 0  # calls of the forward
        self.rules: list[tuple[str, Values]] = []  # of each round, and what it reads

    def call(self, graph: str, inputs: Values) -> Values:
        tokens = self.tokens
        if graph == self.oracle.model.graph:
            ids, branch = inputs["ids"], self.asked % self.oracle.branches
            self.asked += 1
            if branch == len(self.forwards):
                self.forwards.append(self.oracle.logits(forced(self.oracle, ids, tokens)))
            single = self.forwards[branch][0]
            if ids.shape[1] > single.shape[1]:
                raise Mismatch(f"stops after {len(tokens)} tokens, the reference goes on")
            return {"logits": single[:, : ids.shape[1]]}
        if graph in ("greedy", "sample"):
            return {"token": self.overruled(graph, inputs)}
        return self.oracle.eager.call(graph, inputs)

    def overruled(self, graph: str, inputs: Values) -> Tensor:
        """The candidate's tokens of a round; what the rule reads is kept, see `decided`."""
        row = window(self.oracle.program.meta)
        width = math.prod(row)
        theirs = self.tokens[len(self.rules) * width :][:width]
        if not theirs:
            raise Mismatch(f"stops after {len(self.tokens)} tokens, the reference goes on")
        self.rules.append((graph, inputs))
        if len(theirs) < width:  # of a window that is cut, the rest is the rule's own
            theirs += self.oracle.eager.call(graph, inputs)["token"].flatten().tolist()[len(theirs) :]
        return torch.tensor([theirs]).reshape(1, *row)

    def decided(self) -> list[int]:
        """What the rule picks in each round: one call for all rounds that differ in nothing but their rows."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, (graph, values) in enumerate(self.rules):
            specs = self.oracle.program.graphs[graph].inputs
            shared = [id(values[n]) for n, spec in specs.items() if not batched(spec)]
            groups.setdefault((graph, *shared), []).append(number)
        found: dict[int, list[int]] = {}
        for numbers in groups.values():
            most = max(1, AT_ONCE // self.rules[numbers[0]][1]["logits"].numel())
            for start in range(0, len(numbers), most):
                found |= self.picks(numbers[start : start + most])
        return [token for number in sorted(found) for token in found[number]]

    def picks(self, numbers: list[int]) -> dict[int, list[int]]:
        """What the rule picks in these rounds, which one call takes as a batch: of each branch the rows of all."""
        graph, rounds = self.rules[numbers[0]][0], [self.rules[n][1] for n in numbers]
        specs = self.oracle.program.graphs[graph].inputs
        inputs = {n: torch.stack([v[n] for v in rounds], 1).flatten(0, 1) for n, s in specs.items() if batched(s)}
        inputs |= {n: rounds[0][n] for n, s in specs.items() if not batched(s)}
        tokens = self.oracle.eager.call(graph, inputs)["token"].reshape(len(numbers), -1)
        return dict(zip(numbers, tokens.tolist(), strict=True))

    def read(self, step: int) -> int:
        """How many branches the rule of that round depends on: outside the interval of guidance, one."""
        values = self.rules[step][1]
        if "guidance_from" in values and not inside(*(values[n] for n in ("guidance_from", "guidance_to", "count"))):
            return 1
        return 1 if "guidance" in values and float(values["guidance"]) == 1 else self.oracle.branches


def batched(spec: Spec) -> bool:
    """Whether a value has rows of each sequence of a batch."""
    first = str(spec.dims[0]) if spec.dims else ""
    return first == "B" or first.endswith("*B")


def held(kept: Sequence[tuple[Tensor, Tensor]]) -> int:
    """How many logits there is memory for: parts of one forward share it, and each keeps all of it."""
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // x.itemsize for x, _ in kept}
    return sum(found.values())


def noise_floor(single: Tensor, double: Tensor) -> float:
    """Largest distance between fp32 and fp64 logits, and at least a few units in the last place."""
    finite = torch.isfinite(single) & torch.isfinite(double)
    single, double = single[finite].double(), double[finite]
    return max(4 * EPS * float(single.abs().max()), float((single - double).abs().max())) if finite.any() else 4 * EPS


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
