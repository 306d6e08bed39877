"""Builds the programs: a captured forward and a rule become a whole generation in the IR."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from aropt.errors import UsageError
from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.control import Call, Control, Loop, loops
from aropt.ir.edit import call_by_name
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Input, Meta, Program, Spec, StateSpec
from aropt.ir.units import ids_of, rows, rows_for, window
from aropt.loops.defaults import followed_rules, unfollowed, with_defaults
from aropt.loops.given import check_parameters
from aropt.loops.guards import Guard, apart, first, outside
from aropt.loops.nest import Level, nest
from aropt.loops.redraw import redrawn
from aropt.loops.rules import BOOL, DEFAULT, GUIDED, I64, Processor, chosen, inside, rule
from aropt.loops.runtime import constant, padded
from aropt.loops.scheme import Look, Mismatch, Prompts, Round, Scheme

SCALAR = Spec(I64)
ROWS = Spec(I64, ("B",))


def autoregressive(model: Graph, weights: dict[str, Tensor], meta: Meta, rules: tuple[str, ...] = DEFAULT) -> Program:
    """The plain loop: the whole forward over all tokens so far, the rule on the last row, append, until done.

    `meta` holds vocab and capacity. Greedy and sampled generation are two loops behind an `If` on the input `greedy`.
    With guidance the forward runs twice a round, on the prompt's tokens and on those after the unconditional prompt.
    """
    ops.load_all()
    processors = chosen(rules)
    vocab, row = int(meta["vocab"]), window(meta)
    guided, penalized = bool(set(GUIDED) & set(processors)), "repetition-penalty" in processors
    graphs = {
        "model": model, "start": start(guided, row), "append": append(guided, row), "commit": commit(row),
        "last": last(vocab, row, guided),
    }  # fmt: skip
    if penalized:
        graphs |= {"seen": first_seen(vocab, row), "mark": mark(vocab, row)}
    for name, sampled in (("greedy", False), ("sample", True)):
        function, inputs = rule(processors, vocab, sampled, row, meta.get("never", ()))
        graphs[name] = capture_function(name, function, inputs, ["token"], "rule")
    graphs["position"] = capture_function(
        "position", lambda lengths, count: lengths + count, {"lengths": ROWS, "count": SCALAR}, ["position"]
    )
    state = {
        **{n: StateSpec("tokens", Spec(I64, ("B", "T", *row))) for n in branches(guided)},
        "done": StateSpec("flag", Spec(BOOL, ("B",))),
        "count": StateSpec("counter", SCALAR),
        "finished": StateSpec("flag", Spec(BOOL)),
    }
    if penalized:
        state["seen"] = StateSpec("flag", Spec(BOOL, ("B", vocab)))
    given = program_inputs(processors, vocab, guided, row, bool(meta.get("guidance_free")))
    level = Level(
        "positions", graphs, given, state, ("generated",), partial(decode, graphs), emits={"emitted": "generated"},
        params={"limit": "limit"}, decides="token", evidence="row",
    )  # fmt: skip
    return nest(level, weights, {**meta, "rules": list(processors), "ragged": False})


def branches(guided: bool) -> dict[str, str]:
    """The states that hold tokens, and the logits that the forward makes of each."""
    return {"tokens": "logits", "negative_tokens": "negative_logits"} if guided else {"tokens": "logits"}


def program_inputs(
    processors: dict[str, Processor], vocab: int, guided: bool, row: tuple[int, ...], free: bool = False
) -> dict[str, Input]:
    """What the caller of a generation gives; `row`: the axes of one, () or (W,) (see aropt.ir.units).

    `free`: the model was trained to need no guidance, so that 1 is usual.
    """
    of, one = (f", {row[0]} a row", "rows") if row else ("", "tokens")
    inputs = {
        "prompt": Input(Spec(I64, ("B", "P", *row)), doc=f"token ids{of}, padded on the left"),
        "lengths": Input(ROWS, doc=f"{one} of each prompt without padding"),
        "limit": Input(SCALAR, doc=f"new {one} at most"),
        "stop": Input(Spec(I64, ("K",)), doc="tokens that end a sequence; -1 never matches"),
        "greedy": Input(Spec(BOOL), True, "argmax instead of a draw"),
        "seed": Input(SCALAR, 0, "seed of the noise"),
        "streams": Input(ROWS, doc="which sequence each row is, for the noise"),
    }
    if guided:
        inputs["negative"] = Input(Spec(I64, ("B", "P", *row)), doc="the unconditional prompt, shaped as the prompt")
    for processor in processors.values():
        for name, given in processor.params.items():
            dims = tuple(vocab if d == "V" else d for d in given.spec.dims)
            inputs[name] = replace(given, spec=Spec(given.spec.dtype, dims))
    if "top_k" in inputs:
        inputs["top_k"] = replace(inputs["top_k"], maximum=vocab)
    for name in {"suppress_tokens", "begin_suppress_tokens"} & set(inputs):
        inputs[name] = replace(inputs[name], maximum=vocab - 1)
    if free and guided:
        inputs["guidance"] = replace(inputs["guidance"], default=1.0)
    return inputs


def decode(graphs: Mapping[str, Graph], rule_name: str) -> list[Call]:
    """A round with the named rule."""
    logits = branches("negative_logits" in graphs["last"].inputs)
    forward = [Call("model", {"ids": ids}, {"logits": out}) for ids, out in logits.items()]
    reads = {n: "row" if n == "logits" else n for n in graphs[rule_name].inputs}
    decides = [call_by_name(graphs["position"])] if "position" in reads else []
    decides.append(Call(rule_name, reads, {"token": "token"}))
    after = [call_by_name(graphs[n]) for n in ("append", "mark", "commit") if n in graphs]
    return [*forward, call_by_name(graphs["last"]), *decides, *after]


def start(guided: bool, row: tuple[int, ...] = ()) -> Graph:
    """The state before the first round."""

    def function(prompt: Tensor, limit: Tensor, **negative: Tensor) -> tuple[Tensor, ...]:
        tokens = [ids.clone() for ids in (prompt, *negative.values())]
        return *tokens, prompt.flatten(1)[:, 0] < -1 if row else prompt[:, 0] < -1, limit - limit, limit <= 0

    prompts = Spec(I64, ("B", "P", *row))
    inputs = {"prompt": prompts, "limit": SCALAR, **({"negative": prompts} if guided else {})}
    return capture_function("start", function, inputs, [*branches(guided), "done", "count", "finished"], "prologue")


def append(guided: bool, row: tuple[int, ...] = ()) -> Graph:
    """tokens [B, T], token [B] -> tokens [B, T + 1]; both branches get the same token when guided."""

    def function(token: Tensor, **tokens: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.cat([ids, token.unsqueeze(1)], 1) for ids in tokens.values())

    inputs = {n: Spec(I64, ("B", "T", *row)) for n in branches(guided)}
    return capture_function("append", function, {**inputs, "token": Spec(I64, ("B", *row))}, list(inputs))


def last(vocab: int, row: tuple[int, ...] = (), guided: bool = False) -> Graph:
    """The last row of logits [B, R, V]; of both branches, the conditional ones first, when guided: [2B, V]."""

    def function(**logits: Tensor) -> Tensor:
        rows = [x[:, -1].to(torch.float32) for x in logits.values()]
        return torch.cat(rows) if guided else rows[0]

    inputs = {n: Spec(torch.float32, ("B", "R", *row, vocab)) for n in branches(guided).values()}
    return capture_function("last", function, inputs, ["row"])


def commit(row: tuple[int, ...] = ()) -> Graph:
    """Counts, matches stop tokens, decides whether all is done. A finished sequence emits -1."""

    def function(token: Tensor, done: Tensor, count: Tensor, limit: Tensor, stop: Tensor) -> tuple[Tensor, ...]:
        if row:  # what a window holds after a stop token is not emitted either
            ends = (token.unsqueeze(2) == stop).any(2)
            before = ends.to(I64).cumsum(1) - ends.to(I64) > 0
            emitted = torch.where(done.unsqueeze(1) | before, -1, token)
            ended = done | ends.any(1)
        else:
            emitted = torch.where(done, -1, token)
            ended = done | (token.unsqueeze(1) == stop).any(1)
        return emitted, ended, count + 1, ended.all() | (count + 1 >= limit)

    inputs = {
        "token": Spec(I64, ("B", *row)),
        "done": Spec(BOOL, ("B",)),
        "count": SCALAR,
        "limit": SCALAR,
        "stop": Spec(I64, ("K",)),
    }
    return capture_function("commit", function, inputs, ["emitted", "done", "count", "finished"], "commit")


def first_seen(vocab: int, row: tuple[int, ...] = ()) -> Graph:
    """Which tokens each prompt holds, padding left out: bool [B, V]."""

    def function(prompt: Tensor, lengths: Tensor) -> Tensor:
        real = torch.arange(prompt.shape[1]) >= prompt.shape[1] - lengths.unsqueeze(1)
        held = prompt.unsqueeze(prompt.dim()) == torch.arange(vocab)
        return ((held.any(2) if row else held) & real.unsqueeze(2)).any(1)

    inputs = {"prompt": Spec(I64, ("B", "P", *row)), "lengths": ROWS}
    return capture_function("seen", function, inputs, ["seen"], "prologue")


def mark(vocab: int, row: tuple[int, ...] = ()) -> Graph:
    """Adds the token, or the window's tokens, to what was seen."""

    def function(seen: Tensor, token: Tensor) -> Tensor:
        new = token.unsqueeze(token.dim()) == torch.arange(vocab)
        return seen | (new.any(1) if row else new)

    inputs = {"seen": Spec(BOOL, ("B", vocab)), "token": Spec(I64, ("B", *row))}
    return capture_function("mark", function, inputs, ["seen"])


