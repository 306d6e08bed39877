"""Capture: a plain `forward(ids) -> logits` (or any tensor function) becomes a Graph.

The graph is torch.export's functional ATen graph; linear, norms, convolutions and SDPA stay whole. Sequence length and
batch are symbolic. Metadata checks, identity slices and repeated subexpressions are dropped.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from aropt.errors import Unsupported, UsageError
from aropt.frontend import scans
from aropt.frontend.compute import HALVES, needless, single
from aropt.frontend.export import (
    batched_experts,
    export,
    export_failure,
    export_forward,
    fixed_rotary,
    limited,
    quiet,
    torch_reason,
)
from aropt.frontend.forwards import HINT, Forward
from aropt.ir.dims import parse
from aropt.ir.edit import share
from aropt.ir.known_mixers import known_mixers
from aropt.ir.naming import weight_name
from aropt.ir.program import Graph, Role, Spec
from aropt.ir.torch_compat import build, examples, looped_scans, settled_size, trace_function

aten = torch.ops.aten
MAXINT = 2**63 - 1
DROPPED = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}
EMPTY = {
    aten.empty.memory_format: aten.zeros.default,
    aten.new_empty.default: aten.new_zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
}
PASS_THROUGH = {"aten::alias", "aten::detach", "aten::lift_fresh_copy", "aten::detach_", "aten::contiguous"}


def capture_model(
    model: nn.Module, vocab: int, capacity: int, row: tuple[int, ...] = ()
) -> tuple[Graph, dict[str, Tensor]]:
    """Captures `forward(ids int64[B, T]) -> logits float[B, T, V]` with B and T symbolic (1 <= T <= capacity).

    `vocab` bounds the example ids; `row` is (W,) for ids [B, T, W] -> logits [B, T, W, V] (see
    aropt.ir.units). Returns the graph (input "ids", output "logits") and the weights by name.
    Raises Unsupported when torch can't export the forward, or exports it with a fixed length.
    """
    model = model.eval().requires_grad_(False)
    example = torch.randint(0, vocab, (3, min(7, capacity), *row), generator=torch.Generator().manual_seed(0))
    check_weights(model)
    with batched_experts(model), fixed_rotary(model, capacity), known_mixers(model), looped_scans():
        with contextlib.suppress(Exception), torch.no_grad():  # what fails fails in the export too, with its reason
            Forward(model)(example)  # a model may settle something in its first call: RWKV scales its weights
        exported, unsure = export_forward(Forward(model), example, capacity)
    specs = {"ids": Spec(torch.int64, ("B", "T", *row))}
    graph, weights = from_exported("model", exported, specs, ["logits"], capacity=capacity)
    check_rows(graph, row)
    for size in unsure:
        check_size(graph, weights, model, torch.randint(0, vocab, (*size, *row)))
    return graph, weights


def check_size(graph: Graph, weights: dict[str, Tensor], model: nn.Module, ids: Tensor) -> None:
    """Raises Unsupported unless the graph gives the model's logits for ids of a size that torch can't speak for."""
    with torch.no_grad(), looped_scans():
        ours, theirs = graph.bind(weights)(ids)[0], Forward(model)(ids)
    if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max())):
        raise limited(f"ids of size {list(ids.shape)} are a case of their own", ids.shape[1] - 1)


def check_rows(graph: Graph, row: tuple[int, ...] = ()) -> None:
    """Raises Unsupported unless the graph gives logits [B, T, *row, V]."""
    dims = graph.outputs["logits"].dims
    if len(dims) != 3 + len(row) or dims[:-1] != ("B", "T", *row):
        raise Unsupported(
            what="the forward does not return one row of logits for each token",
            where="output 'logits'",
            why=f"its shape is {graph.outputs['logits']}, expected [B, T, {''.join(f'{n}, ' for n in row)}vocabulary]",
            hint=HINT,
        )


def capture_function(
    name: str,
    function: Callable[..., Any],
    inputs: dict[str, Spec],
    outputs: list[str],
    role: Role = "bookkeeping",
) -> Graph:
    """Captures a tensor function (a rule): keyword arguments named as `inputs`, a tensor or tuple out."""
    try:
        with quiet():
            made, granted = trace_function(function, inputs)
    except Exception as error:  # a rule of the user's raises anything
        raise export_failure(error) from error
    if granted:
        raise Unsupported(
            what=f"the rule '{name}' is not the same for all sizes",
            where=name,
            why=f"it takes {granted} for granted",
            hint="branch on no sizes",
        )
    held = [str(n.target) for n in made.nodes if n.op == "get_attr"]
    if held:
        raise UsageError(
            what=f"the rule '{name}' holds tensors",
            where=", ".join(held),
            why="rules have no weights",
            hint="pass the tensor as an input of the rule",
        )
    graph, copied, names = fx.Graph(), dict[fx.Node, fx.Node](), iter(inputs)
    for node in made.nodes:
        if node.op == "placeholder":
            copied[node] = graph.placeholder(next(names))
        elif node.op == "call_function":
            copy_call(graph, node, copied)
    graph.output(tuple(copied[n] for n in next(n for n in reversed(made.nodes) if n.op == "output").args[0]))
    for node in graph.nodes:
        node.meta.pop("origin", None)  # only nodes of the model are compared with the captured forward
    share(graph)
    return build(name, graph, inputs, outputs, {}, role)


def capture_module(
    name: str, module: nn.Module, inputs: dict[str, Spec], outputs: list[str]
) -> tuple[Graph, dict[str, Tensor]]:
    """Captures part of a model: its graph, and its weights as "NAME.<path>"."""
    shapes = (dynamic(inputs),)
    holder = nn.Module()
    holder.add_module(name, module.eval().requires_grad_(False))
    holder.forward = lambda *values: module(*values)
    exported = export(holder, tuple(examples(inputs).values()), shapes)
    return from_exported(name, exported, inputs, outputs)


def dynamic(inputs: Mapping[str, Spec]) -> tuple[dict[int, Any], ...]:
    """The sizes of inputs that are not numbers, by axis, as torch.export's Dims."""
    known: dict[str, Any] = {}
    exported = [
        {i: parse(d).to_export(known) for i, d in enumerate(s.dims) if isinstance(d, str)} for s in inputs.values()
    ]
    return tuple(exported)


