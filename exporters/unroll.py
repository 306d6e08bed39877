"""Several rounds of a loop over one graph as one ONNX graph, without ONNX's `Loop`, which copies what it carries.

The graph's nodes are repeated, each round reading what the one before wrote; weights are stored once. The first round
may be a prompt's. What only that needs goes from the others: sizes that rounds give each other are numbers, and what
nobody reads is left out. Outputs are those of the last round, and of the others (named `out.<output>@<round>`, counted
from 0) what the loop emits and the versions of a cache that may all be in one buffer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from aropt.errors import Unsupported
from aropt.ir.control import Call, Loop
from aropt.ir.program import Graph
from aropt.ir.torch_onnx import replaced_in


def unroll(model: Any, graph: Graph, control: Loop, aliases: Mapping[str, str], rounds: int) -> Any:
    """`model`, an onnx_ir.Model of `graph`, the only one that the loop calls, with so many rounds. It is changed.

    The first round is the graph's, of a prompt too. `aliases[output] = input`: the output is to be written into the
    input's buffer. Raises Unsupported where a round's results have other sizes than what the next one reads, and for
    nodes with graphs.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    call, whole = control.body, model.graph
    assert isinstance(call, Call)
    results = dict(zip(graph.outputs, list(whole.outputs), strict=True))
    inputs = dict(zip(graph.inputs, list(whole.inputs), strict=True))
    body = list(whole)
    whole.outputs.clear()
    whole.remove(body)
    known: dict[Any, Any] = {}
    versions: list[dict[str, Any]] = []
    for number in range(rounds):
        for node in body:
            whole.append(repeated(node, known, number))
        versions.append({o: known.get(v, v) for o, v in results.items()})
        writes = {value: versions[-1][o] for o, value in call.writes.items()}
        known = {inputs[name]: writes[value] for name, value in call.reads.items() if value in writes}
        if number == 0:
            settle(body, between(graph, call))
    for node in body:  # what is left of the one round reads nothing any more
        node.resize_inputs(0)
    for output in graph.outputs:
        chain = [version[output] for version in versions]
        shared = output in aliases and in_order([inputs[aliases[output]], *chain])
        emitted = call.writes.get(output) in control.emits
        whole.outputs.extend(chain if shared or emitted else chain[-1:])
        chain[-1].name = "out." + output
    drop_slices(whole)
    join_counts(whole)
    RemoveUnusedNodesPass()(model)
    return model


def between(graph: Graph, call: Call) -> dict[str, int]:
    """Sizes that a round's inputs have after the first, by symbol. Raises Unsupported where they go on changing."""
    sizes: dict[str, int] = {}
    written = {value: graph.outputs[o] for o, value in call.writes.items()}
    for name, value in call.reads.items():
        given = graph.inputs[name].dims
        for before, after in zip(given, written[value].dims if value in written else given, strict=True):
            if before == after:
                continue
            if not (isinstance(before, str) and before.isidentifier() and isinstance(after, int)):
                raise Unsupported(
                    what=f"the sizes of '{value}' change from round to round",
                    where=f"graph {graph.name}",
                    why=f"a round reads {before} and writes {after}",
                    hint="rounds run one by one",
                )
            sizes[before] = after
    return sizes


def settle(body: list[Any], sizes: Mapping[str, int]) -> None:
    """Puts numbers for symbols into all shapes."""
    for value in (v for node in body for v in node.outputs):
        if value.shape is not None:
            value.shape = replaced_in(value.shape, sizes)


def repeated(node: Any, known: dict[Any, Any], number: int) -> Any:
    """The node for a round, reading values by `known`, which learns its results."""
    import onnx_ir as ir

    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise Unsupported(what="a node holds a graph", where=f"node {node.name}", hint="rounds run one by one")
    outputs = [ir.Value(name=f"{v.name}@{number}" if v.name else "", shape=v.shape, type=v.type) for v in node.outputs]
    known |= dict(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        [known.get(v, v) for v in node.inputs],
        list(node.attributes.values()),
        outputs=outputs,
        name=f"{node.name}@{number}",
    )


def in_order(versions: list[Any]) -> bool:
    """Whether each version of a cache is written after all that read the one before, in any order of execution."""
    for before, after in pairwise(versions):
        writer = after.producer()
        earlier = set(ancestors(writer))
        if any(node is not writer and node not in earlier for node, _ in before.uses()):
            return False
    return True


def ancestors(node: Any) -> Iterator[Any]:
    """Nodes that a node needs to have run. What is needed for a size alone is not: sizes may be known before."""
    seen, todo = set(), [node]
    while todo:
        for value in todo.pop().inputs:
            made = value.producer() if value is not None else None
            if made is not None and made not in seen and made.op_type not in ("Shape", "Size"):
                seen.add(made)
                todo.append(made)
                yield made


def drop_slices(whole: Any) -> None:
    """Removes slices of all that there is: of the last row, where there is one."""
    import onnx_ir as ir

    for node in list(whole):
        if node.op_type != "Slice" or node.outputs[0].is_graph_output():
            continue
        result, source = node.outputs[0], node.inputs[0]
        tensors = [ir.convenience.get_const_tensor(v) for v in node.inputs[1:] if v is not None]
        bounds = [tensor.numpy().tolist() for tensor in tensors if tensor is not None]
        if source is None or source.shape is None or not 3 <= len(bounds) == len(node.inputs) - 1:
            continue
        steps = bounds[3] if len(bounds) > 3 else [1] * len(bounds[0])
        parts = [(source.shape[a], slice(s, e, p)) for s, e, a, p in zip(*bounds[:3], steps, strict=True)]
        if all(isinstance(size, int) and range(size)[part] == range(size) for size, part in parts):
            ir.convenience.replace_all_uses_with(result, source)


def join_counts(whole: Any) -> None:
    """x + 1 + 1 becomes x + 2 for whole numbers: counters that are read after the last round cost one addition."""
    import onnx_ir as ir

    for node in list(whole):
        first = node.inputs[0].producer() if node.op_type == "Add" else None
        if first is None or first.op_type != "Add":
            continue
        one, two = (ir.convenience.get_const_tensor(n.inputs[1]) for n in (first, node))
        if (
            one is None
            or two is None
            or one.dtype != two.dtype
            or not one.dtype.is_integer()
            or one.size * two.size > 1
        ):
            continue
        total = ir.tensor(one.numpy() + two.numpy(), name=f"{node.name}.count")
        value = ir.Value(name=total.name, type=ir.TensorType(total.dtype), shape=total.shape, const_value=total)
        whole.initializers[value.name] = value
        node.replace_input_with(0, first.inputs[0])
        node.replace_input_with(1, value)
