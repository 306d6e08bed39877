"""The verifier: whether a program is well-formed, checked after each pass.

Graphs have pure, known ops, and shapes that fake propagation reproduces; `verify_control` has the control's rules.
Each rule has an id, which the error names.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.allowed import ATEN
from aropt.ir.edit import freeze
from aropt.ir.naming import WEIGHT
from aropt.ir.opdef import OpDef
from aropt.ir.printer import node_lines, symbol_names, value_text
from aropt.ir.program import Graph, Program, output_node
from aropt.ir.torch_compat import aliases, propagate, spec_of
from aropt.ir.verify_control import check_control, fail

ARITHMETIC = (
    "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg",
    "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_",
)  # fmt: skip
OPERATORS = {name: getattr(operator, name) for name in ARITHMETIC}
VERIFIED: WeakKeyDictionary[Graph, int] = WeakKeyDictionary()  # graph -> stamp of what was verified


def verify(program: Program) -> None:
    """Raises VerificationFailed, which names the graph, the node and the rule, if the program is malformed."""
    for name, graph in program.graphs.items():
        if name != graph.name:
            fail("graph-name", f"graph '{name}'", f"it calls itself '{graph.name}'")
        mark = stamp(graph, program.weights)
        if VERIFIED.get(graph) != mark:
            GraphCheck(graph, program.weights).run()
            VERIFIED[graph] = mark
    check_control(program)


def stamp(graph: Graph, weights: Mapping[str, Tensor]) -> int:
    """A hash of all that a graph's check depends on."""
    ops = ((n, n.name, n.op, str(n.target), freeze(n.args), freeze(n.kwargs)) for n in graph.fx.nodes)
    nodes = (*ops, *(id(n.meta.get("val")) for n in graph.fx.nodes))
    types = tuple((n, weights[n].dtype, weights[n].shape) for n in graph.weights() if n in weights)
    declared = [tuple(part.items()) for part in (graph.inputs, graph.outputs, graph.aliases)]
    return hash((nodes, types, *declared))


def op_problem(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(rule, why) if a call of this target has no place in a graph: unknown, impure or random."""
    if not isinstance(target, torch._ops.OpOverload):
        if any(target is function for function in OPERATORS.values()):
            return None
        return "op-kind", f"{getattr(target, '__name__', type(target).__name__)} is no aten, aropt or arithmetic op"
    schema = target._schema
    if target.namespace not in ("aten", "aropt") or not schema.returns:
        return "op-kind", f"{target} is not allowed in graphs"
    if schema.is_mutable:
        return "op-mutates", f"{target} writes to its arguments; state is a value"
    if torch.Tag.nondeterministic_seeded in target.tags:
        given = {a.name: a.default_value for a in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | dict(kwargs)
        if given.get("dropout_p") != 0 and given.get("train") is not False:
            return "op-random", f"{target} draws from a hidden generator; noise is aropt.noise"
    definition = ops.defined(target)
    if definition is not None and definition.calls is not None:
        return inner_problem(definition, args, kwargs)
    if target.namespace == "aten" and schema.name.removeprefix("aten::") not in ATEN:
        return "op-kind", f"{target} is none of the ops that programs may hold (aropt.ir.allowed)"
    return None


def inner_problem(definition: OpDef, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(rule, why) if an op's text can't be read, or makes a call that has no place in a graph."""
    names = [argument.name for argument in definition.overload._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    try:
        assert definition.calls is not None
        found = list(definition.calls(**given))
    except (TypeError, ValueError) as error:
        return "op-body", f"aropt::{definition.name}: {error}"
    problems = (op_problem(*call) for call in found)
    return next((("op-body", f"aropt::{definition.name}: {p[1]}") for p in problems if p), None)


class GraphCheck:
    """The rules for one graph."""

    def __init__(self, graph: Graph, weights: Mapping[str, Tensor]) -> None:
        self.graph, self.weights = graph, weights

    def fail(self, rule: str, why: str, node: fx.Node | None = None) -> NoReturn:
        where = f"graph '{self.graph.name}'" + ("" if node is None else f", node '{node.name}'")
        fail(rule, where, why if node is None else f"{why}\n{self.excerpt(node)}")

    def excerpt(self, node: fx.Node) -> str:
        """The node's line with its neighbours."""
        try:
            lines = node_lines(self.graph, self.weights)
        except Exception:  # the graph is too broken to be printed
            return ""
        at = list(lines).index(node) if node in lines else -1
        around = list(lines.items())[max(at - 1, 0) : at + 2] if at >= 0 else []
        return "\n".join(("> " if n is node else "  ") + line for n, line in around)

    def run(self) -> None:
        try:
            self.graph.fx.lint()
            results = output_node(self.graph.fx).args[0]
        except Exception as error:  # of torch's own lint; it is what is reported
            self.fail("graph-lint", f"{type(error).__name__}: {error}".splitlines()[0])
        for node in self.graph.fx.nodes:
            self.check_node(node)
        placeholders = [str(n.target) for n in self.graph.fx.nodes if n.op == "placeholder"]
        if placeholders != list(self.graph.inputs):
            self.fail("graph-inputs", f"placeholders {placeholders}, declared {list(self.graph.inputs)}")
        if not isinstance(results, tuple) or not all(isinstance(r, fx.Node) for r in results):
            self.fail("graph-outputs", "it does not return a tuple of nodes")
        if len(results) != len(self.graph.outputs):
            self.fail("graph-outputs", f"it returns {len(results)} values, declared {list(self.graph.outputs)}")
        self.check_types(list(results))  # type: ignore[arg-type]
        true = aliases(self.graph.fx, self.graph.outputs)
        if true != self.graph.aliases:
            self.fail("graph-aliases", f"declared {self.graph.aliases}, true are {true}")

    def check_node(self, node: fx.Node) -> None:
        if node.op == "call_function":
            problem = op_problem(node.target, node.args, node.kwargs)
            if problem:
                self.fail(problem[0], problem[1], node)
        elif node.op == "get_attr":
            if str(node.target) not in self.weights or not WEIGHT.fullmatch(str(node.target)):
                self.fail("graph-weights", f"there is no weight '{node.target}'", node)
        elif node.op == "placeholder":
            if node.name != node.target:  # Python's own names are taken
                self.fail("graph-inputs", f"the input '{node.target}' is called '{node.name}' within the graph", node)
        elif node.op != "output":
            self.fail("op-kind", f"a {node.op} node", node)

    def check_types(self, results: list[fx.Node]) -> None:
        """Propagates again; the graph's own fake values are left as they were."""
        nodes = [n for n in self.graph.fx.nodes if n.op != "output"]
        old_names, old = symbol_names(self.graph), {n: n.meta.get("val") for n in nodes}
        try:
            names = propagate(self.graph.fx, self.graph.inputs, self.weights)
            new = {n: n.meta["val"] for n in nodes}
        except Exception as error:  # an op's shape rule raises what it likes
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            self.fail("graph-types", why, getattr(error, "aropt_node", None))
        finally:
            for node in nodes:
                node.meta["val"] = old[node]
        for node in nodes:
            known, true = value_text(old[node], old_names), value_text(new[node], names)
            if known != true:
                self.fail("graph-types", f"its value is {true}, recorded as {known}", node)
        for (name, spec), node in zip(self.graph.outputs.items(), results):
            true_spec = spec_of(new[node], names) if isinstance(new[node], Tensor) else None
            if spec != true_spec:
                self.fail("graph-outputs", f"'{name}' is {true_spec}, declared {spec}", node)