def check_weights(model: nn.Module) -> None:
    """Raises Unsupported if a weight holds NaN or infinity."""
    for name, value in model.named_parameters():
        if value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise Unsupported(
                what="a weight is not finite",
                where=name,
                why=f"{bad} of {value.numel()} values are NaN or infinite",
                hint="check the checkpoint; it may be damaged or of a diverged training run",
            )


def from_exported(
    name: str,
    exported: ExportedProgram,
    inputs: dict[str, Spec],
    outputs: list[str],
    only: int | None = None,
    capacity: int = 0,
) -> tuple[Graph, dict[str, Tensor]]:
    """An ExportedProgram as a Graph with weights lifted by name, in float32. Raises Unsupported for a mutation.

    `only`: the one of its results that is kept. `capacity`: the longest input, for sizes with min and max in them.
    """
    signature = exported.graph_signature
    results, needed = returned(exported, only)
    graph = fx.Graph()
    weights: dict[str, Tensor] = {}
    copied: dict[fx.Node, fx.Node] = {}
    lifted = {s.arg.name: s for s in signature.input_specs if s.kind != InputKind.USER_INPUT}
    names = iter(inputs)
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name not in lifted:
            copied[node] = graph.placeholder(next(names))
    sizes = given_sizes(exported, inputs)
    constants = {**exported.state_dict, **exported.constants}
    seen: dict[Any, str] = {}
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            target = str(lifted[node.name].target)
            value = constants[target].detach()
            target = target.removeprefix("model.") if target.startswith("model.") else target
            key = (value.data_ptr(), value.dtype, *value.shape, *value.stride())  # tied weights are stored once
            if key not in seen or not value.numel():
                seen[key] = weight_name(target, value, weights)
                weights[seen[key]] = value.float() if value.dtype in HALVES else value
            copied[node] = graph.get_attr(seen[key])
        elif node.op == "call_function" and node in needed:
            size = settled_size(node, exported, capacity) if is_limit(node) else None
            copied[node] = copied[size] if isinstance(size, fx.Node) else size  # type: ignore[assignment]
            if scans.is_scan(node):
                copied[node] = scans.copy_scan(graph, node, copied, exported.graph_module, sizes, copy_call)  # type: ignore[assignment]
            elif size is None:
                copy_call(graph, node, copied)
    graph.output(tuple(copied[n] for n in results))
    scans.unswap(graph)
    share(graph)
    try:
        result = build(name, graph, inputs, outputs, weights)
    except Exception as error:  # an op's shape rule raises what it likes
        node = getattr(error, "aropt_node", None)
        raise Unsupported(
            what="an op's shape rule fails for symbolic sizes",
            where=f"{node.meta.get('where')}, {node}" if node else "",
            why=torch_reason(str(error)),
            hint="write it with sizes that follow from the inputs alone, or give another --capacity",
        ) from error
    return result, {w: weights[w] for w in result.weights()}


