"""Each rule of the verifier catches a program that breaks it; sound programs pass."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from aropt.errors import VerificationFailed
from aropt.ir import ops
from aropt.ir.control import Call, If, Loop, Seq, calls, loops
from aropt.ir.program import Graph, Input, Program, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.ir.verify import VERIFIED, verify

aten = torch.ops.aten
F32, I64, BOOL = torch.float32, torch.int64, torch.bool
ROWS = Spec(F32, ("B", 2))


def graph_of(name: str, write: Callable[[fx.Graph, dict[str, fx.Node]], list[fx.Node]], inputs: dict[str, Spec],
             outputs: list[str]) -> Graph:  # fmt: skip
    """A graph that `write` fills in."""
    graph = fx.Graph()
    graph.output(tuple(write(graph, {n: graph.placeholder(n) for n in inputs})))
    return build(name, graph, inputs, outputs, {"w": torch.ones(2)})


def call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    return graph.call_function(target, args)


def simple() -> Program:
    """x is halved and its row 0 replaced until `done`; each round's sums are emitted."""
    step = graph_of(
        "step",
        lambda g, x: [
            call(g, aten.mul.Tensor, x["x"], g.get_attr("w")),
            call(g, aten.index_copy.default, x["store"], 0, x["slot"], call(g, aten.slice.Tensor, x["x"], 0, 0, 1)),
            call(g, aten.sum.dim_IntList, x["x"], [1]),
            call(g, aten.any.default, x["x"]),
        ],
        {"x": ROWS, "store": Spec(F32, ("S", 2)), "slot": Spec(I64, (1,))}, ["x", "store", "total", "done"],
    )  # fmt: skip
    start = graph_of("start", lambda g, x: [call(g, aten.neg.default, x["given"])], {"given": ROWS}, ["x"])
    state = {"x": StateSpec("tokens", ROWS), "store": StateSpec("append-kv", Spec(F32, ("S", 2)), 0.0, 0),
             "done": StateSpec("flag", Spec(BOOL), 0)}  # fmt: skip
    body = Call("step", {n: n for n in step.inputs}, {n: n for n in step.outputs})
    control = Seq((Call("start", {"given": "given"}, {"x": "x"}), Loop("positions", "done", body, {"total": "totals"})))
    inputs = {"given": Input(ROWS), "slot": Input(Spec(I64, (1,)))}
    return Program("simple", {"step": step, "start": start}, inputs, state, control, ("totals",), {"w": torch.ones(2)})


Break = Callable[[Program], Program]


def swap_node(graph: str, find: Any, target: Any, *args: Any) -> Break:
    """Changes a node of a graph in place, its arguments too if some are given."""

    def change(program: Program) -> Program:
        node = next(n for n in program.graphs[graph].fx.nodes if n.target is find)
        node.target, node.args = target, args or node.args
        return program

    return change


def with_graph(graph: str, **changes: Any) -> Break:
    return lambda p: p.replace(graphs={**p.graphs, graph: dataclasses.replace(p.graphs[graph], **changes)})


def with_step(change: Callable[[Call], Call]) -> Break:
    """Changes the call in the loop."""

    def result(program: Program) -> Program:
        first, loop = program.control.body
        return program.replace(control=Seq((first, dataclasses.replace(loop, body=change(loop.body)))))

    return result


def with_loop(**changes: Any) -> Break:
    return lambda p: p.replace(control=Seq((p.control.body[0], dataclasses.replace(p.control.body[1], **changes))))


def with_state(name: str, **changes: Any) -> Break:
    return lambda p: p.replace(state={**p.state, name: dataclasses.replace(p.state[name], **changes)})


def reads(**values: str) -> Break:
    return with_step(lambda c: Call(c.graph, c.reads | values, c.writes))


def writes(**values: str) -> Break:
    return with_step(lambda c: Call(c.graph, c.reads, c.writes | values))


def one_branch(program: Program) -> Program:
    """Writes x on one side of an If only."""
    first, loop = program.control.body
    return program.replace(control=Seq((If("done", first, Seq(())), loop)))


def sometimes(program: Program) -> Program:
    """Decides x in some rounds only: `start` writes it again where nothing is done."""
    first, loop = program.control.body
    step = dataclasses.replace(loop.body, writes=loop.body.writes | {"total": "sums"})
    body = Seq((step, If("done", dataclasses.replace(first, writes={"x": "total"}), Seq(()))))
    return program.replace(control=Seq((first, dataclasses.replace(loop, body=body, emits={}, decides="total"))),
                           outputs=("x",))  # fmt: skip


def carried(program: Program) -> Program:
    """x survives the round without being state."""
    return program.replace(state={n: s for n, s in program.state.items() if n != "x"})


