"""A model of windows whose two sides are written in many ways, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aropt
from aropt.frontend.trace import capture_model
from aropt.ir.interpreter import Eager
from aropt.passes.token_shuffle_fusion import TokenShuffleFusion
from aropt.rewriting.contract import Applies, Skips, planned
from aropt.validate.compare import TOLERANCE
from aropt.validate.oracle import Oracle, noise_floor
from tests.support.targets import EAGER

W, LEVELS, CLASSES, WIDTH, ROWS = 4, 5, 3, 8, 4
KNOWN = LEVELS + CLASSES + 1
Map = Callable[..., Tensor]


class Constant(nn.Module):
    """Rows of so many ids, whose logits don't matter."""

    def __init__(self, unit: int, vocab: int) -> None:
        super().__init__()
        self.unit, self.single, self.capacity = unit, vocab, ROWS
        self.table = nn.Embedding(vocab, vocab)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


@cache
def loop(unit: int, vocab: int) -> aropt.Program:
    """The loop around a forward, whose graphs take most of a capture's time."""
    return aropt.capture(Constant(unit, vocab), rules=["temperature"], vocab=vocab, input_vocab=vocab)


def captured(model: nn.Module, levels: int = LEVELS) -> aropt.Program:
    """The model's program; its weights are drawn larger than a training would start from, so that logits differ."""
    graph, weights = capture_model(model, model.input_vocab, model.capacity, (model.unit,))  # type: ignore[arg-type]
    plain = loop(model.unit, levels)  # type: ignore[arg-type]
    meta = {n: getattr(model, n) for n in ("single", "input_vocab", "null", "capacity") if hasattr(model, n)}
    return plain.replace(graphs={**plain.graphs, "model": graph}, weights=weights, meta={**plain.meta, **meta})


def ids_for(program: aropt.Program, rows: int) -> Tensor:
    """ids int64 [6, rows, W]: random windows, and ids alone, before, between and after them."""
    generator, meta = torch.Generator().manual_seed(0), program.meta
    single, known = int(meta["single"]), int(meta["input_vocab"])
    ids = torch.randint(single, (6, rows, meta["unit"]), generator=generator)
    alone = torch.randint(single, known, (6, rows, 1), generator=generator) if known > single else ids[..., :1]
    return torch.where(torch.rand(6, rows, 1, generator=generator) < 0.4, alone, ids)


def same_logits(plain: aropt.Program, fused: aropt.Program, rows: int = ROWS) -> bool:
    """Whether the forwards are as near each other as validation asks for."""
    ids = ids_for(plain, rows)
    single, double = (found["logits"] for found in Oracle(plain).forward({"ids": ids}))
    mine = Eager(fused).call("model", {"ids": ids})["logits"]
    return float((mine - single).abs().max()) <= TOLERANCE * noise_floor(single, double)


def counts(program: aropt.Program, graph: str = "model") -> tuple[int, int]:
    """How many of the two ops a graph has."""
    names = [str(n.target) for n in program.graphs[graph].fx.nodes]
    return names.count("aropt.token_shuffle.default"), names.count("aropt.token_unshuffle.default")


def fused(plain: aropt.Program, limit: int = 256) -> tuple[Applies | Skips, aropt.Program]:
    """What the pass says and makes; both agree on which sides are fused, and the logits stay the same."""
    one = TokenShuffleFusion(limit)
    plan, made = planned(one, plain, EAGER), one.run(plain)
    matches = plan.matches if isinstance(plan, Applies) else ()
    assert counts(made) == tuple(sum(f"model, {side}:" in m for m in matches) for side in ("in", "out"))
    assert len(matches) + len(plan.rejected) == 2
    assert same_logits(plain, made, min(ROWS, int(plain.meta["capacity"])))
    return plan, made


class Written(nn.Module):
    """A model of windows of four ids: ways in and out that tests give, and a tanh for a backbone."""

    unit, single, input_vocab, null, capacity = W, LEVELS, KNOWN, LEVELS + CLASSES, ROWS

    def __init__(self, way_in: Map | None = None, way_out: Map | None = None, middle: Map | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.h = nn.Parameter(torch.randn(LEVELS, WIDTH))  # the head
        self.g = nn.Parameter(torch.randn(WIDTH, WIDTH // W))  # the lift
        self.f = nn.Parameter(torch.randn(WIDTH, WIDTH))  # the expansion
        self.e = nn.Parameter(torch.randn(ROWS, WIDTH))  # positions
        self.d = nn.Parameter(torch.randn(WIDTH // W, WIDTH))  # what narrows
        self.r = nn.Parameter(torch.randn(WIDTH, W * WIDTH))  # what reduces
        self.t = nn.Parameter(torch.randn(KNOWN, WIDTH))  # the table
        self.given = (way_in or plain_in, middle or tanh, way_out or plain_out)

    def forward(self, ids: Tensor) -> Tensor:
        way_in, middle, way_out = self.given
        return way_out(self, middle(self, way_in(self, ids), ids))


def positions(m: Written, length: int) -> Tensor:
    return F.embedding(torch.arange(length), m.e)


def tanh(m: Written, x: Tensor, ids: Tensor) -> Tensor:
    return torch.tanh(x + positions(m, ids.shape[1]))


def alone(m: Written, ids: Tensor, windows: Tensor) -> Tensor:
    """The class's own row where one stands."""
    return torch.where(ids[..., :1] >= LEVELS, F.embedding(ids[..., 0], m.t), windows)


def plain_in(m: Written, ids: Tensor) -> Tensor:
    return alone(m, ids, F.linear(F.embedding(ids, m.t), m.d).flatten(2))


def plain_out(m: Written, x: Tensor) -> Tensor:
    return F.linear(F.linear(F.linear(x, m.f).unflatten(2, (W, -1)), m.g), m.h)