def decoding(control: Control) -> list[Loop]:
    """The loops that write a row of each sequence a round."""
    return loops(control, "positions")


class Positions(Scheme):
    """Rounds decide the next row of each sequence, from its logits; the forward is causal."""

    kind = "positions"
    forced, unread = True, 1

    def check_rules(self, rules: Sequence[str] | None, guided: bool) -> None:
        chosen(tuple(rules or ()))
        if guided:
            raise UsageError(
                what="a guide judges the rounds of a canvas",
                where="--guide",
                why="this loop writes one token after the other",
                hint="leave it out, or choose --loop unmask",
            )

    def build(
        self, model: Graph, weights: dict[str, Tensor], meta: Meta, rules: Sequence[str] | None, guide: Any
    ) -> Program:
        program = autoregressive(model, weights, meta, followed_rules(meta) if rules is None else tuple(rules))
        program = program.replace(meta=program.meta | unfollowed(program.meta, program.inputs))
        check_parameters(program, with_defaults(program.meta, {}, None, False)[0])
        return program

    def inputs(
        self, program: Program, prompts: Prompts, n: int, params: Mapping[str, Any], fill: Prompts | None
    ) -> Values:
        made = [rows(program.meta, p) for p in prompts]
        limit = constant(rows_for(program.meta, n))
        return {"prompt": padded(made), "lengths": constant(tuple(map(len, made))), "limit": limit}

    def observe(self, program: Program, inputs: Values) -> Look:
        """Evidence is [branches * sequences * drafts, ...]; there is one draft where a round checks none."""
        size, axes, alone = len(inputs["lengths"]), len(window(program.meta)), 0

        def look(loop: Loop, values: Values) -> list[list[Round]]:
            nonlocal alone
            decided, seen = values[loop.shown].clone(), values[loop.evidence].clone()
            seen = rows_at(seen, values[loop.at]) if loop.at else seen
            drafts = decided.dim() > 1 + axes
            alone = alone if drafts else len(seen)  # rows of a round without drafts
            decided = decided if drafts else decided.unsqueeze(1)
            seen = seen.reshape(alone // size, size, -1, *seen.shape[1:])
            rows = torch.arange(len(seen))
            found = [[Round("token", decided[i, j], seen[:, i, j], rows, drawn=bool(loop.drawn))
                      for j in range(seen.shape[2])] for i in range(size)]  # fmt: skip
            return [[one for one in mine if not one.empty] for mine in found] if drafts else found  # those that count

        return look

    def most_rounds(self, inputs: Values) -> int:
        return int(inputs["limit"])

    def foreseen(self, program: Program, inputs: Values, rounds: Sequence[Round]) -> list[Tensor]:
        """The whole answer but for its last row, after the prompt of each branch: the forward is causal."""
        if not rounds:
            return []
        new = torch.stack([one.decided for one in rounds])
        right = ((new >= 0) & (new < program.meta["vocab"])).reshape(len(new), -1).all(1)[:-1]
        new = new[: int(right.cumprod(0).sum())]  # the last row is not read, nor is what comes after no id
        return [torch.cat([inputs[n][0], new]) for n in ("prompt", "negative") if n in inputs]

    def compared(self, program: Program, inputs: Values, round: Round, number: int) -> tuple[Any, Tensor]:
        """Branches that the rule does not read may be missing."""
        mine, branches = len(round.rows), 2 if "negative" in inputs else 1
        if not read(inputs, number) <= mine <= branches:
            raise Mismatch(f"the rule of {self.placed(program, number)} sees {mine} branches of {branches}")
        return round.rows, torch.ones(mine, dtype=torch.bool)

    def nudged(self, program: Program, evidence: Tensor, round: Round, decided: Tensor, by: float) -> list[Tensor]:
        mine, nudged = torch.cat([round.evidence, evidence[len(round.evidence) :]]), evidence.clone()
        for at in round.differs(decided).nonzero().tolist():
            nudged[(0, *at, int(round.decided[tuple(at)]))] += by
        return [mine, nudged]

    def counting(self, program: Program, inputs: Values, round: Round, evidence: Tensor) -> Tensor:
        """What the rule draws from: of two branches by the default scale of guidance."""
        scale = program.inputs["guidance"].default if len(evidence) > 1 else None
        logits = evidence[0] if scale is None else evidence[1] + float(scale) * (evidence[0] - evidence[1])
        return logits.reshape(-1, logits.shape[-1])

    def chances(self, program: Program, given: Values, logits: Tensor) -> Tensor:
        processors, vocab = chosen(tuple(program.meta["rules"])), int(program.meta["vocab"])
        function, inputs = rule(processors, vocab, True, never=program.meta.get("never", ()), chances=True)
        return function(logits, **{n: given[n] for n in inputs if n != "logits"}).double().softmax(-1)

    def redrawn(self, program: Program, given: Values, loop: Loop, values: Values) -> list[bool]:
        if not loop.drafts:
            return []
        p = self.chances(program, given, values[loop.evidence])
        return redrawn(loop, values, p.reshape(len(given["lengths"]), -1, p.shape[-1]), given)

    def counted(self, program: Program, rounds: int) -> str:
        return f"{ids_of(program.meta, rounds)} tokens"

    def placed(self, program: Program, number: int, at: Sequence[int] = ()) -> str:
        return f"new token {ids_of(program.meta, number) + sum(at)}"

    def guard(self, program: Program) -> Guard:
        capacity, ragged = program.meta["capacity"], program.meta.get("ragged", True)

        def check(prompt: Tensor, lengths: Tensor, limit: Tensor, seed: Tensor, finished: Tensor) -> tuple[Tensor, ...]:
            long = torch.zeros((), dtype=I64) + prompt.shape[1] + (limit - 1).clamp(min=0) > capacity
            wrong = ((lengths < 1) | (lengths > prompt.shape[1])).any()
            status = first([long, wrong, outside(seed), *apart(lengths, prompt, ragged)])
            return status, finished | (status != 0)

        return Guard(check, ["prompt", "lengths", "limit", "seed", "finished"], ["status", "finished"])


def rows_at(seen: Tensor, at: Tensor) -> Tensor:
    """The rows [B * P, V] at [B, P] of those of each sequence [B * N, V]; the first one where there is none."""
    index = at.clamp(min=0).unsqueeze(2).expand(-1, -1, seen.shape[-1])
    return seen.reshape(len(at), -1, seen.shape[-1]).gather(1, index).flatten(0, 1)


def read(inputs: Values, number: int) -> int:
    """How many branches the rule of that round depends on: outside the interval of guidance, one."""
    if "negative" not in inputs:
        return 1
    if "guidance_from" in inputs and not inside(inputs["guidance_from"], inputs["guidance_to"], constant(number)):
        return 1
    return 1 if float(inputs["guidance"]) == 1 else 2


SCHEME = Positions()