def after_loop(program: Program) -> Program:
    """Reads a value that only a round writes: there may be none."""
    first, loop = program.control.body
    body = Seq((loop.body, Call("start", {"given": "x"}, {"x": "late"})))
    after = Call("start", {"given": "late"}, {"x": "y"})
    return program.replace(control=Seq((first, dataclasses.replace(loop, body=body), after)))


def hide_alias(program: Program) -> Program:
    return with_graph("step", aliases={})(program)


def wrong_value(program: Program) -> Program:
    """A node's recorded shape is not the true one."""
    nodes = {n.target: n for n in program.graphs["step"].fx.nodes}
    nodes[aten.mul.Tensor].meta["val"] = nodes[aten.sum.dim_IntList].meta["val"]
    return program


def add_output(program: Program) -> Program:
    graph = program.graphs["start"].fx
    output = next(n for n in graph.nodes if n.op == "output")
    output.args = ((output.args[0][0], output.args[0][0]),)
    return program


def late_use(program: Program) -> Program:
    """A node before what it reads."""
    nodes = {n.target: n for n in program.graphs["step"].fx.nodes}
    nodes[aten.sum.dim_IntList].append(nodes[aten.slice.Tensor])
    nodes[aten.sum.dim_IntList].append(nodes[aten.mul.Tensor])
    nodes[aten.index_copy.default].args = (*nodes[aten.index_copy.default].args[:3], nodes[aten.slice.Tensor])
    return program


def reserved_name(program: Program) -> Program:
    """torch names the placeholder `max_1`."""
    graph = fx.Graph()
    graph.output((graph.placeholder("max"),))
    broken = Graph("start", graph, {"max": ROWS}, {"x": ROWS})
    return program.replace(graphs={**program.graphs, "start": broken})


def swapped_inputs(program: Program) -> Program:
    inputs = program.graphs["step"].inputs
    return with_graph("step", inputs=dict(reversed(inputs.items())))(program)


