"""Whether the bodies of scans keep the sequences of a batch apart: by the rules of `rules`, as in the forward itself.

A row is padding in one sequence and none in another, so that a body that mixes them would let it count.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import bind
from aropt.ir.program import Spec
from aropt.ir.torch_compat import propagate
from aropt.restrict.analysis import Analysis
from aropt.restrict.dims import Axes, B, NotRowwise, free, has
from aropt.restrict.info import Info
from aropt.restrict.mixers import tensors


class Body(Analysis):
    """Classifies the nodes of a body: its inputs and results are [B, ...]."""

    def classify(self, node: fx.Node) -> Info:
        if node.op == "placeholder":
            return Info((B, *map(free, self.dims(node)[1:])))
        return super().classify(node)

    def require_rows(self, output: fx.Node) -> None:
        for result in tensors(output.args[0]):
            axes: Axes = self.info[result].axes if result in self.info else ()
            if not axes or axes[0] != B or any(has(axis, "b") for axis in axes[1:]):
                raise NotRowwise("gives a carry or a y that is not [B, ...]")


def check_bodies(graph: fx.Graph, capacity: int) -> None:
    """Raises Unsupported, with node, op and module path, where the body of a scan mixes sequences."""
    from aropt.kernels.scan import parsed

    scan = ops.load("scan").overload
    for node in [n for n in graph.nodes if n.target is scan]:
        x = bind(node)
        lists = [tensors(x[name]) for name in ("init", "xs", "extra")]
        body = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        inputs, weights = dict[str, Spec](), dict[str, Tensor]()
        sources = iter([one for some in lists for one in some])
        module = parsed(x["body"], tuple(map(len, lists)))
        for inner in module.graph.nodes:
            if inner.op != "placeholder":
                copied[inner] = body.node_copy(inner, copied.__getitem__)
                copied[inner].meta = {"where": f"{node.meta.get('where') or 'the top level'}, the body of {node.name}"}
                continue
            value: Any = next(sources).meta["val"]
            if inner.name[0] == "e":
                weights[inner.name] = torch.zeros([int(n) for n in value.shape], dtype=value.dtype)
                copied[inner] = body.get_attr(inner.name)
            else:
                copied[inner] = body.placeholder(inner.name)
                inputs[inner.name] = Spec(value.dtype, ("B", *map(int, value.shape[1 + (inner.name[0] == "x") :])))
        Body(body, weights, propagate(body, inputs, weights), capacity)
