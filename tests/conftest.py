"""Shared by all tests: a tiny program, and goldens."""

from __future__ import annotations

import difflib
import gc
import re
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.ir.executor import Values
from aropt.ir.program import Graph, Program
from aropt.pipeline.compiled import Compiled
from tests.support.run import generate
from tests.support.targets import ORT

gc.set_threshold(200_000, 20, 100)  # graphs live as long as their tests: looking for garbage took 6 % of the time
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so in the background of a shell, and commands honour it
    signal.signal(signal.SIGINT, signal.default_int_handler)
VOCAB, CAPACITY, WIDTH = 11, 16, 4
GOLDEN = Path(__file__).parent / "golden"


class Layer(nn.Module):
    """Causal attention of one head, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).squeeze(1))


class Tiny(nn.Module):
    """ids [B, T] -> logits [B, T, 11]."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@cache
def captured(layers: int) -> tuple[Graph, dict[str, Tensor]]:
    """A `Tiny` with seeded weights, captured once for all rules."""
    from aropt.frontend.trace import capture_model

    torch.manual_seed(0)
    return capture_model(Tiny(layers), VOCAB, CAPACITY)


def make_program(layers: int = 2, rules: tuple[str, ...] = ("temperature",)) -> Program:
    """The plain generation loop of a `Tiny` with seeded weights; do not change it in place."""
    from aropt.loops.positions import autoregressive

    graph, weights = captured(layers)
    meta = {"name": "tiny", "vocab": VOCAB, "capacity": CAPACITY, "null": 0}
    return autoregressive(graph, weights, meta, rules)


def make_stages(program: Program) -> dict[str, Program]:
    """The program as captured, and after each pass of the pipeline."""
    from aropt.pipeline.registry import make, names
    from aropt.rewriting.contract import Applies, planned

    stages = {"captured": program}
    for name in names("default"):
        one = make(name)
        program = one.run(program) if isinstance(planned(one, program, ORT), Applies) else program
        stages[name] = program
    return stages


@pytest.fixture(scope="session")
def tiny_program() -> Program:
    """Two layers of causal attention over 11 tokens, capacity 16; do not change it in place."""
    return make_program()


@pytest.fixture(scope="session")
def tiny_stages(tiny_program: Program) -> dict[str, Program]:
    """{"captured": the tiny program, pass name: the program after it}."""
    return make_stages(tiny_program)


@pytest.fixture(scope="session")
def guided_stages() -> dict[str, Program]:
    """As `tiny_stages`, of one layer with guidance (twice the rows) and all other rules."""
    rules = ("guidance", "repetition-penalty", "bias", "top-k", "top-p", "min-p")
    return make_stages(make_program(1, rules))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what goldens should hold instead of failing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first: no worker begins a long test when the others have nothing left."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Compares a text with tests/golden/<test id>.txt."""

    def check(text: str) -> None:
        name = re.sub(r"[^\w.-]+", "_", request.node.nodeid.split("/")[-1]).strip("_")
        file = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            GOLDEN.mkdir(exist_ok=True)
            file.write_text(text)
        known = file.read_text() if file.exists() else ""
        if text != known:
            changes = difflib.unified_diff(
                known.splitlines(), text.splitlines(), f"golden/{file.name}", "now", lineterm=""
            )
            command = f"pytest '{request.node.nodeid}' --update-golden"
            pytest.fail("\n".join([*changes, f"If this is meant: {command}"]), pytrace=False)

    return check


def rounds_of(program: Program | Compiled, prompts: list[list[int]], n: int, **options: Any) -> list[Values]:
    """What each round of a generation saw."""
    seen: list[Values] = []
    generate(program, prompts, n, on_round=lambda values: seen.append(dict(values)), **options)
    return seen
