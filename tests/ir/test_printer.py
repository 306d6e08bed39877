"""The text form: deterministic, foldable, and goldens of what passes do."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

from aropt.ir.fold_text import folded
from aropt.ir.printer import diff, digest, graph_text, text
from aropt.ir.program import Graph, Program, Spec
from aropt.ir.torch_compat import build
from tests.conftest import make_program, make_stages

aten = torch.ops.aten
Golden = Callable[[str], None]


@pytest.fixture(scope="module")
def small_stages() -> dict[str, Program]:
    """One layer, so that goldens stay short."""
    return make_stages(make_program(layers=1))


def test_text(tiny_program: Program, golden: Golden) -> None:
    golden(text(tiny_program))


def test_text_unfolded(tiny_program: Program, golden: Golden) -> None:
    assert re.search(r"@layers.1.out.weight: f32\[4, 4\] #[0-9a-f]{8}\)", text(tiny_program, fold=False))
    golden(re.sub(r"#[0-9a-f]{8}", "#hash", graph_text(tiny_program.graphs["model"], tiny_program.weights, fold=False)))


def test_fused_step(small_stages: dict[str, Program], golden: Golden) -> None:
    program = small_stages["fuse-sampler"]
    golden(graph_text(program.graphs["step_greedy"], program.weights))


def test_twice(tiny_stages: dict[str, Program]) -> None:
    for program in tiny_stages.values():
        assert text(program) == text(program)
        assert digest(program) == digest(program)


def test_other_process(small_stages: dict[str, Program]) -> None:
    """The same text from a fresh interpreter with another hash seed."""
    script = (
        "import hashlib\nfrom aropt.ir.printer import text, digest\n"
        "from tests.conftest import make_program, make_stages\n"
        "for p in make_stages(make_program(1)).values(): print(hashlib.sha256(text(p).encode()).hexdigest(), digest(p))"
    )
    env = {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True, check=True)
    here = [(hashlib.sha256(text(p).encode()).hexdigest(), digest(p)) for p in small_stages.values()]
    assert [tuple(line.split()) for line in done.stdout.splitlines()] == here


def test_no_paths_or_objects(tiny_stages: dict[str, Program]) -> None:
    for program in tiny_stages.values():
        for fold in (True, False):
            found = text(program.replace(meta={**program.meta, "source": "/somewhere/model"}), fold)
            assert "/" not in found and "0x" not in found and "<" not in found and "?" not in found


def test_digest_tells_apart(tiny_program: Program) -> None:
    p = tiny_program
    name, weight = next(iter(p.weights.items()))
    changed = [
        p.replace(name="other"),
        p.replace(weights={**p.weights, name: weight + 1e-3}),
        p.replace(meta={**p.meta, "capacity": 17}),
        p.replace(inputs={**p.inputs, "temperature": dataclasses.replace(p.inputs["temperature"], default=0.5)}),
        p.replace(state={**p.state, "count": dataclasses.replace(p.state["count"], init=0)}),
        p.replace(graphs={**p.graphs, "greedy": p.graphs["sample"]}),
    ]
    digests = {digest(q) for q in changed} | {digest(p)}
    assert len(digests) == len(changed) + 1
    assert digest(p.replace(meta={**p.meta, "executor": object()})) == digest(p)


def test_kinds_of_arguments(golden: Golden) -> None:
    """Ints, floats, bools, infinities, dtypes, devices, memory formats, lists, several results, sizes."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    size = graph.call_function(aten.sym_size.int, (x, 0))
    wide = graph.call_function(
        aten.new_zeros.default, (x, [size, 2]), {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    )
    same = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    clamp = graph.call_function(aten.clamp.default, (same, -torch.inf, torch.inf))
    scaled = graph.call_function(aten.mul.Tensor, (clamp, 2.0))
    scaled = graph.call_function(aten.mul.Tensor, (scaled, 2))
    best = graph.call_function(aten.sum.dim_IntList, (scaled, [1], True))
    gelu = graph.call_function(aten.gelu.default, (best,), {"approximate": "tanh"})
    graph.output((wide, gelu))
    golden(graph_text(build("kinds", graph, {"x": Spec(torch.float32, ("B", "2*T"))}, ["a", "b"], {}), {}))


def chain(layers: list[tuple[str, float]]) -> Graph:
    """x = -x, then for each layer x = relu(x + weight) * factor."""
    graph = fx.Graph()
    x = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
    for name, factor in layers:
        x = graph.call_function(aten.add.Tensor, (x, graph.get_attr(name)))
        x = graph.call_function(aten.relu.default, (x,))
        x = graph.call_function(aten.mul.Tensor, (x, factor))
    graph.output((x,))
    return build("chain", graph, {"x": Spec(torch.float32, (2,))}, ["y"], {n: torch.zeros(2) for n, _ in layers})


@pytest.mark.parametrize(
    ("layers", "folds"),
    [
        ([(f"l.{i}.w", 2.0) for i in range(4)], ["x 4 (ids +3, @l.0..3, %0 then %3)"]),
        ([(f"l.{2 * i}.w", 2.0) for i in range(4)], ["x 4 (ids +3, @l.0..6 by 2, %0 then %3)"]),
        ([("l.0.w", 2.0), ("l.1.w", 2.0), ("l.2.w", 2.5), ("l.3.w", 2.0)], []),  # another constant
        ([(f"l.{i}.w", 2.0) for i in (0, 1, 4, 9)], []),  # no one step
        ([(f"l.{i}.w", 2.0) for i in (3, 2, 1, 0)], []),  # backwards
        ([(f"l.{i}.w", 2.0) for i in (0, 1, 2, 9)], ["x 3 (ids +3, @l.0..2, %0 then %3)"]),
    ],
)
def test_folds(layers: list[tuple[str, float]], folds: list[str]) -> None:
    graph = chain(layers)
    lines = graph_text(graph, {n: torch.zeros(2) for n, _ in layers}).splitlines()
    found = [line.strip() for line in lines if line.strip().startswith("x ")]
    assert found == folds


@pytest.mark.parametrize(
    "lines",
    [
        [
            "  %0: f = a(%x)",
            "  %1: f = b(%0)",
            "  %2: f = b(%1)",
            "  %3: f = a(%1)",
            "  %4: f = b(%3)",
            "  %5: f = b(%3)",
        ],
        [f"  %{i}: f32[2] = a(%y, @w.{i})" if i % 2 else f"  %{i}: f32[2] = a(%x, @w.{i})" for i in range(8)][:5],
        ["  %9: f = a(%1)", "  %10: f = a(%1)", "  %11: f = a(%2)", "  %12: f = a(%8)", "  %13: f = a(%3)"],
    ],
)
def test_differences_are_not_folded(lines: list[str]) -> None:
    assert folded(lines) == lines


def test_diff_keeps_numbers(tiny_program: Program) -> None:
    """An inserted node does not renumber what follows; a rewired one shows."""
    before = tiny_program.replace(graphs={"chain": chain([("l.0.w", 2.0), ("l.2.w", 3.0)])}, weights={})
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.abs.default, (x,))
    x = graph.call_function(aten.neg.default, (x,))
    for name, factor in (("l.0.w", 2.0), ("l.2.w", 3.0)):
        x = graph.call_function(aten.add.Tensor, (x, graph.get_attr(name)))
        last, x = x, graph.call_function(aten.relu.default, (x if factor == 2.0 else a,))
        x = graph.call_function(aten.mul.Tensor, (x, factor))
    graph.output((graph.call_function(aten.add.Tensor, (x, last)),))
    weights = {"l.0.w": torch.zeros(2), "l.2.w": torch.zeros(2)}
    after = before.replace(graphs={"chain": build("chain", graph, {"x": Spec(torch.float32, (2,))}, ["y"], weights)})
    changes = [line for line in diff(before, after).splitlines() if line[0] in "+-"][2:]
    assert changes == [
        "+  %0': f32[2] = aten.abs(%x)",
        "-  %5: f32[2] = aten.relu(%4)",
        "+  %5: f32[2] = aten.relu(%0')",
        "-  return y = %6",
        "+  %8': f32[2] = aten.add.Tensor(%6, %4)",
        "+  return y = %8'",
    ]
    assert diff(before, before) == ""
