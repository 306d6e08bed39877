"""A toy loop level in one file: an image in scales of 1, 2 and 4 rows, each decided at once (as VAR, 2404.02905).

Rows grow each round: the ids so far, then as many START ids as the scale has rows. The forward sees earlier scales and
its own, by a mask over the scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aropt.frontend.trace import capture_function, capture_model
from aropt.ir import ops
from aropt.ir.control import Call
from aropt.ir.edit import call_by_name
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Input, Program, Spec, StateSpec
from aropt.loops.nest import Level, nest
from aropt.loops.requests.cases import Case, Requests
from aropt.loops.requests.design import Row
from aropt.loops.requests.levels import PARAMETERS, SEED, STREAMS, Levels, Range
from aropt.loops.rules import BOOL, I64, chosen, rule
from aropt.loops.runtime import padded
from aropt.loops.scheme import Prompts, Scheme

VOCAB, START, CLASSES, WIDTH = 9, 9, 4, 8
SIZES = (1, 2, 4)
ROWS = sum(SIZES)
ENDS = tuple(1 + sum(SIZES[: i + 1]) for i in range(len(SIZES)))  # rows after each scale, the class's row too
SCALAR, BATCH = Spec(I64), Spec(I64, ("B",))


class Model(nn.Module):
    """ids [B, T] -> logits [B, T, 9]: a class, then the scales."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(START + 1 + CLASSES, WIDTH), nn.Embedding(1 + ROWS, WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)
        self.register_buffer("scale", torch.tensor([0, *(i + 1 for i, n in enumerate(SIZES) for _ in range(n))]))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place.weight[: ids.shape[1]]
        q, k, v = (part.unsqueeze(1) for part in self.qkv(x).chunk(3, -1))
        scale = self.scale[: ids.shape[1]]
        seen = scale.unsqueeze(1) >= scale.unsqueeze(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(x + mixed.squeeze(1))


class ScaleRequests(Requests):
    """Classes, drawn and greedy, in batches."""

    def factors(self) -> Levels:
        one: dict[str, Range] = {"1": (1, 1)}
        return {
            "sequences": {"2-3": (2, 3), "1": (1, 1)}, "length": one, "padding": {"0": (0, 0)},
            "new": {str(ROWS): (ROWS, ROWS)}, "text": {"random": (0, 0)}, "stop": {"none": (0, 0)}, "seed": SEED,
            "streams": STREAMS, "temperature": PARAMETERS["temperature"], "top_k": {"off": (0, 0), "1-3": (1, 3)},
        }  # fmt: skip

    def varied(self) -> list[tuple[str, Row]]:
        return []

    def boundaries(self) -> list[Case]:
        return []

    def more_boundaries(self) -> list[Case]:
        return []


class Scales(Scheme):
    """Rounds decide all rows of a scale."""

    kind, requests, least = "scales", ScaleRequests, ROWS

    def build(
        self, model: Graph, weights: dict[str, Tensor], meta: dict[str, Any], rules: Any = None, guide: Any = None
    ) -> Program:
        ops.load_all()
        processors = chosen(tuple(rules or ("temperature", "top-k")))
        graphs = {"model": model, "start": start(), "grow": grow(), "last": last(), "write": write()}
        for name, sampled in (("greedy", False), ("sample", True)):
            function, inputs = rule(processors, VOCAB, sampled)
            graphs[name] = each_row(name, function, inputs)
        inputs = {
            "prompt": Input(Spec(I64, ("B", "P")), doc="classes"), "seed": Input(SCALAR, 0), "streams": Input(BATCH),
            "greedy": Input(Spec(BOOL), True),
        }  # fmt: skip
        inputs |= {n: i for p in processors.values() for n, i in p.params.items()}
        state = {
            "tokens": StateSpec("tokens", Spec(I64, ("B", "T"))), "count": StateSpec("counter", SCALAR),
            "finished": StateSpec("flag", Spec(BOOL)),
        }  # fmt: skip
        graphs["answer"] = answer()
        level = Level(
            self.kind, graphs, inputs, state, ("generated",), partial(decide, graphs), decides="token", evidence="row"
        )
        return nest(level, weights, {**meta, "loop": self.kind})

    def inputs(self, program: Program, prompts: Prompts, n: int, params: Mapping[str, Any], fill: Any) -> Values:
        return {"prompt": padded(prompts)}

    def rows(self, inputs: Values) -> int:
        return 1 + ROWS


def at(numbers: tuple[int, ...], count: Tensor) -> Tensor:
    """The number of that scale."""
    return sum((number * (count == i) for i, number in enumerate(numbers)), torch.zeros_like(count))


def ids() -> Spec:
    return Spec(I64, ("B", "T"))


def start() -> Graph:
    def function(prompt: Tensor) -> tuple[Tensor, ...]:
        count = prompt.flatten()[0] * 0
        return prompt + 0, count, count > 0

    inputs = {"prompt": Spec(I64, ("B", "P"))}
    return capture_function("start", function, inputs, ["tokens", "count", "finished"], "prologue")


def grow() -> Graph:
    """The ids so far and the rows of the next scale."""

    def function(tokens: Tensor, count: Tensor) -> Tensor:
        size = at(SIZES, count)
        due = (torch.arange(max(SIZES)) < size).unsqueeze(0).expand(tokens.shape[0], -1)
        return torch.cat([tokens, torch.ops.aropt.due_slots(due) * 0 + START], 1)

    return capture_function("grow", function, {"tokens": ids(), "count": SCALAR}, ["grown"])


def last() -> Graph:
    """The rows of the scale: those that were grown."""

    def function(logits: Tensor, count: Tensor) -> Tensor:
        size = at(SIZES, count)
        due = (torch.arange(max(SIZES)) < size).unsqueeze(0).expand(logits.shape[0], -1)
        slots = torch.ops.aropt.due_slots(due)
        slots = slots + (at(ENDS, count) - size)
        return logits.gather(1, slots.unsqueeze(2).expand(-1, -1, logits.shape[2])).to(torch.float32)

    spec = Spec(torch.float32, ("B", "T", VOCAB))
    return capture_function("last", function, {"logits": spec, "count": SCALAR}, ["row"])


def each_row(name: str, function: Any, inputs: dict[str, Spec]) -> Graph:
    """The rule for each row of a scale, with noise of its own."""

    def every(logits: Tensor, **values: Tensor) -> Tensor:
        rows = logits.shape[1]
        if "streams" in values:
            count = values.pop("count")
            places = torch.arange(rows) + at(ENDS, count)
            values["position"] = places.unsqueeze(0).expand(logits.shape[0], -1).flatten()
            values["streams"] = values["streams"].unsqueeze(1).expand(-1, rows).flatten()
        return function(logits.flatten(0, 1), **values).reshape(-1, rows)

    given = {n: s for n, s in inputs.items() if n not in ("logits", "position")}
    given |= {"count": SCALAR} if "streams" in given else {}
    given = {"logits": Spec(torch.float32, ("B", "J", VOCAB)), **given}
    return capture_function(name, every, given, ["token"], "rule")


def write() -> Graph:
    """The ids with those of the scale."""

    def function(tokens: Tensor, token: Tensor, count: Tensor) -> tuple[Tensor, ...]:
        return torch.cat([tokens, token], 1), count + 1, count + 1 >= len(SIZES)

    inputs = {"tokens": ids(), "token": Spec(I64, ("B", "J")), "count": SCALAR}
    return capture_function("write", function, inputs, ["tokens", "count", "finished"], "commit")


def answer() -> Graph:
    """All but the class."""

    def function(tokens: Tensor) -> Tensor:
        return tokens.index_select(1, torch.arange(ROWS) + 1)

    return capture_function("answer", function, {"tokens": ids()}, ["generated"], "epilogue")


def decide(graphs: dict[str, Graph], name: str) -> list[Call]:
    """A round: the ids of a scale."""
    pick = Call(name, {n: "row" if n == "logits" else n for n in graphs[name].inputs}, {"token": "token"})
    return [call_by_name(graphs["grow"]), Call("model", {"ids": "grown"}, {"logits": "logits"}),
            call_by_name(graphs["last"]), pick, call_by_name(graphs["write"])]  # fmt: skip


SCHEME = Scales()


def program() -> Program:
    torch.manual_seed(0)
    graph, weights = capture_model(Model(), START + 1 + CLASSES, 1 + ROWS)
    meta = {"name": "scales", "vocab": VOCAB, "input_vocab": START + 1 + CLASSES, "capacity": 1 + ROWS, "ragged": True,
            "prompts": [[START + 1]], "rules": ["temperature", "top-k"]}  # fmt: skip
    return SCHEME.build(graph, weights, meta)
