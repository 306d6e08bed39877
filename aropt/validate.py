"""Validation: does a program generate what its reference generates? (design section 7)

The candidate generates; the reference then sees the same tokens in one full forward (teacher forcing), so one early
difference does not hide later ones. Logits must agree within a multiple of the noise floor: the distance between the
reference in fp32 and in fp64. Tokens must be those of the reference's own rule; a token may differ only where the
reference's rule picks it too, given logits within the tolerance of its own (a tie). A failing case is shrunk before it
is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from aropt import ops
from aropt.errors import AroptError, UsageError
from aropt.interpreter import Eager, Executor, Values, run
from aropt.passbase import loops
from aropt.program import Call, Program, calls, dict_root
from aropt.rules import inside
from aropt.runtime import batches, make_inputs, slots
from aropt.units import flat, ids_of, rows, rows_for, window

TOLERANCE = 16.0  # times the noise floor: two roundings in other orders, over many rows
BLOCK = 64  # caches grow in blocks of so many slots
NUDGE = 1e-5  # a thousandth of a step of the largest values of eight bits
EPS = torch.finfo(torch.float32).eps
PATTERN = (2.0, -2.0, 1.0)  # repeated over the vocabulary: a bias
# Parameters that decide most draws, each in a case of its own: what goes wrong with one is then seen in few tokens.
# A repetition penalty far below 1 makes tokens win that were seen before, so that it shows which ones count as seen.
STRONG: tuple[tuple[str, float], ...] = (
    ("top_k", 2), ("top_p", 0.2), ("min_p", 0.5), ("guidance", 4.0), ("repetition_penalty", 5.0),
    ("repetition_penalty", 0.1), ("bias", 0.0),
)  # fmt: skip
Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Case:
    """One generation to compare: prompts (several make a ragged batch), tokens, rule parameters."""

    name: str
    kind: str  # greedy | sampled | ragged | boundary | stop
    prompts: tuple[tuple[int, ...], ...]
    n: int
    seed: int = 0
    params: tuple[tuple[str, Value], ...] = ()
    stop: tuple[int, ...] = ()
    streams: tuple[int, ...] = ()  # empty: 0, 1, ...
    negative: tuple[tuple[int, ...], ...] = ()  # empty: the program's null class
    fill: tuple[int, ...] = ()  # of a canvas: what the answers hold already, the same for all

    def repro(self, name: str) -> str:
        """A line of Python that runs the case."""
        prompts, negative = [list(p) for p in self.prompts], [list(p) for p in self.negative] or None
        values = {
            k: f"({list(PATTERN)} * {len(v)})[:{len(v)}]" if isinstance(v, tuple) else repr(v) for k, v in self.params
        }
        params = "".join(f", {k}={v}" for k, v in values.items()) + (f", negative={negative}" if negative else "")
        params += f", streams={list(self.streams)}" if self.streams else ""
        params += f", fill={[list(self.fill)] * len(prompts)}" if self.fill else ""
        return f"{name}.generate({prompts}, {self.n}, seed={self.seed}, stop={list(self.stop)}{params})"

    def groups(self, program: Program) -> list[list[int]]:
        """Which prompts run as one batch, as in `runtime.generate`."""
        return batches(program, self.prompts)

    def inputs(self, program: Program, group: Sequence[int]) -> Values:
        """The program's inputs for these prompts."""
        streams = [self.streams[i] if self.streams else i for i in group]
        negative = [self.negative[i] for i in group] if self.negative else None
        fill = [self.fill] * len(group) if self.fill else None
        return make_inputs(program, [self.prompts[i] for i in group], self.n, self.seed, self.stop, streams, negative,
                           dict(self.params), fill)  # fmt: skip


