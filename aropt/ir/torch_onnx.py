"""Every private or unstable name of torch.onnx and of onnxscript that aropt uses; see `torch_compat`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from aropt.ir.dims import Dim, replaced
from aropt.ir.program import Graph, Spec
from aropt.ir.torch_compat import propagate


def onnx_registry(translations: Mapping[Any, Any], opset: int) -> Any:
    """torch's ONNX translations with ours before them (takes a third of a second)."""
    from torch.onnx._internal.exporter import _registration

    registry = _registration.ONNXRegistry.from_torchlib(opset_version=opset)
    for target, function in translations.items():
        registry.register_op(target, function, False)
    return registry


def to_onnx(graph: Graph, weights: Mapping[str, Tensor], registry: Any, opset: int) -> Any:
    """The graph as an onnx_ir.Model, its nodes translated one by one; weights are initializers under their names.

    torch's own exporter traces and decomposes first, which takes most of its time and breaks up what has a translation.
    Raises torch.onnx's ConversionError for an op that has none.
    """
    import onnx_ir as ir
    from torch.onnx._internal.exporter import _core, _ir_passes

    module, lifted = lift(graph, weights)
    specs = {n: Spec(weights[w].dtype, tuple(weights[w].shape)) for n, w in lifted.items()}
    names = propagate(module.graph, {**graph.inputs, **specs}, {})
    promote(module)
    model = ir.Model(ir.Graph([], [], nodes=[], name=graph.name), ir_version=10)
    _core._translate_fx_graph(
        module.graph, model, graph_like=model.graph, owned_graphs={}, lower="at_conversion", registry=registry
    )
    for value in [v for v in model.graph.inputs if v.name in lifted]:
        model.graph.inputs.remove(value)
        name = value.name = lifted[value.name]
        value.const_value = _core.TorchTensor(weights[name].contiguous(), name=name)
        model.graph.initializers[name] = value
    text: dict[str, Dim] = {str(symbol): name for symbol, name in names.items()}
    for value in [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]:
        if value.shape is not None:
            value.shape = replaced_in(value.shape, text)
    _ir_passes.add_opset_imports(model)
    optimize(model)
    moved = {"GridSample", "DFT"} & {node.op_type for node in model.graph}  # what changed its meaning in between
    if moved:
        raise ValueError(f"{', '.join(sorted(moved))} changed between the opsets")
    model.graph.opset_imports[""] = opset  # after torchlib's functions, written for an older one, were inlined
    return model


def promote(module: fx.GraphModule) -> None:
    """Inserts the casts that torch's ops imply, as torch.onnx does: only nodes that get some are run again."""
    from torch.onnx._internal.fx.passes import type_promotion

    class Promotion(type_promotion._TypePromotionInterpreter):
        def run_node(self, node: fx.Node) -> Any:
            if node.op != "call_function":
                return super().run_node(node)
            rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
            if rule:
                with self._set_current_node(node):
                    self._maybe_promote_node(node, rule)
            return node.meta["val"]

    change = type_promotion.InsertTypePromotion(module, promotions())
    change.interpreter = Promotion(module, promotions())
    change.run()


@functools.cache
def promotions() -> Any:
    """torch.onnx's rules for types by op."""
    from torch.onnx._internal.fx.passes import type_promotion

    return type_promotion.TypePromotionTable()


def optimize(model: Any) -> None:
    """What onnxscript's optimizer does, in less time: a rule is tried only where its last node is of the right kind."""
    import onnxscript.optimizer
    from onnxscript import rewriter

    before, rewriter._DEFAULT_REWRITE_RULES = rewriter._DEFAULT_REWRITE_RULES, rooted_rules()
    try:
        onnxscript.optimizer.optimize(model)
    finally:
        rewriter._DEFAULT_REWRITE_RULES = before


@functools.cache
def rooted_rules() -> Any:
    """onnxscript's own rewrite rules."""
    from onnxscript import rewriter
    from onnxscript.rewriter import pattern

    return pattern.RewriteRuleSet([Rooted(rule) for rule in rewriter._DEFAULT_REWRITE_RULES])


class Rooted:
    """A rewrite rule that looks at a node's kind before all else."""

    def __init__(self, rule: Any) -> None:
        from onnxscript.rewriter._matcher import SimplePatternMatcher

        self.rule = rule
        nodes = rule._target_pattern.output_nodes
        known = len(nodes) == 1 and type(rule._matcher) is SimplePatternMatcher
        self.kind = nodes[0].op if known else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rule, name)

    def try_rewrite(self, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        if self.kind is not None and not self.kind.matches(node.op_type):
            return None
        return self.rule.try_rewrite(model, graph, node, **options)


def replaced_in(shape: Any, given: Mapping[str, Dim]) -> Any:
    """An ONNX shape with other sizes in place of symbols; what can't be read as a size stays."""
    import onnx_ir as ir

    dims = []
    for dim in (d if isinstance(d, int) else d.value for d in shape):
        with contextlib.suppress(ValueError):
            dim = dim if dim is None else replaced(dim, given)
        dims.append(dim)
    return ir.Shape(dims)


def lift(graph: Graph, weights: Mapping[str, Tensor]) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph with weights as further inputs, and which input is which weight."""
    copy = fx.Graph()
    names = {w: f"weight_{i}" for i, w in enumerate(graph.weights())}
    placed = {w: copy.placeholder(n) for w, n in names.items()}
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        values[node] = placed[str(node.target)] if node.op == "get_attr" else copy.node_copy(node, lambda n: values[n])
    return fx.GraphModule({}, copy), {n: w for w, n in names.items()}
