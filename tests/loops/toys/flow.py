"""A toy loop level in one file: latents flow from noise to data by Euler's method (Lipman et al. 2023, 2210.02747).

A round decides floats [B, 6] from a velocity. What is generated are floats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from aropt.frontend.trace import capture_function, capture_module
from aropt.ir import ops
from aropt.ir.edit import call_by_name
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Input, Program, Spec, StateSpec
from aropt.loops.nest import Level, nest
from aropt.loops.requests.cases import Case, Requests
from aropt.loops.requests.design import Row
from aropt.loops.requests.levels import SEED, STREAMS, Levels, Range
from aropt.loops.rules import BOOL, F32, I64
from aropt.loops.runtime import constant, padded
from aropt.loops.scheme import Prompts, Scheme

SIZE, CLASSES, WIDTH = 6, 4, 16
SCALAR, BATCH, LATENT = Spec(I64), Spec(I64, ("B",)), Spec(F32, ("B", SIZE))


class Model(nn.Module):
    """The velocity of latents float32 [B, 6] at time [] for classes [B, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(SIZE + 1, WIDTH), nn.Linear(WIDTH, SIZE)
        self.label = nn.Embedding(CLASSES, WIDTH)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        at = time.reshape(1, 1).expand(x.shape[0], 1)
        return self.outside(torch.tanh(self.inside(torch.cat([x, at], 1)) + self.label(label[:, 0])))


class FlowRequests(Requests):
    """Classes in batches, with several numbers of steps."""

    def factors(self) -> Levels:
        one: dict[str, Range] = {"1": (1, 1)}
        return {
            "sequences": {"2-3": (2, 3), "1": (1, 1)}, "length": one, "padding": {"0": (0, 0)},
            "text": {"random": (0, 0)}, "new": {"2-5": (2, 5), "1": (1, 1)},
            "stop": {"none": (0, 0)}, "seed": SEED, "streams": STREAMS,
            "temperature": {"0": (0, 0)},
        }  # fmt: skip

    def values(self, params: dict[str, float]) -> dict[str, Any]:
        return {}

    def fits(self, length: int, n: int) -> int:
        return n

    def varied(self) -> list[tuple[str, Row]]:
        return []

    def boundaries(self) -> list[Case]:
        return []

    def more_boundaries(self) -> list[Case]:
        return []


class Flow(Scheme):
    """Rounds decide latents, step by step; `n` of a request are steps."""

    kind, requests = "flow", FlowRequests

    def build(
        self, model: Graph, weights: dict[str, Tensor], meta: dict[str, Any], rules: Any = None, guide: Any = None
    ) -> Program:
        ops.load_all()
        graphs = {"model": model, "start": start(), "euler": euler()}
        inputs = {
            "label": Input(BATCH_OF_ONE),
            "limit": Input(SCALAR),
            "seed": Input(SCALAR, 0),
            "streams": Input(BATCH),
        }
        state = {
            "x": StateSpec("latents", LATENT), "time": StateSpec("counter", Spec(F32)),
            "count": StateSpec("counter", SCALAR), "finished": StateSpec("flag", Spec(BOOL)),
        }  # fmt: skip
        level = Level(
            self.kind, graphs, inputs, state, ("x",), lambda rule: map(call_by_name, (model, graphs[rule])),
            rules=("euler",), decides="x", evidence="velocity",
        )  # fmt: skip
        return nest(level, weights, {**meta, "loop": self.kind})

    def inputs(self, program: Program, prompts: Prompts, n: int, params: Mapping[str, Any], fill: Any) -> Values:
        return {"label": padded(prompts), "limit": constant(n)}

    def rows(self, inputs: Values) -> int:
        return 1


BATCH_OF_ONE = Spec(I64, ("B", 1))


def start() -> Graph:
    """Noise, one draw a sequence."""

    def function(seed: Tensor, streams: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        uniform = torch.ops.aropt.noise(seed, streams, streams * 0, SIZE)
        return 4 * uniform - 2, limit.to(F32) * 0, limit * 0, limit <= 0

    inputs = {"seed": SCALAR, "streams": BATCH, "limit": SCALAR}
    return capture_function("start", function, inputs, ["x", "time", "count", "finished"], "prologue")


def euler() -> Graph:
    """A step of 1 / limit along the velocity."""

    def function(x: Tensor, velocity: Tensor, count: Tensor, limit: Tensor) -> tuple[Tensor, ...]:
        return x + velocity / limit, (count + 1) / limit, count + 1, count + 1 >= limit

    inputs = {"x": LATENT, "velocity": LATENT, "count": SCALAR, "limit": SCALAR}
    return capture_function("euler", function, inputs, ["x", "time", "count", "finished"], "commit")


SCHEME = Flow()


def program() -> Program:
    torch.manual_seed(0)
    inputs = {"x": LATENT, "time": Spec(F32), "label": BATCH_OF_ONE}
    graph, weights = capture_module("model", Model(), inputs, ["velocity"])
    meta = {"name": "flow", "vocab": CLASSES, "capacity": 64, "ragged": True, "prompts": [[1]], "rules": []}
    return SCHEME.build(graph, weights, meta)
