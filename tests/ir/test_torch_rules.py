"""Shape rules that are asked once: what they say of one graph is no other graph's."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from aropt.ir import torch_compat
from aropt.ir.printer import value_text
from aropt.ir.program import Spec
from aropt.ir.torch_compat import propagate, run_alone, run_on_fakes

aten = torch.ops.aten
ROW = {"x": Spec(torch.float32, ("B",))}
Call = tuple[Any, ...]


@pytest.fixture(autouse=True)
def nothing_asked() -> Iterator[None]:
    torch_compat.RULES.clear()
    yield
    torch_compat.RULES.clear()


def graph_of(*calls: Call, inputs: tuple[str, ...] = ("x",), weights: tuple[str, ...] = ()) -> fx.Graph:
    """Calls in a row; a string among the arguments is an input, a weight, or "-1" for the result before."""
    graph = fx.Graph()
    nodes = {n: graph.placeholder(n) for n in inputs} | {w: graph.get_attr(w) for w in weights}
    results = []
    for target, *args in calls:
        nodes["-1"] = graph.call_function(target, tuple(nodes.get(a, a) if isinstance(a, str) else a for a in args))
        results.append(nodes["-1"])
    graph.output(tuple(results))
    return graph


Run = Callable[..., tuple[dict[fx.Node, Any], dict[Any, str]]]


def types(run: Run, graph: fx.Graph, inputs: dict[str, Spec], weights: dict[str, Tensor] | None = None) -> list[str]:
    """The types of the values of calls, with their strides."""
    values, names = run(graph, inputs, weights or {})
    calls = [v for n, v in values.items() if n.op == "call_function"]
    strides = [[torch_compat.dim_text(s, names) for s in v.stride()] if isinstance(v, Tensor) else [] for v in calls]
    return [f"{value_text(v, names)} {s}" for v, s in zip(calls, strides, strict=True)]


def asked() -> int:
    """How many answers are kept."""
    return sum(len(r.answers) for r in torch_compat.RULES.values())


def test_a_rule_is_asked_once() -> None:
    inputs = {"x": Spec(torch.float32, ("B", "T", 8))}
    graph = graph_of((aten.relu.default, "x"), (aten.transpose.int, "-1", 1, 2), (aten.relu.default, "-1"))
    assert types(run_on_fakes, graph, inputs) == types(run_alone, graph, inputs)
    count = asked()
    again = graph_of((aten.relu.default, "x"), (aten.relu.default, "-1"), (aten.transpose.int, "-1", 1, 2))
    assert types(run_on_fakes, again, inputs) == types(run_alone, again, inputs)
    assert asked() == count


def test_arguments_of_other_types_are_others() -> None:
    inputs = {"x": Spec(torch.int64, ("B",)), "y": Spec(torch.int32, ("B",))}
    found = []
    for value in (1, 1.0, True):
        graph = graph_of(
            (aten.mul.Scalar, "x", value),
            (aten.mul.Scalar, "y", value),
            (aten.full.default, [2], value),
            inputs=("x", "y"),
        )
        found.append(types(run_on_fakes, graph, inputs))
        assert found[-1] == types(run_alone, graph, inputs)
    assert [kinds[2][:3] for kinds in found] == ["i64", "f32", "boo"]


def test_weights_of_other_types_are_others() -> None:
    graph = graph_of((aten.relu.default, "w"), weights=("w",))
    plain = torch.zeros(4, 4)
    for weight in (plain, torch.zeros(4, 1).expand(4, 4), plain.double(), plain.t()):
        assert types(run_on_fakes, graph, ROW, {"w": weight}) == types(run_alone, graph, ROW, {"w": weight})


def test_sizes_in_another_order_are_others() -> None:
    for dims in (("B", "T"), ("T", "B"), ("B", "2*B"), ("2*B", "B"), ("B", "B"), ("B", 3), (3, 3)):
        inputs = {"x": Spec(torch.float32, dims)}
        graph = graph_of((aten.transpose.int, "x", 0, 1), (aten.sum.dim_IntList, "-1", [0]))
        assert types(run_on_fakes, graph, inputs) == types(run_alone, graph, inputs)


def test_a_size_that_a_graph_fixes_is_free_in_the_next() -> None:
    free = graph_of((aten.relu.default, "x"))
    fixing = graph_of((aten.relu.default, "x"), (aten.add.Tensor, "-1", "w"), weights=("w",))
    weights = {"w": torch.zeros(3)}  # as many as B's example size
    for _ in range(2):
        assert types(run_on_fakes, free, ROW) == ["f32[B] [1]"]
        assert types(run_on_fakes, fixing, ROW, weights) == types(run_alone, fixing, ROW, weights)
        assert types(run_on_fakes, fixing, ROW, weights)[1] == "f32[3] [1]"
        assert all(rules.clean() for rules in torch_compat.RULES.values())


def test_what_a_rule_assumes_is_forgotten() -> None:
    graph = graph_of((aten.split.Tensor, "x", 2))  # in two parts, as of three
    assert types(run_on_fakes, graph, ROW) == types(run_alone, graph, ROW)
    (rules,) = torch_compat.RULES.values()
    env: Any = rules.mode.shape_env
    assert rules.clean() and not env.guards and not env.axioms


def test_a_bound_that_a_rule_assumes_is_forgotten() -> None:
    """A table that is long enough for a size: the next one may be shorter, or longer."""
    for length in (64, 8, 64):
        table = {"w": torch.zeros(length, 2)}
        graph = graph_of((aten.sym_size.int, "x", 0), (aten.slice.Tensor, "w", 0, None, "-1"), weights=("w",))
        assert types(run_on_fakes, graph, ROW, table) == types(run_alone, graph, ROW, table)
        assert types(run_on_fakes, graph, ROW, table)[1] == "f32[B, 2] [2, 1]"
    (rules,) = torch_compat.RULES.values()
    assert rules.clean() and len(rules.answers) == 3


def test_sizes_that_follow_from_others_are_not_fixed() -> None:
    inputs = {"x": Spec(torch.float32, ("B", 2)), "y": Spec(torch.float32, ("2*B", 2))}
    graph = graph_of((aten.cat.default, ["x", "x"]), (aten.add.Tensor, "-1", "y"), inputs=("x", "y"))
    node = next(n for n in graph.nodes if n.target is aten.cat.default)
    x = next(n for n in graph.nodes if n.name == "x")
    node.args = ([x, x],)
    assert types(run_on_fakes, graph, inputs) == types(run_alone, graph, inputs)
    assert types(run_on_fakes, graph, inputs)[1] == "f32[2*B, 2] [2, 1]"
    assert all(rules.clean() and rules.answers for rules in torch_compat.RULES.values())


def test_sizes_that_values_tell_are_their_own() -> None:
    graph = graph_of((aten.nonzero.default, "x"), (aten.relu.default, "x"), (aten.nonzero.default, "-1"))
    for _ in range(2):
        assert [t[:10] for t in types(run_on_fakes, graph, ROW)][::2] == ["i64[u0, 1]", "i64[u1, 1]"]


def test_graphs_share_no_mode() -> None:
    one, other = (graph_of((aten.relu.default, "x")) for _ in range(2))
    names = [propagate(graph, ROW, {}) for graph in (one, other)]
    first, second = (next(n for n in g.nodes if n.op == "call_function").meta["val"] for g in (one, other))
    assert int(first.shape[0]) == 3  # fixes it, in its own graph
    assert value_text(first, names[0]) == "f32[3]"
    assert value_text(second, names[1]) == "f32[B]"


def test_a_failing_rule_names_its_node() -> None:
    good, bad = (
        graph_of((aten.relu.default, "x")),
        graph_of((aten.relu.default, "x"), (aten.sum.dim_IntList, "-1", [4])),
    )
    for _ in range(2):
        assert types(run_on_fakes, good, ROW) == ["f32[B] [1]"]
        with pytest.raises(IndexError) as error:
            run_on_fakes(bad, ROW, {})
        assert error.value.aropt_node.target is aten.sum.dim_IntList  # type: ignore[attr-defined]


def test_no_weight_is_kept() -> None:
    weight = torch.zeros(4, 4)
    graph = graph_of((aten.relu.default, "w"), weights=("w",))
    propagate(graph, ROW, {"w": weight})
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None
    assert asked()


def test_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_compat, "MOST", 2)
    for name in ("B", "T", "R", "B"):
        run_on_fakes(graph_of((aten.relu.default, "x")), {"x": Spec(torch.float32, (name,))}, {})
    assert [*torch_compat.RULES] == [("R",), ("B",)]


def test_a_size_is_written_in_the_names_of_its_graph() -> None:
    fakes, names, _ = torch_compat.fake_inputs(ROW)
    size, (symbol,) = fakes["x"].shape[0] * 2, names
    given: list[dict[Any, str]] = [{symbol: "B"}, {symbol: "T"}, {symbol: "B"}, {}]
    assert [torch_compat.dim_text(size, n) for n in given] == ["2*B", "2*T", "2*B", f"2*{symbol}"]
