"""Programs survive the way through JSON; whatever else is read is refused and never run."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from aropt.errors import UsageError
from aropt.ir.allowed import ATEN
from aropt.ir.encode_args import CONSTANTS, decode, encode
from aropt.ir.printer import diff, digest, text
from aropt.ir.program import Entry, Program
from aropt.ir.serialize import from_json, to_json
from aropt.ir.verify import op_problem
from tests.support.run import generate


def through_json(program: Program) -> Program:
    return from_json(json.loads(json.dumps(to_json(program), allow_nan=False)), program.weights)


def test_round_trip(tiny_stages: dict[str, Program]) -> None:
    for program in tiny_stages.values():
        again = through_json(program)
        assert digest(again) == digest(program), diff(program, again)
        assert text(again) == text(program)
        assert to_json(again) == to_json(program)
        prompts = [[1, 2], [3, 4]]
        assert generate(again, prompts, 6) == generate(program, prompts, 6)
        sampled = [generate(p, prompts, 6, temperature=1.0, seed=3) for p in (program, again)]
        assert sampled[0] == sampled[1]


def test_round_trip_of_other_rules(guided_stages: dict[str, Program]) -> None:
    last = list(guided_stages.values())[-1]
    assert digest(through_json(last)) == digest(last)


def test_all_fields_come_back(tiny_program: Program) -> None:
    ledger = (Entry("kv-cache", "rounding", {"rows": "last"}, {"kl": 1e-7, "worst": math.inf, "n": 3}),)
    meta = {**tiny_program.meta, "heldout": [0.5, None, True], "executor": object()}
    again = through_json(tiny_program.replace(ledger=ledger, meta=meta))
    assert again.ledger == ledger
    assert again.meta == {k: v for k, v in meta.items() if k != "executor"}
    for name in ("name", "inputs", "state", "control", "outputs"):
        assert getattr(again, name) == getattr(tiny_program, name)
    for name, graph in tiny_program.graphs.items():
        kept = [{k: v for k, v in n.meta.items() if k in ("where", "origin", "value") and v} for n in graph.fx.nodes]
        assert [{k: v for k, v in n.meta.items() if k != "val"} for n in again.graphs[name].fx.nodes] == kept
        assert (again.graphs[name].aliases, again.graphs[name].role) == (graph.aliases, graph.role)


def test_what_was_written_before_graphs_had_roles_is_read(tiny_program: Program) -> None:
    data = to_json(tiny_program)
    assert {g.pop("role") for g in data["graphs"].values()} == {"forward", "rule", "commit", "prologue", "bookkeeping"}
    again = from_json(data, tiny_program.weights)
    assert [g.name for g in again.of_role("forward")] == ["model"]
    assert generate(again, [[1, 2]], 4) == generate(tiny_program, [[1, 2]], 4)


def test_what_is_not_json_is_refused(tiny_program: Program) -> None:
    with pytest.raises(UsageError, match=r"program\.meta\.x"):
        to_json(tiny_program.replace(meta={**tiny_program.meta, "x": object()}))


# --- hostile input ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tiny_program: Program) -> dict[str, Any]:
    return json.loads(json.dumps(to_json(tiny_program)))


def node(data: dict[str, Any], graph: str, op: str = "call_function") -> dict[str, Any]:
    return next(n for n in data["graphs"][graph]["nodes"] if n["op"] == op)


def put(*path: Any) -> Callable[[dict[str, Any]], Any]:
    """Sets data[path[0]][path[1]]... = path[-1]."""

    def change(data: dict[str, Any]) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change


def node_with(graph: str, op: str = "call_function", **fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: node(data, graph, op).update(fields)


def rename_input(data: dict[str, Any], name: str) -> None:
    """Renames the input of the graph `last` everywhere, as an attacker would."""
    graph = data["graphs"]["last"]
    graph["inputs"] = {name: graph["inputs"].pop("logits")}
    node(data, "last", "placeholder")["name"] = name
    node(data, "last")["args"][0] = {"node": name}


def rename_weight(data: dict[str, Any], name: str) -> None:
    data["weights"][name] = data["weights"].pop("embed.weight")
    node(data, "model", "get_attr")["target"] = name


def deep(data: dict[str, Any]) -> None:
    value: Any = 1
    for _ in range(500):
        value = [value]
    data["meta"]["deep"] = value


def deep_control(data: dict[str, Any]) -> None:
    for _ in range(500):
        data["control"] = {"is": "seq", "body": [data["control"]]}


CODE = "x=__import__('os').system('touch pwned')"
HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no format": lambda d: d.pop("format"),
    "newer format": put("format", 99),
    "no graphs": lambda d: d.pop("graphs"),
    "graphs are a list": put("graphs", []),
    "no control": put("control", None),
    "unknown role": put("graphs", "last", "role", "exec"),
    "a role that is none": put("graphs", "last", "role", ["rule"]),
    "unknown control": put("control", {"is": "exec", "body": []}),
    "control with more fields": put("control", {"is": "seq", "body": [], "code": "1"}),
    "deep control": deep_control,
    "deep meta": deep,
    "call of nothing": put("control", {"is": "call", "graph": "nothing", "reads": {}, "writes": {}}),
    "value missing": put(
        "control", {"is": "call", "graph": "last", "reads": {"logits": "nothing"}, "writes": {"row": "row"}}
    ),
    "code as a value": put("outputs", [CODE]),
    "keyword as a value": put("outputs", ["lambda"]),
    "dtype": put("inputs", "prompt", "spec", "dtype", "Tensor"),
    "module attribute as a dtype": put("inputs", "prompt", "spec", "dtype", "ops"),
    "code as a size": put("inputs", "prompt", "spec", "dims", ["B", "__import__('os')"]),
    "negative size": put("inputs", "prompt", "spec", "dims", ["B", -1]),
    "float size": put("inputs", "prompt", "spec", "dims", ["B", 1.5]),
    "default": put("inputs", "seed", "default", "text"),
    "axis": put("state", "tokens", "axis", True),
    "no spec": lambda d: d["state"]["tokens"].pop("spec"),
    "ledger": put("ledger", [{"name": 1, "level": "x", "options": {}, "evidence": {}}]),
    "weight of another shape": put("weights", "embed.weight", "shape", [1]),
    "weight that is not there": put("weights", "other.weight", {"dtype": "float32", "shape": [1]}),
    "code as a weight": lambda d: rename_weight(d, f'a"); {CODE}; ("'),
    "path as a weight": lambda d: rename_weight(d, "../../x"),
    "undeclared weight": node_with("model", "get_attr", target="head.bias"),
    "code as a graph": lambda d: d["graphs"].update({CODE: d["graphs"]["last"]}),
    "code as an input": lambda d: rename_input(d, CODE),
    "keyword as an input": lambda d: rename_input(d, "class"),
    "self as an input": lambda d: rename_input(d, "self"),
    "builtin as an input": lambda d: rename_input(d, "torch"),
    "code as a node": node_with("last", name=CODE),
    "code as a keyword": node_with("last", kwargs={"dim=0); print(": 1}),
    "kind of node": lambda d: node(d, "last").update(op="call_module"),
    "method": lambda d: node(d, "last").update(op="call_method", target="save"),
    "os.system": node_with("last", target="os.system", args=["touch pwned"]),
    "builtins.eval": node_with("last", target="builtins.eval", args=["1"]),
    "operator.call": node_with("last", target="operator.call"),
    "operator.attrgetter": node_with("last", target="operator.attrgetter", args=["__class__"]),
    "operator, inherited": node_with("last", target="operator.__class__"),
    "torch.load": node_with("last", target="torch.load", args=["x"]),
    "another namespace": node_with("last", target="prim.device.default"),
    "dunder op": node_with("last", target="aten.__class__.__call__"),
    "packet attribute": node_with("last", target="aten.select.overloads"),
    "no such op": node_with("last", target="aten.selekt.int"),
    "reads a file": node_with("last", target="aten.from_file.default", args=["/etc/hostname", False, 1]),
    "mutation": node_with("last", target="aten.relu_.default", args=[{"node": "logits"}]),
    "random op": node_with("last", target="aten.rand_like.default", args=[{"node": "logits"}]),
    "wrong arguments": node_with("last", args=[{"node": "logits"}, "x"]),
    "too few arguments": node_with("last", args=[]),
    "no such row": node_with("last", args=[{"node": "logits"}, 7, 0]),
    "other shape": node_with("last", args=[{"node": "logits"}, 0, 0]),
    "unknown node": node_with("last", args=[{"node": "nothing"}, 1, -1]),
    "itself": node_with("last", args=[{"node": "select"}, 1, -1]),
    "unknown kind": node_with("last", args=[{"code": "1"}, 1, -1]),
    "two kinds": node_with("last", args=[{"node": "logits", "float": "1"}, 1, -1]),
    "float": node_with("last", args=[{"float": "1; 2"}, 1, -1]),
    "device": node_with("last", kwargs={"device": {"device": "privateuseone"}}),
    "constant": node_with("last", kwargs={"dtype": {"dtype": "__class__"}}),
    "args": node_with("last", args={"0": 1}),
    "node meta": node_with("last", meta={"where": ["x"]}),
    "two outputs": lambda d: d["graphs"]["last"]["nodes"].append(
        {"name": "output_1", "op": "output", "args": [], "meta": {}}
    ),
    "no output": lambda d: d["graphs"]["last"]["nodes"].pop(),
    "output of nothing": node_with("last", "output", args=[1]),
    "too many outputs": node_with("last", "output", args=[{"node": "select"}, {"node": "select"}]),
    "declared output": put("graphs", "last", "outputs", "row", "dims", ["B", 12]),
    "twice the same node": lambda d: d["graphs"]["last"]["nodes"].insert(1, node(d, "last")),
    "no placeholder": lambda d: d["graphs"]["greedy"]["nodes"].pop(0),
    "returns what was in memory": node_with("last", target="aten.empty_like.default", args=[{"node": "logits"}]),
    "any memory": node_with("last", target="aten.as_strided.default", args=[{"node": "logits"}, [2, 11], [1, 1], 9]),
    "a value of any size": node_with("last", target="aten.new_zeros.default", args=[{"node": "logits"}, [2**40]]),
    "an input of any size": put("inputs", "seed", "spec", "dims", [2**30, 2**30]),
    "a graph's input of any size": put("graphs", "last", "inputs", "logits", "dims", [2**30]),
    "state of any size": put("state", "tokens", "spec", "dims", ["B", "1000000000*S"]),
    "state of any rank": put("state", "tokens", "spec", "dims", [1] * 20),
    "state of no number": put("state", "tokens", "init", {"float": "nan"}),
    "a size that can't be read": put("state", "tokens", "spec", "dims", ["B**"]),
    "half a size": put("graphs", "last", "outputs", "row", "dims", ["B", "Max(1,T"]),
    "a size to a high power": put("inputs", "prompt", "spec", "dims", ["B", "T**99"]),
    "a default out of its range": put("inputs", "temperature", "default", -1.0),
    "no capacity": lambda d: d["meta"].pop("capacity"),
    "capacity": put("meta", "capacity", 2**40),
    "vocabulary": put("meta", "vocab", "x"),
    "prompts": put("meta", "prompts", [[99]]),
    "end ids": put("meta", "eos", [None]),
    "a loop of another kind": put("meta", "loop", "exec"),
    "nodes": put("graphs", "last", "nodes", {}),
    "a node": put("graphs", "last", "nodes", 0, "x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile(
    name: str, data: dict[str, Any], tiny_program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = copy.deepcopy(data)
    HOSTILE[name](broken)
    weights = dict(tiny_program.weights) | {
        n: tiny_program.weights["embed.weight"] for n in broken.get("weights", ()) if "x" in n
    }
    with pytest.raises(UsageError) as found:
        generate(from_json(broken, weights), [[1]], 1)
    assert found.value.where and found.value.why and len(str(found.value)) < 1000
    assert not list(tmp_path.iterdir())


def test_ops_are_named_one_by_one() -> None:
    """Each is a function of its arguments; none returns what was in memory or takes a tensor's bounds on trust."""
    for name in ATEN:
        packet = getattr(torch.ops.aten, name)
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        assert any(not schema.is_mutable and schema.returns for schema in schemas), name
        assert not name.endswith(("_backward", "_")) or name.startswith("__"), name
    never = {"empty", "empty_like", "empty_strided", "new_empty", "as_strided", "from_file", "rand", "randn", "resize"}
    assert not ATEN & (never | {"_embedding_bag", "_fft_c2r", "set", "_efficientzerotensor", "_grouped_mm"})
    assert op_problem(torch.ops.aten.empty_like.default, (), {}) and not op_problem(torch.ops.aten.add.Tensor, (), {})