BREAKS: dict[str, tuple[str, Break]] = {
    "another name": ("graph-name", with_graph("step", name="other")),
    "use before definition": ("graph-lint", late_use),
    "not an op": ("op-kind", swap_node("start", aten.neg.default, print)),
    "dangerous operator": ("op-kind", swap_node("start", aten.neg.default, operator.call)),
    "torch function": ("op-kind", swap_node("start", aten.neg.default, torch.neg)),
    "reads a file": (
        "op-kind",
        swap_node("start", aten.neg.default, aten.from_file.default, "/etc/hostname", False, 1),
    ),
    "mutates": ("op-mutates", swap_node("start", aten.neg.default, aten.neg_.default)),
    "out variant": ("op-mutates", swap_node("start", aten.neg.default, aten.neg.out)),
    "random": ("op-random", swap_node("start", aten.neg.default, aten.bernoulli.default)),
    "a scan without a body": ("op-body", swap_node("start", aten.neg.default, ops.load("scan").overload)),
    "no weight": ("graph-weights", lambda p: p.replace(weights={})),
    "other weight": ("graph-types", lambda p: p.replace(weights={"w": torch.ones(3)})),
    "weight of another type": ("graph-types", lambda p: p.replace(weights={"w": torch.ones(2, dtype=torch.float64)})),
    "swapped inputs": ("graph-inputs", swapped_inputs),
    "reserved name": ("graph-inputs", reserved_name),
    "more outputs": ("graph-outputs", add_output),
    "wrong output type": ("graph-outputs", with_graph("start", outputs={"x": Spec(F32, ("B", 3))})),
    "wrong output dtype": ("graph-outputs", with_graph("start", outputs={"x": Spec(torch.float16, ("B", 2))})),
    "no shape rule": ("graph-types", swap_node("start", aten.neg.default, aten.bmm.default)),
    "wrong value": ("graph-types", wrong_value),
    "another shape": ("graph-types", swap_node("step", aten.sum.dim_IntList, aten.softmax.int)),
    "forgotten alias": ("graph-aliases", hide_alias),
    "false alias": ("graph-aliases", with_graph("start", aliases={"x": "given"})),
    "unknown role": ("graph-role", with_graph("step", role="other")),
    "prologue in a round": ("graph-role", with_graph("step", role="prologue")),
    "epilogue in a round": ("graph-role", with_graph("step", role="epilogue")),
    "rule outside": ("graph-role", with_graph("start", role="rule")),
    "commit outside": ("graph-role", with_graph("start", role="commit")),
    "no such graph": ("call-graph", with_step(lambda c: Call("other", c.reads, c.writes))),
    "unbound input": ("call-binds", with_step(lambda c: Call(c.graph, {"x": "x"}, c.writes))),
    "unknown input": ("call-binds", reads(more="x")),
    "unbound output": ("call-binds", with_step(lambda c: Call(c.graph, c.reads, {"done": "done", "total": "total"}))),
    "written twice": ("call-binds", writes(x="total")),
    "wrong dtype": ("call-types", reads(x="slot")),
    "wrong rank": ("call-types", reads(slot="done")),
    "wrong size": ("call-types", reads(slot="long")),
    "wrong size of state": ("call-types", with_state("store", spec=Spec(F32, ("S", 3)))),
    "wrong symbol": ("state-type", writes(store="x", x="store")),
    "unknown value": ("value-missing", reads(x="nothing")),
    "no initial value": ("value-missing", with_state("store", init=None)),
    "one branch": ("value-missing", one_branch),
    "carried without state": ("value-missing", carried),
    "no rounds": ("value-missing", after_loop),
    "condition": ("condition-type", with_loop(until="x")),
    "until unknown": ("value-missing", with_loop(until="nothing")),
    "until never written": ("loop-until", with_step(lambda c: Call(c.graph, c.reads, c.writes | {"done": "over"}))),
    "emits nothing": ("loop-emits", with_loop(emits={"given": "totals"})),
    "decides sometimes": ("loop-roles", sometimes),
    "state dtype": ("state-type", with_state("x", spec=Spec(torch.float16, ("B", 2)))),
    "state rank": ("state-type", with_state("x", spec=Spec(F32, ("B", 2, 1)))),
    "state size": ("state-type", with_state("x", spec=Spec(F32, ("B", 3)))),
    "state symbol": ("state-type", with_state("x", spec=Spec(F32, ("2*B", 2)))),
    "state without size": ("state-init", with_state("store", spec=Spec(F32, ("Q", 2)))),
    "state axis": ("state-axis", with_state("store", axis=2)),
    "no output": ("program-outputs", lambda p: p.replace(outputs=("totals", "total"))),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken(name: str) -> None:
    rule, broken = BREAKS[name]
    program = simple()
    verify(program)
    program = program.replace(inputs={**program.inputs, "long": Input(Spec(I64, (2,)))})
    with pytest.raises(VerificationFailed) as found:
        verify(broken(program))
    assert f"(rule {rule})" in found.value.what, str(found.value)
    assert found.value.where and found.value.why


def test_rules_are_all_tested() -> None:
    import re
    from pathlib import Path

    root = Path(__file__).parents[2] / "aropt"
    source = "".join((root / "ir" / name).read_text() for name in ("verify.py", "verify_control.py"))
    rules = set(re.findall(r'(?:fail\(|return )"([a-z]+-[a-z]+)"', source)) | {"condition-type"}
    assert rules == {rule for rule, _ in BREAKS.values()}


def test_message_shows_the_node() -> None:
    with pytest.raises(VerificationFailed) as found:
        verify(BREAKS["mutates"][1](simple()))
    assert found.value.where == "graph 'start', node 'neg_default'"
    assert "writes to its arguments" in found.value.why and "\n> %0: f32[B, 2] = aten.neg_(%given)" in found.value.why


def test_programs_pass(tiny_stages: dict[str, Program], guided_stages: dict[str, Program]) -> None:
    for program in (*tiny_stages.values(), *guided_stages.values()):
        verify(program)


def test_passes_keep_roles(tiny_stages: dict[str, Program]) -> None:
    """A round runs one forward at each stage; what is fused has the most telling role of its parts."""
    for program in tiny_stages.values():
        for loop in loops(program.control):
            assert [program.graphs[c.graph].role for c in calls(loop.body)].count("forward") == 1
    last = list(tiny_stages.values())[-1]
    assert {g.role for g in last.graphs.values()} == {"forward", "prologue"}


def test_dropout_that_is_off_passes() -> None:
    def write(train: bool) -> Program:
        graph = graph_of(
            "start", lambda g, x: [call(g, aten.dropout.default, x["given"], 0.5, train)], {"given": ROWS}, ["x"]
        )
        return simple().replace(graphs={**simple().graphs, "start": graph})

    verify(write(False))
    with pytest.raises(VerificationFailed, match="op-random"):
        verify(write(True))


def test_again_is_free_and_change_is_seen() -> None:
    program = simple()
    verify(program)
    graph = program.graphs["start"]
    assert graph in VERIFIED
    before = {n: n.meta["val"] for n in graph.fx.nodes if n.op != "output"}
    verify(program)
    assert all(n.meta["val"] is v for n, v in before.items())
    with pytest.raises(VerificationFailed):
        verify(BREAKS["mutates"][1](program))