def given_sizes(exported: ExportedProgram, inputs: Mapping[str, Spec]) -> dict[str, Any]:
    """The symbolic sizes of the inputs, by their names in `inputs`."""
    given = [n for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    pairs = [pair for n, spec in zip(given, inputs.values()) for pair in zip(spec.dims, n.meta["val"].shape)]
    return {dim: size for dim, size in pairs if isinstance(dim, str)}


def returned(exported: ExportedProgram, only: int | None = None) -> tuple[list[fx.Node], set[fx.Node]]:
    """The nodes that the forward returns (`only` one of them), and all that these need.

    Raises Unsupported where it changes an input, or a buffer that it reads: one that each call overwrites is no state.
    """
    specs = exported.graph_signature.output_specs
    outputs: Any = next(n for n in reversed(exported.graph.nodes) if n.op == "output").args[0]
    results = [n for n, s in zip(outputs, specs, strict=True) if s.kind == OutputKind.USER_OUTPUT]
    results = results if only is None else [outputs[only]]
    needed, todo = set(), list(results)
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo += node.args[1:2] if overwrites(node) else node.all_input_nodes
    read = {s.target for s in exported.graph_signature.input_specs for n in needed if n.name == s.arg.name}
    for spec in specs:
        unread = spec.kind == OutputKind.BUFFER_MUTATION and spec.target not in read
        if spec.kind != OutputKind.USER_OUTPUT and not unread:
            raise Unsupported(
                what="the forward changes a buffer or an input",
                where=str(spec.target or spec.arg),
                why=f"torch.export reports {spec.kind.name}; state must be a value",
                hint="make forward(ids) a pure function; aropt derives the caches itself",
            )
    return results, needed


def is_limit(node: fx.Node) -> bool:
    """Whether it is the smaller or larger of two sizes."""
    return node.target in (torch.sym_min, torch.sym_max)


def overwrites(node: fx.Node) -> bool:
    """Whether it is `a.copy_(b)` of one shape and type: b, whatever a was."""
    if node.target is not aten.copy.default:
        return False
    old, new = (n.meta["val"] for n in node.args[:2])  # type: ignore[union-attr]
    return bool(old.shape == new.shape and old.dtype == new.dtype)


def copy_call(graph: fx.Graph, node: fx.Node, copied: dict[fx.Node, fx.Node]) -> None:
    """Copies a call, or maps it to its input where it does nothing."""
    kind = node.target.name() if isinstance(node.target, torch._ops.OpOverload) else ""
    base = kind.split(".")[0]
    if base in DROPPED:
        return
    if node.target is operator.getitem and isinstance(copied[node.args[0]], list):  # type: ignore[index]
        copied[node] = copied[node.args[0]][node.args[1]]  # type: ignore[index]
        return
    from aropt.ir.verify import op_problem

    if node.target in EMPTY:  # what was in memory is overwritten, or is no function of the ids
        node.target = EMPTY[node.target]
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
    problem = op_problem(node.target, node.args, node.kwargs)
    if problem:
        raise Unsupported(
            what="the forward uses an op that a pure graph can't hold",
            where=f"{module_path(node)}, node {node.name} ({base})",
            why=problem[1],
            hint="replace torch.cond by torch.where; remove dropout, noise and in-place changes",
        )
    if base in PASS_THROUGH or is_identity_slice(node) or needless(node) or overwrites(node):
        copied[node] = copied[node.args[1 if overwrites(node) else 0]]  # type: ignore[index]
        return
    if (only := joined_alone(node)) is not None:
        copied[node] = copied[only]
        return
    new = graph.node_copy(node, lambda n: copied[n])
    new.args, new.kwargs = fx.node.map_aggregate(new.args, single), fx.node.map_aggregate(new.kwargs, single)
    new.meta = {"where": module_path(node), "origin": new.name}
    copied[node] = new


def joined_alone(node: fx.Node) -> fx.Node | None:
    """x of a concatenation of x with empty tensors of one axis, as a cache without rows is."""
    if node.target is not aten.cat.default:
        return None
    parts: Any = node.args[0]
    there = [part for part in parts if tuple(part.meta["val"].shape) != (0,)]
    return there[0] if len(there) == 1 and there[0].meta["val"].dtype == node.meta["val"].dtype else None


def is_identity_slice(node: fx.Node) -> bool:
    """x[0:] over a whole axis, or x[-size:], as models cut off what a cache put before."""
    if node.target is not aten.slice.Tensor:
        return False
    source: Any = node.args[0]
    _, axis, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])[:5]
    if isinstance(start, fx.Node):
        start = start.meta["val"]
    whole = start in (0, None) or str(start) == str(-source.meta["val"].shape[axis])
    return bool(whole and end in (None, MAXINT) and step == 1)


def module_path(node: fx.Node) -> str:
    """The innermost module that made the node, e.g. "layers.0.self_attn"."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()] if isinstance(stack, Mapping) else []
    return paths[-1].removeprefix("model.") if paths else ""
