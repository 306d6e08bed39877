"""Programs as JSON, without pickle: `to_json` writes all but the weights' bytes, `from_json` trusts nothing.

Fake values are not stored: reading propagates shapes again, and refuses what the verifier would refuse.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, fx

from aropt.errors import AroptError
from aropt.ir import limits, ops
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, loops
from aropt.ir.dims import Dim, parse
from aropt.ir.encode_args import (
    DEPTH,
    constant_name,
    decode,
    encode,
    field,
    find_target,
    identifier,
    refuse,
    typed,
    written,
)
from aropt.ir.naming import WEIGHT
from aropt.ir.program import ROLES, Entry, Graph, Input, Program, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.ir.verify import op_problem
from aropt.ir.verify_control import check_control

FORMAT = 1
NODE_META = ("where", "origin", "value")
CONTROL = {cls.__name__.lower(): cls for cls in (Call, Seq, If, Loop)}
Nodes = dict[str, fx.Node]  # those read so far, by name
DIM = re.compile(r"[\w+\-*/(), ]{1,200}", re.ASCII)


# --- writing ---------------------------------------------------------------------------------------------------------


def to_json(program: Program) -> dict[str, Any]:
    """All of the program but the bytes of its weights, its executor and its report, as JSON values.

    Raises UsageError where something can't be written.
    """
    weights = {n: {"dtype": w.dtype, "shape": list(w.shape)} for n, w in program.weights.items()}
    parts = {
        "format": FORMAT, "name": program.name, "inputs": program.inputs, "state": program.state,
        "outputs": program.outputs, "control": program.control, "ledger": program.ledger, "weights": weights,
        "meta": {k: v for k, v in program.meta.items() if k != "executor"},
    }  # fmt: skip
    data: dict[str, Any] = dump(parts, "program")
    return data | {"graphs": {n: graph_json(g) for n, g in program.graphs.items()}}


def dump(value: Any, where: str) -> Any:
    """Dataclasses, dtypes and JSON-able data as JSON; tuples become lists."""
    if dataclasses.is_dataclass(value):
        tag = next((k for k, cls in CONTROL.items() if isinstance(value, cls)), None)
        fields = {f.name: dump(getattr(value, f.name), f"{where}.{f.name}") for f in dataclasses.fields(value)}
        return {"is": tag, **fields} if tag else fields
    if isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {k: dump(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [dump(v, where) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return constant_name(value)
    refuse(where, f"a {type(value).__name__} is not JSON")


def graph_json(graph: Graph) -> dict[str, Any]:
    where = f"graph '{graph.name}'"
    nodes = [node_json(n, f"{where}, node '{n.name}'") for n in graph.fx.nodes]
    typed_as = {"inputs": dump(graph.inputs, where), "outputs": dump(graph.outputs, where)}
    return {"role": graph.role, **typed_as, "nodes": nodes}


def node_json(node: fx.Node, where: str) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op}
    if node.op == "get_attr":
        data["target"] = str(node.target)
    elif node.op == "call_function":
        data["target"] = written(node.target, where)
        data["args"] = [encode(a, where) for a in node.args]
        data["kwargs"] = {k: encode(v, where) for k, v in node.kwargs.items()}
    elif node.op == "output":
        data["args"] = encode(list(node.args[0]), where)  # type: ignore[arg-type]
    return data | {"meta": {k: str(node.meta[k]) for k in NODE_META if node.meta.get(k)}}


# --- reading ---------------------------------------------------------------------------------------------------------


def from_json(data: dict[str, Any], weights: dict[str, Tensor]) -> Program:
    """The program that `to_json` wrote, with these weights. Raises UsageError for anything else."""
    ops.load_all()
    version = typed(data, dict, "program").get("format")
    if version != FORMAT:
        refuse("program.format", f"it is {version!r}, this version of aropt reads {FORMAT}")
    kinds = {"name": str, "inputs": dict[str, Input], "state": dict[str, StateSpec], "outputs": tuple[str, ...],
             "control": Control, "meta": dict[str, Any], "ledger": tuple[Entry, ...]}  # fmt: skip
    parts = {k: load(kind, field(data, k, object, "program"), k) for k, kind in kinds.items()}
    kept = read_weights(field(data, "weights", dict, "program"), weights)
    limits.check_meta(parts["meta"])
    most = limits.most(kept, parts["meta"])
    limits.check_values(parts["inputs"], parts["state"], int(parts["meta"]["capacity"]), most)
    graphs = field(data, "graphs", dict, "program")
    program = Program(graphs={n: read_graph(n, g, kept, most) for n, g in graphs.items()}, weights=kept, **parts)
    values = {*program.inputs, *program.state, *program.outputs}
    values |= {v for c in calls(program.control) for v in (*c.reads.values(), *c.writes.values())}
    for name in values | {v for loop in loops(program.control) for v in loop.emits.values()}:
        identifier(name, f"value '{name}'")  # passes make placeholders of them
    try:
        check_control(program)
    except AroptError as error:
        refuse(error.where, error.why)
    return program


def load(kind: Any, data: Any, where: str, depth: int = DEPTH) -> Any:
    """The data as a value of the annotated type. Raises UsageError."""
    if depth < 0:
        refuse(where, "it is nested too deep")
    origin, inner = get_origin(kind), get_args(kind)
    if kind == Control:
        tag = field(data, "is", str, where)
        cls = CONTROL.get(tag) or refuse(where, f"{tag!r} is no control")
        return load(cls, {k: v for k, v in data.items() if k != "is"}, f"{where}.{tag}", depth - 1)
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        optional = {f.name for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}  # or newer
        if not set(hints) - optional <= set(typed(data, dict, where)) <= set(hints):
            refuse(where, f"its fields are {sorted(data)}, not {sorted(hints)}")
        values = {k: load(hint, data[k], f"{where}.{k}", depth - 1) for k, hint in hints.items() if k in data}
        return kind(**values)  # type: ignore[operator]
    if origin is dict:
        found = typed(data, dict, where)
        return {typed(k, str, where): load(inner[1], v, f"{where}.{k}", depth - 1) for k, v in found.items()}
    if origin is tuple:
        return tuple(load(inner[0], v, f"{where}[{i}]", depth - 1) for i, v in enumerate(typed(data, list, where)))
    if kind is Any and isinstance(data, list):
        return [load(Any, v, where, depth - 1) for v in data]
    if kind is Any and isinstance(data, dict) and data.get("float") not in ("inf", "-inf", "nan"):
        return load(dict[str, Any], data, where, depth)
    if kind is torch.dtype:
        return decode({"dtype": data}, {}, where)
    return scalar(kind, decode(data, {}, where) if isinstance(data, dict) else data, where)


def scalar(kind: Any, value: Any, where: str) -> Any:
    """None, a bool, a number or a string, if the annotation takes it; sizes must look like sizes."""
    allowed = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if kind is Any:
        allowed = (type(None), bool, int, float, str)
    if type(value) not in allowed and not (type(value) is int and float in allowed):
        refuse(where, f"a {type(value).__name__} can't be here")
    if kind == Dim and not is_size(value):
        refuse(where, f"{value!r} is no size")
    return value


def is_size(value: Any) -> bool:
    """Whether a dim is a number or the text of an expression, both of a size that a program has."""
    if isinstance(value, int):
        return 0 <= value < 2**31
    try:
        return bool(DIM.fullmatch(value) and parse(value).symbols())
    except ValueError:
        return False


def read_weights(declared: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The declared weights, checked against the given ones."""
    for name, data in declared.items():
        where = f"weight '{name}'"
        if not WEIGHT.fullmatch(name) or name not in weights:
            refuse(where, "it is not among the weights")
        true = {"dtype": constant_name(weights[name].dtype), "shape": list(weights[name].shape)}
        if data != true:
            refuse(where, f"it is {true}, declared {data}")
    return {name: weights[name] for name in declared}


