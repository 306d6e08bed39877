"""Validation: does a program generate what its reference generates? (design section 7)

The candidate generates; the reference then sees the same tokens in one full forward (teacher forcing), so one early
difference does not hide later ones. Logits must agree within a multiple of the noise floor: the distance between the
reference in fp32 and in fp64. Tokens must be those of the reference's own rule; a token may differ only where the
reference's rule, given the candidate's logits, picks it too and those logits are within the tolerance (a tie).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aropt.interpreter import Eager, Executor, Values, run
from aropt.passbase import loops
from aropt.program import Call, Program, calls, dict_root
from aropt.runtime import make_inputs, slots

TOLERANCE = 16.0  # times the noise floor: two roundings in other orders, over many rows
BLOCK = 64  # caches grow in blocks of so many slots
EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Case:
    """One generation to compare: prompts (several make a ragged batch), tokens, rule parameters."""

    name: str
    kind: str  # greedy | sampled | ragged | boundary | stop
    prompts: tuple[tuple[int, ...], ...]
    n: int
    seed: int = 0
    params: tuple[tuple[str, float], ...] = ()
    stop: tuple[int, ...] = ()

    def repro(self, name: str) -> str:
        """A line of Python that runs the case."""
        params = "".join(f", {k}={v}" for k, v in self.params)
        return f"{name}.generate({[list(p) for p in self.prompts]}, {self.n}, seed={self.seed}, stop={list(self.stop)}{params})"


@dataclass
class Outcome:
    """What a case measured. `error` and `floor` are in logits; `ratio` is error / floor."""

    case: Case
    error: float = 0.0
    floor: float = 0.0
    ties: int = 0
    tokens: int = 0
    problem: str = ""

    @property
    def ratio(self) -> float:
        return self.error / self.floor if self.floor else 0.0

    @property
    def passed(self) -> bool:
        return not self.problem


@dataclass
class Verdict:
    """All outcomes, and where the first failing case diverges."""

    outcomes: list[Outcome] = field(default_factory=list)
    diverges: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        return all(o.passed for o in self.outcomes)

    def metrics(self) -> dict[str, float]:
        return {
            "cases": len(self.outcomes), "tokens": sum(o.tokens for o in self.outcomes),
            "ties": sum(o.ties for o in self.outcomes), "max_error": max((o.error for o in self.outcomes), default=0.0),
            "max_ratio": max((o.ratio for o in self.outcomes), default=0.0), "tolerance_ratio": TOLERANCE,
        }  # fmt: skip


def cases(program: Program, seed: int = 0, quick: bool = False) -> list[Case]:
    """Boundary lengths, ragged batches, greedy and sampled, stop tokens; all within the program's capacity."""
    capacity, vocab = int(program.meta["capacity"]), int(program.meta.get("input_vocab", program.meta["vocab"]))
    generator = torch.Generator().manual_seed(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, vocab, (max(length, 1),), generator=generator).tolist())

    def room(length: int, n: int) -> int:
        return max(0, min(n, capacity - length + 1))

    sampled = tuple((k, v) for k, v in {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "guidance": 1.5,
                                        "repetition_penalty": 1.2}.items() if k in program.inputs)  # fmt: skip
    fixed = tuple((k, v) for k, v in sampled if k in ("guidance", "repetition_penalty"))
    few, many = (6, 12) if quick else (16, 40)
    made = [Case("one token", "boundary", (prompt(1),), room(1, few), params=fixed)]
    lengths = [min(n, capacity // 3) for n in (2, 3, 5)]
    made.append(Case("ragged greedy", "ragged", tuple(prompt(n) for n in (lengths[2], 1, lengths[1])), room(lengths[2], few), params=fixed))
    made.append(Case("sampled", "sampled", (prompt(lengths[1]),), room(lengths[1], many), seed + 1, (("temperature", 1.0), *fixed)))
    made.append(Case("ragged truncated", "ragged", (prompt(1), prompt(lengths[2])), room(lengths[2], few), seed + 2, sampled))
    ends = {capacity - 1, capacity} if quick else {BLOCK - 1, BLOCK, BLOCK + 1, capacity - 3, capacity - 1, capacity}
    for length in sorted(n for n in ends if 1 < n <= min(capacity, 2048)):
        made.append(Case(f"prompt of {length}", "boundary", (prompt(length),), room(length, 3), params=fixed))
    if not quick:
        made.append(Case("greedy", "greedy", (prompt(min(16, capacity // 2)),), room(min(16, capacity // 2), many), params=fixed))
        made.append(Case("to capacity", "boundary", (prompt(max(1, capacity - 100)),), min(capacity, 101), params=fixed))
        made.append(Case("other seed", "sampled", (prompt(2), prompt(2)), room(2, few), 2**40 + seed, sampled))
    return made


def validate(reference: Program, candidate: Program, executor: Executor | None = None, chosen: Sequence[Case] | None = None,
             progress: Callable[[str], None] = lambda _: None, explain: bool = True) -> Verdict:  # fmt: skip
    """Compares the candidate (with its probe, see `with_probe`) against the reference, case by case."""
    oracle = Oracle(reference)
    executor = executor or Eager(candidate)
    verdict = Verdict()
    chosen = list(chosen if chosen is not None else cases(reference))
    for case in [*chosen, *stopping(chosen, reference, candidate, executor)]:
        progress(case.name)
        verdict.outcomes.append(compare(oracle, candidate, executor, case))
        if verdict.outcomes[-1].problem and explain:
            from aropt.localize import localize

            verdict.diverges = localize(oracle, candidate, executor, case)
            break
    return verdict


def stopping(chosen: Sequence[Case], reference: Program, candidate: Program, executor: Executor) -> list[Case]:
    """Cases with stop tokens that do occur: the third token of a sequence ends it."""
    case = next((c for c in chosen if c.kind == "ragged" and c.n > 3), None)
    if case is None:
        return []
    tokens = Trace(candidate, case, executor).tokens
    return [Case("stop token", "stop", case.prompts, case.n, case.seed, case.params, (tokens[0][2], tokens[1][1]))]


class Oracle:
    """The reference: its forward in fp32 and fp64, and its rule."""

    def __init__(self, reference: Program) -> None:
        self.program = reference
        self.eager = Eager(reference)
        self.model = next(c for loop in loops(reference.control) for c in calls(loop.body) if list(c.reads) == ["ids"])
        graph = reference.graphs[self.model.graph]
        self.exact = in_double(graph.fx, {w: reference.weights[w] for w in graph.weights()})

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] in fp32 and in fp64."""
        with torch.no_grad():
            single = self.eager.call(self.model.graph, {"ids": ids})["logits"]
            return single, self.exact(ids)[0]


class Forced:
    """Runs the reference's control on the candidate's tokens: one full forward; the rule decides, but is overruled."""

    def __init__(self, oracle: Oracle, trace: Trace, row: int) -> None:
        self.oracle, self.trace, self.row = oracle, trace, row
        self.single: Tensor | None = None
        self.double: Tensor | None = None
        self.decided: list[int] = []
        self.rules: list[tuple[str, Values]] = []

    def call(self, graph: str, inputs: Values) -> Values:
        tokens = self.trace.tokens[self.row]
        if graph == self.oracle.model.graph:
            ids = inputs["ids"]
            if self.single is None:
                forced = torch.tensor(tokens[:-1] or [0], dtype=torch.int64).expand(ids.shape[0], -1)
                self.single, self.double = self.oracle.logits(torch.cat([ids, forced], 1)[:, : ids.shape[1] + len(tokens) - 1])
            if ids.shape[1] > self.single.shape[1]:
                raise Mismatch(f"stops after {len(tokens)} tokens, the reference goes on")
            return {"logits": self.single[:, : ids.shape[1]]}
        results = self.oracle.eager.call(graph, inputs)
        if graph in ("greedy", "sample"):
            step = len(self.decided)
            self.decided.append(int(results["token"]))
            self.rules.append((graph, inputs))
            if step >= len(tokens):
                raise Mismatch(f"stops after {len(tokens)} tokens, the reference goes on")
            return {"token": torch.tensor([tokens[step]])}
        return results


class Mismatch(Exception):
    """The candidate's sequence can't be the reference's."""


class Trace:
    """A candidate's generation: tokens of each prompt, and the logits [B, V] that each round's rule saw."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.rows: list[Tensor] = []
        self.tokens: list[list[int]] = [[] for _ in case.prompts]
        ragged = len({len(p) for p in case.prompts}) > 1 and not candidate.meta.get("ragged")
        groups = [[i] for i in range(len(case.prompts))] if ragged else [list(range(len(case.prompts)))]
        logits: dict[int, list[Tensor]] = {i: [] for i in range(len(case.prompts))}
        for group in groups:
            inputs = make_inputs(candidate, [case.prompts[i] for i in group], case.n, case.seed, case.stop, group, None,
                                 dict(case.params))  # fmt: skip

            def keep(values: Values, group: list[int] = group) -> None:
                branches = values["row"].reshape(-1, len(group), values["row"].shape[-1])
                for j, i in enumerate(group):
                    logits[i].append(branches[:, j].clone())

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, values["generated"].tolist(), strict=True):
                self.tokens[i] = [t for t in row if t >= 0]
                if any(t >= 0 for t in row[len(self.tokens[i]) :]):
                    self.tokens[i].append(-1)  # tokens after the end: never equal to the reference's
        self.logits = logits


def compare(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> Outcome:
    """Runs one case on both and measures."""
    outcome = Outcome(case)
    trace = Trace(candidate, case, executor)
    for i, prompt in enumerate(case.prompts):
        outcome.tokens += len(trace.tokens[i])
        problem = compare_row(oracle, trace, case, i, prompt, outcome)
        if problem and not outcome.problem:
            outcome.problem = f"prompt {i}: {problem}"
    return outcome


def compare_row(oracle: Oracle, trace: Trace, case: Case, i: int, prompt: Sequence[int], outcome: Outcome) -> str:
    """Measures one prompt; returns what is wrong, or nothing."""
    inputs = make_inputs(oracle.program, [prompt], case.n, case.seed, case.stop, [i], None, dict(case.params))
    forced = Forced(oracle, trace, i)
    try:
        values = run(oracle.program, inputs, 0, forced)
    except Mismatch as mismatch:
        return str(mismatch)
    expected = [t for t in values["generated"][0].tolist() if t >= 0]
    if expected != trace.tokens[i]:
        return f"ends after {len(trace.tokens[i])} tokens, the reference after {len(expected)}"
    if forced.single is None or forced.double is None:
        return ""
    start = len(prompt) - 1
    error, floor = 0.0, 4 * EPS * float(forced.single.abs().max())
    floor = max(floor, float((forced.single.double() - forced.double).abs().max()))
    problem = ""
    for step, token in enumerate(trace.tokens[i]):
        mine, theirs = trace.logits[i][step], forced.single[:, start + step]
        if not torch.isfinite(mine).all():
            return f"logits of new token {step} are not finite"
        error = max(error, float((mine - theirs).abs().max()))
        if forced.decided[step] != token and not problem:
            graph, read = forced.rules[step]
            again = int(oracle.eager.call(graph, {**read, "logits": mine})["token"])
            if again == token and error <= TOLERANCE * floor:
                outcome.ties += 1
            else:
                problem = f"new token {step} is {token}, the reference's rule picks {forced.decided[step]}"
    outcome.error, outcome.floor = max(outcome.error, error), max(outcome.floor, floor)
    if error > TOLERANCE * floor:
        problem = f"logits differ by {error:.3g}, {error / floor:.0f} times the noise floor" + (f"; {problem}" if problem else "")
    return problem


def in_double(graph: fx.Graph, weights: dict[str, Tensor]) -> fx.GraphModule:
    """The graph in fp64: weights, constants and casts to fp32."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, nodes))  # type: ignore[arg-type]

    def widen(value: Any) -> Any:
        return torch.float64 if value in (torch.float32, torch.bfloat16, torch.float16) else value

    for node in copy.nodes:
        node.args = fx.node.map_aggregate(node.args, widen)
        node.kwargs = fx.node.map_aggregate(node.kwargs, widen)
    double = {n: w.double() if w.is_floating_point() else w for n, w in weights.items()}
    return fx.GraphModule(dict_root(list(double), double), copy)


def with_probe(program: Program) -> Program:
    """The program with the logits that each round's rule sees as the value "row", for validation only."""
    from aropt.compose import expose

    if any("row" in c.writes.values() for c in calls(program.control)):
        return program
    graphs = dict(program.graphs)
    for name, graph in program.graphs.items():
        node = next((n for n in graph.fx.nodes if n.meta.get("value") == "row"), None)
        if node is not None:
            graphs[name] = expose(graph, {"row": node}, program.weights)
    from aropt.passbase import rewrite

    control = rewrite(program.control, lambda c: [Call(c.graph, c.reads, {**c.writes, "row": "row"})
                                                  if "row" in graphs[c.graph].outputs else c])  # fmt: skip
    return program.replace(graphs=graphs, control=control)
