"""ONNX graphs node by node: names that are used once, constants, typed values, and branches with their outputs."""

from __future__ import annotations

from typing import Any

import torch

from aropt.ir.program import Spec

I64 = torch.int64


class Nodes:
    """Appends to graphs of onnx_ir."""

    def __init__(self) -> None:
        import onnx_ir as ir

        self.ir, self.made = ir, 0

    def name(self, stem: str) -> str:
        self.made += 1
        return f"{stem}.{self.made}"

    def node(self, graph: Any, kind: str, inputs: list[Any], outputs: int = 1, **attributes: Any) -> Any:
        """Appends a node; returns its output, or all of them."""
        given = [self.ir.convenience.convert_attribute(k, v) for k, v in attributes.items()]
        made = self.ir.Node("", kind, inputs=inputs, attributes=given, num_outputs=outputs, name=self.name(kind))
        for value in made.outputs:
            value.name = self.name("value")
        graph.append(made)
        return made.outputs[0] if outputs == 1 else list(made.outputs)

    def constant(self, graph: Any, value: Any, dtype: torch.dtype = I64) -> Any:
        return self.node(graph, "Constant", [], value=self.ir.tensor(torch.as_tensor(value, dtype=dtype).numpy()))

    def typed(self, name: str, spec: Spec, shaped: bool = False) -> Any:
        """A value of the spec's type; sizes that may change from round to round are left open."""
        dtype = self.ir.DataType.from_numpy(torch.empty(0, dtype=spec.dtype).numpy().dtype)
        dims = [d if isinstance(d, int) or shaped else None for d in spec.dims]
        return self.ir.Value(name=name, type=self.ir.TensorType(dtype), shape=self.ir.Shape(dims))

    def choose(self, graph: Any, values: dict[str, Any], cond: Any, names: list[str], then: Any, orelse: Any) -> None:
        """The If node itself."""
        made = self.node(graph, "If", [cond], len(names), then_branch=then, else_branch=orelse)
        values.update(zip(names, made if isinstance(made, list) else [made], strict=True))

    def close(self, graph: Any, results: list[Any]) -> None:
        """Sets a subgraph's outputs; what it did not compute itself goes through Identity."""
        own = {id(v) for node in graph for v in node.outputs}
        seen: set[int] = set()
        for value in results:
            fresh = id(value) in own and id(value) not in seen
            seen.add(id(value))
            graph.outputs.append(value if fresh else self.node(graph, "Identity", [value]))