def read_graph(name: str, data: Any, weights: Mapping[str, Tensor], most: int) -> Graph:
    """A graph with its fake values, which must be what it declares."""
    where = f"graph '{identifier(name, 'graphs')}'"
    inputs = load(dict[str, Spec], field(data, "inputs", dict, where), f"{where}.inputs")
    outputs = load(dict[str, Spec], field(data, "outputs", dict, where), f"{where}.outputs")
    for value, spec in {**inputs, **outputs}.items():
        limits.check_spec(f"{where}, '{value}'", spec, most)
    role = data.get("role")  # none in what was written before graphs had one
    if role not in (None, *ROLES):
        refuse(f"{where}.role", f"{role!r} is none of {', '.join(ROLES)}")
    graph = fx.Graph()
    nodes: Nodes = {}
    found = field(data, "nodes", list, where)
    for item in found:
        node = identifier(field(item, "name", str, where), where)
        if node in nodes:
            refuse(where, f"a second node '{node}'")
        nodes[node] = read_node(graph, item, nodes, weights, f"{where}, node '{node}'")
    if [n.op for n in nodes.values()].count("output") != 1 or found[-1]["op"] != "output":
        refuse(where, "it does not end with its output")
    if [n.name for n in nodes.values() if n.op == "placeholder"] != list(inputs):
        refuse(where, "its inputs are not its placeholders")
    try:
        built = build(name, graph, inputs, list(outputs), weights, role)
    except Exception as error:  # whatever an op's shape rule raises
        refuse(f"{where}, node '{getattr(error, 'aropt_node', '?')}'", f"{type(error).__name__}: {error}")
    limits.check_nodes(where, built, most)
    if built.outputs != outputs:
        refuse(where, "its outputs are not of the declared types")
    return built


def read_node(graph: fx.Graph, data: Any, nodes: Nodes, weights: Mapping[str, Tensor], where: str) -> fx.Node:
    """Adds the node that `node_json` wrote."""
    op, name = field(data, "op", str, where), data["name"]
    args: Any = ()
    kwargs: dict[str, Any] = {}
    target: Any = name
    if op == "call_function":
        args = tuple(decode(field(data, "args", list, where), nodes, where))
        found = field(data, "kwargs", dict, where)
        kwargs = {identifier(k, where): decode(v, nodes, where) for k, v in found.items()}
        target = find_target(field(data, "target", str, where), where)
        problem = op_problem(target, args, kwargs)
        if problem:
            refuse(where, problem[1])
    elif op == "get_attr":
        target = field(data, "target", str, where)
        if target not in weights:
            refuse(where, f"there is no weight {target!r}")
    elif op == "output":
        args = (tuple(decode(field(data, "args", list, where), nodes, where)),)
        if not all(isinstance(a, fx.Node) for a in args[0]):
            refuse(where, "it returns what is no node")
    elif op != "placeholder":
        refuse(where, f"{op!r} is no kind of node")
    node = graph.create_node(op, target, args, kwargs, name=name)
    if node.name != name:
        refuse(where, "the name is reserved")
    node.meta = {k: typed(v, str, where) for k, v in field(data, "meta", dict, where).items() if k in NODE_META}
    return node
