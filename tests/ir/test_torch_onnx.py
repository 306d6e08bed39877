"""What is done in less time than torch.onnx and onnxscript take gives what they give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from aropt.exporters.onnx import registry
from aropt.frontend.export import quiet
from aropt.frontend.trace import capture_function
from aropt.ir import ops, own_operators
from aropt.ir.program import Graph, Spec
from aropt.ir.torch_compat import propagate
from aropt.ir.torch_onnx import Rooted, lift, optimize, promote, rooted_rules, to_onnx

pytest.importorskip("onnxscript")
INPUTS = {"x": Spec(torch.float32, ("B", "T", 8))} | {
    n: Spec(dtype, ("B", "T")) for n, dtype in (("ids", torch.int64), ("mask", torch.bool))
}


def mixed(x: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """Ops that promote types, and ops that onnxscript rewrites."""
    number = ids * 0.5 + mask
    turned = x.transpose(1, 2).relu().transpose(1, 2).reshape(-1, 8).reshape(x.shape)
    small = torch.minimum(torch.maximum(x, torch.zeros_like(x)), torch.ones_like(x)).to(torch.float32)
    return number, turned + ids[..., None], (ids / 3).exp(), small * mask[..., None], x[:, :, 0:8] + 0.0, ids**2.0


def graph() -> Graph:
    return capture_function("mixed", mixed, INPUTS, list("abcdef"))


def translated() -> Any:
    with quiet():
        return to_onnx(graph(), {}, registry(False), 20)


def lines(module: fx.GraphModule) -> list[str]:
    """Nodes with the types of their values."""
    found = []
    for node in module.graph.nodes:
        value = node.meta.get("val")
        kind = (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value
        found.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {kind}")
    return found


def test_casts_are_those_of_torch() -> None:
    from torch.onnx._internal.exporter import _fx_passes

    ours, theirs = (lift(graph(), {})[0] for _ in range(2))
    for module in (ours, theirs):
        propagate(module.graph, INPUTS, {})
    before = lines(ours)
    promote(ours)
    _fx_passes.insert_type_promotion_nodes(theirs)
    assert lines(ours) == lines(theirs)
    assert lines(ours) != before


def test_models_are_those_of_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir
    import onnxscript.optimizer

    made = []
    for way in (optimize, onnxscript.optimizer.optimize, lambda model: None):
        monkeypatch.setattr("aropt.ir.torch_onnx.optimize", way)
        made.append(ir.to_proto(translated()).SerializeToString())
    assert made[0] == made[1] != made[2]


def test_what_is_not_tried_would_not_match(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("aropt.ir.torch_onnx.optimize", seen.append)
    translated()
    (model,) = seen
    skipped = [
        (rule, node)
        for rule in rooted_rules().rules
        for node in model.graph
        if rule.kind is not None and not rule.kind.matches(node.op_type)
    ]
    assert skipped
    assert not any(rule.rule.try_rewrite(model, model.graph, node) for rule, node in skipped)


def test_a_rule_of_several_last_nodes_is_always_tried() -> None:
    several = [rule for rule in rooted_rules().rules if len(rule.rule._target_pattern.output_nodes) > 1]
    assert all(isinstance(rule, Rooted) and rule.kind is None for rule in several)


def test_own_operators_are_those_of_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older ONNX Runtime lacks some: their ops are then translated to standard operators, as for other runtimes."""
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    found = own_operators.own_operators()
    assert "SkipLayerNormalization" in found and "Relu" not in found
    needy = [op for op in ops.load_all().values() if op.needs]
    assert {op.name for op in needy} == {"gated_delta", "kda", "ssd_scan", "causal_conv1d"}
    for known in (found, frozenset[str]()):
        monkeypatch.setattr(own_operators, "own_operators", lambda known=known: known)
        table = ops.translation_table(contrib=True)
        for op in needy:
            assert table[op.overload] is (op.contrib if op.needs in known else op.onnx)
        cached = ops.load("cached_attention")  # its operator is in every version
        assert table[cached.overload] is cached.contrib