@dataclass
class Outcome:
    """What a case measured. `error` and `floor` are in logits; `ratio` is error / floor."""

    case: Case
    error: float = 0.0
    floor: float = 0.0
    ties: int = 0
    tokens: int = 0
    problem: str = ""
    row: int = 0  # the prompt that it is about
    generated: list[list[int]] = field(default_factory=list)

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
    """Boundary lengths, ragged batches, greedy and sampled, each parameter alone; all within the program's capacity."""
    if program.meta.get("loop") == "unmask":
        from aropt import validate_canvas

        return validate_canvas.cases(program, seed, quick)
    capacity, vocab = int(program.meta["capacity"]), int(program.meta.get("input_vocab", program.meta["vocab"]))
    generator = torch.Generator().manual_seed(seed)

    def prompt(length: int) -> tuple[int, ...]:
        return random_rows(program, vocab, max(length, 1), generator)

    def case(
        name: str,
        kind: str,
        lengths: Sequence[int],
        n: int,
        seed: int = 0,
        params: Params = (),
        streams: Sequence[int] = (),
    ) -> None:
        prompts = tuple(prompt(length) for length in lengths)
        negative = tuple(prompt(len(p)) for p in prompts) if needs_negative else ()
        room = max(0, min(n, ids_of(program.meta, capacity - max(*lengths, 1) + 1)))
        made.append(Case(name, kind, prompts, room, seed, params, (), tuple(streams), negative))

    made: list[Case] = []
    needs_negative = "negative" in program.inputs and program.meta.get("null") is None
    some, fixed = parameters(program)
    few, many = (6, 12) if quick else (16, 40)
    two, three, five, nine = (min(n, max(capacity // 3, 1)) for n in (2, 3, 5, 9))
    case("one token", "boundary", [1], few, params=fixed)
    case("no tokens", "boundary", [two], 0, params=fixed)
    case("ragged greedy", "ragged", [five, 1, three], few, params=fixed)
    case("sampled", "sampled", [three], many, seed + 1, (("temperature", 1.0), *fixed))
    case("ragged sampled", "ragged", [1, five], few, seed + 2, some, (3, 1))
    for name, value in STRONG:
        if name in program.inputs and not (name == "guidance" and program.meta.get("guidance_free")):
            strong = bias_pattern(program) if name == "bias" else value
            label = name if name == "bias" else f"{name} {value:g}"
            case(label, "sampled", [nine, 1, 1], few, seed + 3, (("temperature", 2.0), (name, strong)))
    ends = {capacity - 1, capacity} if quick else {BLOCK - 1, BLOCK, BLOCK + 1, capacity - 3, capacity - 1, capacity}
    for length in sorted(n for n in ends if 1 < n <= min(capacity, 2048)):
        case(f"prompt of {length}", "boundary", [length], 3, params=fixed)
    if not quick:
        case("greedy", "greedy", [min(16, capacity // 2)], many, params=fixed)
        case("to capacity", "boundary", [max(1, capacity - 100)], 101, params=fixed)
        case("other seed", "sampled", [two, two], few, 2**40 + seed, some, (2, 10**9))
    return made


Params = tuple[tuple[str, Value], ...]


def random_rows(program: Program, vocab: int, count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Ids that fill so many rows: one each, or of windows a whole one or an id that stands alone."""
    if not window(program.meta):
        return tuple(torch.randint(0, vocab, (count,), generator=generator).tolist())
    ids: list[int] = []
    for first in torch.randint(0, vocab, (count,), generator=generator).tolist():
        single = int(program.meta.get("single", vocab))
        rest = torch.randint(0, single, (*window(program.meta),), generator=generator).tolist()
        ids += [first] if first >= single else [first, *rest[1:]]
    return tuple(ids)


def parameters(program: Program) -> tuple[Params, Params]:
    """Usual values of the program's sampling parameters: all of them, and those that greedy generation uses too."""
    usual = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.05, "guidance": 1.5, "repetition_penalty": 1.2}
    usual |= {"guidance": 1.0} if program.meta.get("guidance_free") else {}
    usual |= {"guidance_from": 1, "guidance_to": 4}
    some = tuple((k, v) for k, v in usual.items() if k in program.inputs)
    return some, tuple((k, v) for k, v in some if k.startswith(("guidance", "repetition_penalty")))


def bias_pattern(program: Program) -> tuple[float, ...]:
    """PATTERN for each token of the vocabulary."""
    vocab = int(program.meta["vocab"])
    return (PATTERN * vocab)[:vocab]


def validate(
    reference: Program,
    candidate: Program,
    executor: Executor | None = None,
    chosen: Sequence[Case] | None = None,
    progress: Callable[[str], None] = lambda _: None,
    explain: bool = True,
) -> Verdict:
    """Compares the candidate (with its probe, see `with_probe`) against the reference, up to the first case that fails.

    `explain`: the failing case is shrunk, and the first op to differ is looked for.
    """
    oracle, executor, verdict = Oracle(reference), executor or Eager(candidate), Verdict()
    for case in with_stops(chosen if chosen is not None else cases(reference), verdict):
        progress(case.name)
        outcome = compare(oracle, candidate, executor, case)
        verdict.outcomes.append(outcome)
        if outcome.problem and explain:
            from aropt.localize import localize

            small = shrink(lambda c: fails(oracle, candidate, executor, c), case)
            verdict.outcomes[-1] = outcome = compare(oracle, candidate, executor, small)
            verdict.diverges = localize(oracle, candidate, executor, small, outcome.row)
        if outcome.problem:
            break
    return verdict


def fails(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> bool:
    """Whether a case that was made smaller fails; one that the program can't take (blocks, steps) does not."""
    try:
        return not compare(oracle, candidate, executor, case).passed
    except UsageError:
        return False


def with_stops(chosen: Sequence[Case], verdict: Verdict) -> Iterator[Case]:
    """The cases, and some again with stop tokens that do occur: the third token of one row, another's second; of a
    sequence alone the fourth."""
    yield from chosen
    for kind, sampled in (("stop token", False), ("stop token, sampled", True)):
        found = [
            o
            for o in verdict.outcomes
            if o.case.kind == "ragged" and o.case.n > 3 and ("temperature" in dict(o.case.params)) is sampled
        ]
        if found:
            case, rows = found[0].case, found[0].generated
            stop = [row[at] for row, at in zip(rows, (2, 1), strict=False) if len(row) > at]
            yield replace(case, name=kind, kind="stop", stop=tuple(stop))
    alone = next((o for o in verdict.outcomes if o.case.name == "one token" and len(o.generated[0]) > 4), None)
    if alone is not None:  # within what a round that writes several ids would write
        yield replace(alone.case, name="stop token, alone", kind="stop", stop=(alone.generated[0][3],))


def shrink(fails: Callable[[Case], bool], case: Case, runs: int = 20) -> Case:
    """A smaller case that still fails, after at most `runs` tries. Steps that failed are tried again at the end."""
    useless: set[str] = set()
    while True:
        start = case
        while step := next(((k, smaller) for k, smaller in simpler(case) if k not in useless), None):
            if runs == 0:
                return case
            runs, (kind, smaller) = runs - 1, step
            if fails(smaller):
                case = smaller
            else:
                useless.add(kind)
        if case == start:
            return case
        useless.clear()


def simpler(case: Case) -> Iterator[tuple[str, Case]]:
    """Steps to simpler cases, the boldest first: one prompt, fewer tokens, shorter prompts, less of everything else."""
    for i in range(len(case.prompts) if len(case.prompts) > 1 else 0):
        streams, negative = case.streams[i : i + 1], case.negative[i : i + 1]
        yield f"prompt {i} alone", replace(case, prompts=case.prompts[i : i + 1], streams=streams, negative=negative)
    for kind, n in (("one token", 1), ("half the tokens", case.n // 2), ("a token less", case.n - 1)):
        if 0 < n < case.n:
            yield kind, replace(case, n=n, fill=case.fill[:n])
    for kind, keep in (("prompts of one", 0), ("half the prompts", 2)):
        lengths = [max(1, len(p) // keep if keep else 1) for p in case.prompts]
        if lengths != [len(p) for p in case.prompts]:
            yield kind, replace(case, prompts=tail(case.prompts, lengths), negative=tail(case.negative, lengths))
    if case.streams:
        yield "streams", replace(case, streams=())
    if case.stop:
        yield "stop", replace(case, stop=())
    for name, _ in case.params:
        yield name, replace(case, params=tuple((k, v) for k, v in case.params if k != name))


def tail(prompts: tuple[tuple[int, ...], ...], lengths: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The last tokens of each prompt."""
    return tuple(p[len(p) - n :] for p, n in zip(prompts, lengths, strict=False))


class Oracle:
    """The reference: its forward in fp32 and fp64, and its rule."""

    def __init__(self, reference: Program) -> None:
        self.program = reference
        self.eager = Eager(reference)
        found = [c for c in calls(loops(reference.control)[0].body) if "ids" in c.reads]
        self.model, self.branches = found[0], len(found)
        graph = reference.graphs[self.model.graph]
        self.exact = in_double(graph.fx, {w: reference.weights[w] for w in graph.weights()})

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] in fp32 and in fp64."""
        single, double = self.forward({"ids": ids})
        return single["logits"], double["logits"]

    def forward(self, inputs: Values, state: Values | None = None) -> tuple[Values, Values]:
        """The forward's results in fp32, and in fp64 from the fp64 values of its state (otherwise from fp32's)."""
        graph = self.program.graphs[self.model.graph]
        wide = [(state or {}).get(n, inputs[n]) for n in graph.inputs]
        with torch.no_grad():
            double = self.exact(*[v.double() if v.is_floating_point() else v for v in wide])
            return self.eager.call(self.model.graph, inputs), dict(zip(graph.outputs, double, strict=True))


class Forced:
    """Runs the reference's control on the candidate's tokens: one full forward; the rule decides, but is overruled."""

    def __init__(self, oracle: Oracle, trace: Trace, row: int) -> None:
        self.oracle, self.trace, self.row = oracle, trace, row
        self.forwards: list[tuple[Tensor, Tensor]] = []  # logits of each branch, in fp32 and in fp64
        self.asked = 0  # calls of the forward
        self.decided: list[int] = []
        self.rules: list[tuple[str, Values]] = []

    def call(self, graph: str, inputs: Values) -> Values:
        tokens, meta = self.trace.tokens[self.row], self.oracle.program.meta
        if graph == self.oracle.model.graph:
            ids, branch = inputs["ids"], self.asked % self.oracle.branches
            self.asked += 1
            if branch == len(self.forwards):
                rows = max(rows_for(meta, len(tokens)) - 1, 0)  # the last one is not read
                given = torch.tensor(tokens[: ids_of(meta, rows)], dtype=torch.int64).reshape(rows, *window(meta))
                forced = torch.cat([ids, given.expand(ids.shape[0], *given.shape)], 1)
                self.forwards.append(self.oracle.logits(forced[:, : ids.shape[1] + rows - (not tokens)]))
            single = self.forwards[branch][0]
            if ids.shape[1] > single.shape[1]:
                raise Mismatch(f"stops after {len(tokens)} tokens, the reference goes on")
            return {"logits": single[:, : ids.shape[1]]}
        results = self.oracle.eager.call(graph, inputs)
        if graph in ("greedy", "sample"):
            own = results["token"].flatten().tolist()
            step, self.decided = len(self.decided), [*self.decided, *own]
            self.rules.append((graph, inputs))
            if step >= len(tokens):
                raise Mismatch(f"stops after {len(tokens)} tokens, the reference goes on")
            theirs = tokens[step : step + len(own)]
            return {"token": torch.tensor([theirs + own[len(theirs) :]]).reshape(1, *window(meta))}
        return results

    def read(self, step: int) -> int:
        """How many branches the rule of that round depends on: outside the interval of guidance, one."""
        values = self.rules[step][1]
        if "guidance_from" in values and not inside(*(values[n] for n in ("guidance_from", "guidance_to", "count"))):
            return 1
        return 1 if "guidance" in values and float(values["guidance"]) == 1 else self.oracle.branches


class Mismatch(Exception):
    """The candidate's sequence can't be the reference's."""


class Trace:
    """A candidate's generation: tokens of each prompt, and the logits [branches, V] that each round's rule saw."""

    def __init__(self, candidate: Program, case: Case, executor: Executor) -> None:
        self.tokens: list[list[int]] = [[] for _ in case.prompts]
        self.logits: list[list[Tensor]] = [[] for _ in case.prompts]
        self.alone = 0
        for group in case.groups(candidate):
            inputs = case.inputs(candidate, group)

            def keep(values: Values, group: list[int] = group) -> None:
                if "window" not in values:
                    self.alone = len(values["row"])  # rows of a round without drafts
                elif len(values["row"]) > self.alone:  # a row for each draft, of each branch
                    drafted = values["row"].reshape(self.alone, -1, *values["row"].shape[1:])
                    rounds = values["window"][0, : drafted.shape[1]].reshape(drafted.shape[1], -1)
                    counted = rounds.amax(1) >= 0
                    self.logits[group[0]] += drafted[:, counted].transpose(0, 1).clone().unbind()
                    return
                branches = values["row"].reshape(-1, len(group), *values["row"].shape[1:])
                for j, i in enumerate(group):
                    self.logits[i].append(branches[:, j].clone())
                if len(self.logits[group[0]]) > rows_for(candidate.meta, case.n):
                    raise Mismatch(f"does not end after {case.n} tokens")

            values = run(candidate, inputs, slots(candidate, inputs), executor, keep)
            for i, row in zip(group, flat(values["generated"]), strict=True):
                self.tokens[i] = [t for t in row if t >= 0]
                if any(t >= 0 for t in row[len(self.tokens[i]) :]):
                    self.tokens[i].append(-1)  # tokens after the end: never equal to the reference's


def compare(oracle: Oracle, candidate: Program, executor: Executor, case: Case) -> Outcome:
    """Runs one case on both and measures. A candidate that raises an error has failed."""
    outcome = Outcome(case)
    measure = compare_rows
    if oracle.program.meta.get("loop") == "unmask":
        from aropt.validate_canvas import compare_rows as measure
    try:
        measure(oracle, candidate, executor, outcome)
    except Mismatch as mismatch:
        outcome.problem = str(mismatch)
    except AroptError:
        raise  # a missing tool, a wrong parameter: says nothing about the program
    except Exception as error:  # a program that fails is an outcome
        outcome.problem = f"the program raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return outcome


def compare_rows(oracle: Oracle, candidate: Program, executor: Executor, outcome: Outcome) -> None:
    """Generates with the candidate, then measures prompt by prompt."""
    case = outcome.case
    trace = Trace(candidate, case, executor)
    outcome.generated = trace.tokens
    for i, prompt in enumerate(case.prompts):
        outcome.tokens += len(trace.tokens[i])
        problem = compare_row(oracle, trace, case, i, prompt, outcome)
        if problem and not outcome.problem:
            outcome.problem, outcome.row = f"prompt {i}: {problem}", i


def compare_row(oracle: Oracle, trace: Trace, case: Case, i: int, prompt: Sequence[int], outcome: Outcome) -> str:
    """Measures one prompt; returns what is wrong, or nothing."""
    forced, tokens, meta = Forced(oracle, trace, i), trace.tokens[i], oracle.program.meta
    if len(tokens) > ids_of(meta, len(trace.logits[i])):
        return f"returns {len(tokens)} tokens after {len(trace.logits[i])} rounds"
    wrong = [t for t in tokens if not 0 <= t < int(oracle.program.meta["vocab"])]
    if wrong:
        return f"new token {tokens.index(wrong[0])} is {wrong[0]}, which is none"
    try:
        values = run(oracle.program, case.inputs(oracle.program, [i]), 0, forced)
    except Mismatch as mismatch:
        return str(mismatch)
    expected = [t for t in flat(values["generated"])[0] if t >= 0]
    if expected != tokens:
        return f"ends after {len(tokens)} tokens, the reference after {len(expected)}"
    if not forced.forwards:
        return ""
    single, double = (torch.cat(branches) for branches in zip(*forced.forwards, strict=True))
    floor = noise_floor(single, double)
    error, problem, before = 0.0, "", len(rows(meta, prompt)) - 1
    for step, token in enumerate(tokens):
        round, place = divmod(step, ids_of(meta, 1))
        mine, theirs = trace.logits[i][round], single[:, before + round]
        if not forced.read(round) <= len(mine) <= len(theirs):
            return f"the rule of new token {step} sees {len(mine)} branches of {len(theirs)}"
        theirs = theirs[: len(mine)]
        distance = torch.where(mine == theirs, 0.0, (mine - theirs).abs())
        if not torch.isfinite(distance).all():
            return f"logits of new token {step} are not finite"
        error = max(error, float(distance.max()))
        if forced.decided[step] != token and not problem:
            if error <= TOLERANCE * floor and ties(oracle, *forced.rules[round], mine, token, TOLERANCE * floor, place):
                outcome.ties += 1
            else:
                problem = f"new token {step} is {token}, the reference's rule picks {forced.decided[step]}"
    outcome.error, outcome.floor = max(outcome.error, error), max(outcome.floor, floor)
    if error > TOLERANCE * floor:
        problem = f"logits differ by {error:.3g}, {error / floor:.0f} times the noise floor" + (
            f"; {problem}" if problem else ""
        )
    return problem


def ties(oracle: Oracle, graph: str, read: Values, mine: Tensor, token: int, tolerance: float, place: int = 0) -> bool:
    """Whether the reference's rule picks the token too, from the candidate's logits or with a slightly higher logit.

    `place`: which of a window's ids it is.
    """
    nudged = read["logits"].clone()
    mine = torch.cat([mine, nudged[len(mine) :]])  # a branch that the rule does not read may be missing
    nudged[(0, place, token) if nudged.dim() == 3 else (0, token)] += 2 * tolerance  # two logits, each off by it
    picks = [oracle.eager.call(graph, {**read, "logits": x})["token"].flatten()[place] for x in (mine, nudged)]
    return any(int(picked) == token for picked in picks)


def noise_floor(single: Tensor, double: Tensor) -> float:
    """Largest distance between fp32 and fp64 logits, and at least a few units in the last place."""
    finite = torch.isfinite(single) & torch.isfinite(double)
    single, double = single[finite].double(), double[finite]
    return max(4 * EPS * float(single.abs().max()), float((single - double).abs().max())) if finite.any() else 4 * EPS


def in_double(graph: fx.Graph, weights: dict[str, Tensor]) -> fx.GraphModule:
    """The graph in fp64: weights, constants and casts to fp32.

    What an op rounds coarsely (`OpDef.steps`) is moved by up to NUDGE of itself. Sums in another order move it too,
    over a step here and there, and fp64 alone would show that only where it happens to cross the same one.
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
    x, name = node.args[at], f"nudge.{node.name}"
    noise = torch.rand(int(x.meta["val"].shape[-1]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[name] = 1 + NUDGE * (2 * noise - 1)
    with graph.inserting_before(node):
        factor = graph.get_attr(name)
        moved = graph.call_function(torch.mul, (x, factor))
    factor.meta["nudge"] = moved.meta["nudge"] = True
    node.args = (*node.args[:at], moved, *node.args[at + 1 :])


def probe(program: Program) -> str:
    """The value that holds the logits that a round's rule sees."""
    return "logits" if program.meta.get("loop") == "unmask" else "row"


def with_probe(program: Program) -> Program:
    """The program with the logits that each round's rule sees as the value `probe(program)`, for validation only."""
    from aropt.compose import expose

    name_of = probe(program)
    if any(name_of in c.writes.values() for c in calls(program.control)):
        return program
    graphs = dict(program.graphs)
    for name, graph in program.graphs.items():
        node = next((n for n in graph.fx.nodes if n.meta.get("value") == name_of), None)
        if node is not None:
            graphs[name] = expose(graph, {name_of: node})
    from aropt.passbase import rewrite

    control = rewrite(program.control, lambda c: [Call(c.graph, c.reads, {**c.writes, name_of: name_of})
                                                  if name_of in graphs[c.graph].outputs else c])  # fmt: skip
    return program.replace(graphs=graphs, control=control)
