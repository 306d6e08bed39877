"""The ONNX files of an artifact, looked at before ONNX Runtime opens them: they may come from anyone.

A model has the graph's inputs and outputs and operators that aropt's exporters write; weights lie in it or in the file
beside it, within that file's size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from aropt.errors import UsageError
from aropt.ir.program import Program, Spec

RUNTIME = {  # ONNX Runtime's own operators that exporters write; of ONNX's all are taken: none reads files or runs code
    "": ("SimplifiedLayerNormalization",),
    "com.microsoft": (
        "CausalConvWithState", "GroupQueryAttention", "LinearAttention", "MatMulNBits", "MultiHeadAttention",
        "RotaryEmbedding", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
    ),
}  # fmt: skip
LARGEST = 2**31  # bytes of a protobuf
DRAWN = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


def file(folder: Path, graph: str) -> Path:
    return folder / "models" / graph / "onnxruntime" / "model.onnx"


def check(program: Program, folder: Path) -> None:
    """Raises UsageError where a model below models/ is none that aropt would have written for the program."""
    for path in sorted(folder.glob("models/*/onnxruntime/*.onnx")):
        name = path.parent.parent.name
        graph = program.graphs.get(name)
        if path.name == "model.onnx" and name == "whole":
            inputs, outputs = whole_types(program)
            check_file(path, inputs, outputs)
        elif graph is not None:
            check_file(path, graph.inputs, {"out." + o: s for o, s in graph.outputs.items()})
        else:
            refuse(path, f"the program has no graph '{name}'")


def whole_types(program: Program) -> tuple[dict[str, Spec], dict[str, Spec]]:
    """Inputs and outputs of the whole loop by name; those that are read back have a type, others are left out."""
    number = Spec(torch.int64)
    inputs = {n: i.spec for n, i in program.inputs.items()} | {"chunk": number, "resume": Spec(torch.bool)}
    inputs |= {f"state.{n}": s.spec for n, s in program.state.items()}
    outputs = {f"next.{n}": s.spec for n, s in program.state.items()} | {"status": number, "counts": number}
    return inputs, outputs | {n: number for n in program.outputs}


def check_file(path: Path, inputs: Mapping[str, Spec], outputs: Mapping[str, Spec]) -> None:
    """Raises UsageError unless the file is a model with some of these inputs and outputs."""
    import onnx

    if path.stat().st_size >= LARGEST:
        refuse(path, "it is larger than a model can be")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except Exception as error:  # protobuf has its own kinds
        refuse(path, f"it is no ONNX model: {error}")
    if model.functions or model.training_info or not model.HasField("graph"):
        refuse(path, "it has functions, training, or no graph")
    given = {value.name for value in model.graph.initializer}
    for kind, values, known in (("input", model.graph.input, inputs), ("output", model.graph.output, outputs)):
        names = [value.name for value in values]
        if len(set(names)) < len(names):
            refuse(path, f"it has an {kind} twice")
        for value in values:
            spec = known.get(value.name) or (known.get(value.name.partition("@")[0]) if kind == "output" else None)
            if spec is None and value.name in given:
                continue
            if spec is None or value.type.tensor_type.elem_type != element(spec.dtype):
                refuse(path, f"the {kind} '{value.name[:60]}' is not the program's")
    missing = [n for n in outputs if n.startswith("out.") and n not in {v.name for v in model.graph.output}]
    if missing:
        refuse(path, f"the output '{missing[0]}' is missing")
    for part in graphs(model.graph):
        check_nodes(path, part)


def graphs(graph: Any) -> Iterator[Any]:
    """The graph and those in its nodes' attributes."""
    waiting = [graph]
    while waiting:
        one = waiting.pop()
        yield one
        for attribute in (a for node in one.node for a in node.attribute):
            waiting.extend([*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])])


def check_nodes(path: Path, graph: Any) -> None:
    """Raises UsageError for an operator that exporters don't write, and for weights that lie elsewhere."""
    import onnx

    for node in graph.node:
        own = node.op_type in RUNTIME.get(node.domain, ())
        standard = not node.domain and onnx.defs.has(node.op_type) and node.op_type not in DRAWN
        if not own and not standard:
            refuse(path, f"it has an operator {node.domain[:40]}:{node.op_type[:40]}")
    attributes = [a for node in graph.node for a in node.attribute]
    tensors = [*graph.initializer, *(t for a in attributes for t in [*a.tensors, *([a.t] if a.HasField("t") else [])])]
    if graph.sparse_initializer or any(a.sparse_tensors or a.HasField("sparse_tensor") for a in attributes):
        refuse(path, "it has sparse weights")
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            check_external(path, tensor)


def check_external(path: Path, tensor: Any) -> None:
    """Raises UsageError unless the tensor's bytes lie in the file beside the model."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    data = path.with_name(path.name + ".data")
    size = data.stat().st_size if data.is_file() else 0
    numbers = [said.get("offset", "0"), said.get("length", "0")]
    if said.get("location") != data.name or not all(n.isascii() and n.isdigit() and len(n) < 20 for n in numbers):
        refuse(path, f"the weight '{tensor.name[:60]}' lies in {said.get('location', '')[:60]!r}")
    if sum(map(int, numbers)) > size:
        refuse(path, f"the weight '{tensor.name[:60]}' lies beyond the end of {data.name}")


def element(dtype: torch.dtype) -> int:
    """ONNX's number of a type of elements."""
    import onnx

    kind: int = onnx.TensorProto.DataType.Value(
        {"float32": "FLOAT", "float64": "DOUBLE"}.get(name := str(dtype).removeprefix("torch."), name.upper())
    )
    return kind


def refuse(path: Path, why: str) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(
        what="an ONNX model of the artifact is not one that aropt wrote",
        where=str(path),
        why=why[:300],
        hint="get the artifact again, or make it again: aropt optimize MODEL -o OUT",
    )