@pytest.mark.parametrize("value", [None, 1, "x", [], {}])
def test_not_a_program(value: Any) -> None:
    with pytest.raises(UsageError):
        from_json(value, {})


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_field_replaced(data: dict[str, Any], tiny_program: Program, choice: st.DataObject) -> None:
    """A random part of a small program is replaced by junk: it loads or it is refused, nothing else."""
    small = {**data, "graphs": {"start": data["graphs"]["start"], "last": data["graphs"]["last"]}}
    small["control"] = {"is": "call", "graph": "start", "reads": {"prompt": "prompt", "limit": "limit"}, "writes": {}}
    small["control"]["writes"] = {o: o for o in data["graphs"]["start"]["outputs"]}
    small["outputs"] = ["tokens"]
    broken = copy.deepcopy(small)
    place: Any = broken
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = choice.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and place[key] and choice.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = choice.draw(JUNK)
        break
    try:
        from_json(broken, tiny_program.weights)
    except UsageError as error:
        assert error.where and error.why


JUNK = st.sampled_from(
    [None, True, -1, 2**70, 1.5, "", "B", "1B", "x y", "/", [], [[]], {}, {"node": "x"}, {"float": "nan"}]
)


# --- arguments -------------------------------------------------------------------------------------------------------

CONSTANT = st.sampled_from([v for known in CONSTANTS.values() for v in known.values()] + [torch.device("cpu")])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | CONSTANT
ARGUMENTS = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.lists(inner, max_size=4).map(tuple), max_leaves=12
)


def same(a: Any, b: Any) -> bool:
    """Equal in value and type, NaN and signed zeros included."""
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (repr(a) == repr(b) if isinstance(a, float) else a == b)


@given(ARGUMENTS)
def test_arguments(value: Any) -> None:
    assert same(decode(json.loads(json.dumps(encode(value), allow_nan=False)), {}, "here"), value)


def test_arguments_with_nodes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.cat.default, ([x, x], 1))
    assert same(decode(encode(list(y.args)), {"x": x}, "here"), [[x, x], 1])
