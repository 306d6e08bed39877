"""Graphs as ONNX files: standard operators only, so that any runtime takes them.

torch's own exporter translates; aropt adds what it would do badly for decoding: a cache update as one ScatterElements
(which a runtime may do in place) and attention without checks for rows that see nothing (ours always see themselves).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.errors import MissingTool, Unsupported
from aropt.frontend.export import quiet
from aropt.frontend.trace import dynamic
from aropt.ir import ops
from aropt.ir.opdef import onnx_node
from aropt.ir.program import Graph
from aropt.ir.torch_compat import examples
from aropt.ir.torch_onnx import onnx_registry, to_onnx

OPSET = 20
EPS = torch.finfo(torch.float32).eps  # what rms_norm takes where none is given
EXTERNAL_OVER = 256 * 2**20  # bytes of weights from which they go to a file beside the model
COPIES_OVER = 32 * 2**20  # bytes of weights that a model would hold twice, from which they do too
SMALL = 1024  # bytes of tensors that stay in the model


def export(graph: Graph, weights: Mapping[str, Tensor], path: Path, contrib: bool = False) -> None:
    """Writes the graph to `path`: inputs and outputs named as the graph's ("out." before the outputs' names).

    `contrib` allows ONNX Runtime's own operators, which other runtimes don't have.
    Raises MissingTool without the [onnx] extra, Unsupported for an op without a translation.
    """
    model = translate(graph, weights, contrib)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)


def save(model: Any, path: Path) -> None:
    """Writes the model; weights go to a file beside it (<name>.data), each once, where they would take much room."""
    import onnx_ir as ir

    values = [v for graph in model.graphs() for v in graph.initializers.values() if v.const_value is not None]
    tensors = {id(v.const_value): v.const_value for v in values}
    once, all_of_them = (sum(t.nbytes for t in found) for found in (tensors.values(), [v.const_value for v in values]))
    if once > EXTERNAL_OVER or all_of_them - once > COPIES_OVER:
        large = {key: tensor for key, tensor in tensors.items() if tensor.nbytes > SMALL}
        data = path.name + ".data"
        moved = dict(
            zip(large, ir.external_data.convert_tensors_to_external([*large.values()], path.parent, data), strict=True)
        )
        for value in values:
            value.const_value = moved.get(id(value.const_value), value.const_value)
    ir.save(model, path)


def translate(graph: Graph, weights: Mapping[str, Tensor], contrib: bool = False) -> Any:
    """The graph as an onnx_ir.Model; see `export`."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingTool(
            what="the ONNX exporter is not installed", why=str(error), hint="pip install 'aropt[onnx]'"
        ) from error
    try:
        with torch.no_grad(), quiet():
            try:
                model = to_onnx(graph, weights, registry(contrib), OPSET)
            except torch.onnx.OnnxExporterError as first:  # an op that only torch's decompositions bring to ONNX
                try:
                    model = traced(graph, weights, contrib)
                except Exception:  # what torch's exporter can't translate either: the first error names the op
                    raise first from first.__cause__
    except Exception as error:  # the exporter has many kinds, its innermost says why
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = next((line for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise Unsupported(
            what=f"the graph '{graph.name}' has no ONNX form",
            where=f"graph {graph.name}",
            why=reason[:300],
            hint="choose --target eager or inductor, or report the op",
        ) from error
    if contrib:
        fuse(model)
    for value, name in zip(model.graph.inputs, graph.inputs, strict=True):
        value.name = name
    for value, name in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = "out." + name
    return model


@functools.cache
def registry(contrib: bool) -> Any:
    """All translations, once a process."""
    return onnx_registry(translations(contrib), OPSET)


def traced(graph: Graph, weights: Mapping[str, Tensor], contrib: bool) -> Any:
    """The model by torch's exporter, with its decompositions."""
    inputs, shapes = tuple(examples(graph.inputs).values()), dynamic(graph.inputs)
    exported = torch.export.export(graph.bind(weights), inputs, dynamic_shapes=shapes, strict=False)
    table = translations(contrib)
    program = torch.onnx.export(
        exported, dynamo=True, opset_version=OPSET, verbose=False, custom_translation_table=table
    )
    assert program is not None
    return program.model


def fuse(model: Any) -> None:
    """Norms with the addition before them, as ONNX Runtime's operators."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript.rewriter.ort_fusions import skip_normalization

    skip_normalization.fuse_skip_rms_normalization(model)
    skip_normalization.fuse_skip_layer_normalization(model)
    RemoveUnusedNodesPass()(model)


def translations(contrib: bool = False) -> dict[Any, Callable[..., Any]]:
    """Translations that replace torch's, for aropt's own ops and for the ops named above."""
    from onnxscript import opset20 as op

    from aropt.kernels.canvas_select import log1p_series

    def index_copy(self: Any, dim: int, index: Any, source: Any) -> Any:
        rank = len(source.shape)
        shape = [1] * rank
        shape[dim] = -1
        slots = op.Expand(op.Reshape(index, op.Constant(value_ints=shape)), op.Shape(source))
        return op.ScatterElements(self, slots, source, axis=dim)

    def grouped(mask: Any, shape: list[Any], query: Any, groups: int) -> Any:
        """The mask for queries whose groups of heads are rows."""
        missing = list(range(4 - len(shape)))
        mask = op.Unsqueeze(mask, op.Constant(value_ints=missing)) if missing else mask
        shape = [1] * len(missing) + shape
        if shape[1] == 1:
            return mask if shape[2] == 1 else op.Tile(mask, op.Constant(value_ints=[1, 1, groups, 1]))
        if shape[2] == 1:
            one = op.Constant(value_ints=[1])
            mask = op.Expand(mask, op.Concat(one, one, op.Shape(query, start=2, end=3), one, axis=0))
        return op.Reshape(mask, op.Constant(value_ints=[0, shape[1] // groups, -1, 0]))

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if is_causal:
            raise NotImplementedError("causal attention without an explicit mask")
        heads, groups, size = query.shape[1], query.shape[1] // key.shape[1], query.shape[-1]
        shape = [] if attn_mask is None else list(attn_mask.shape)
        factor = 1 / math.sqrt(size) if scale is None else scale
        order = [*range(len(query.shape) - 2), len(query.shape) - 1, len(query.shape) - 2]
        if attn_mask is not None and attn_mask.dtype is not None and attn_mask.dtype.name == "BOOL":
            zero, gone = (op.CastLike(op.Constant(value_float=v), query) for v in (0.0, -math.inf))
            attn_mask = op.Where(attn_mask, zero, gone)
        if enable_gqa and groups > 1:  # the heads of a group are rows of one product: keys and values are read once
            if attn_mask is not None:
                attn_mask = grouped(attn_mask, shape, query, groups)
            query = op.Reshape(query, op.Constant(value_ints=[0, heads // groups, -1, size]))
        scores = op.Mul(
            op.MatMul(query, op.Transpose(key, perm=order)), op.CastLike(op.Constant(value_float=factor), query)
        )
        scores = scores if attn_mask is None else op.Add(scores, attn_mask)
        mixed = op.MatMul(op.Softmax(scores, axis=-1), value)
        if enable_gqa and groups > 1:
            mixed = op.Reshape(mixed, op.Constant(value_ints=[0, heads, -1, value.shape[-1]]))
        return mixed

    def rms_norm(x: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        if (
            contrib and weight is not None and len(normalized_shape) == 1
        ):  # in the standard domain by a mistake of ORT's
            given = {"axis": -1, "epsilon": EPS if eps is None else eps, "stash_type": 1}
            return onnx_node("", "SimplifiedLayerNormalization", [x, weight], 1, **given)[0]
        epsilon = op.CastLike(op.Constant(value_float=EPS if eps is None else eps), x)
        axes = op.Constant(value_ints=[-1 - i for i in range(len(normalized_shape))])
        mean = op.ReduceMean(op.Pow(x, op.CastLike(op.Constant(value_float=2.0), x)), axes, keepdims=1)
        scaled = op.Div(x, op.Sqrt(op.Add(mean, epsilon)))  # the form that ONNX Runtime fuses
        return scaled if weight is None else op.Mul(scaled, weight)

    def either(left: Any, right: Any) -> Any:
        return op.Or(left, right) if left.dtype is None or left.dtype.name == "BOOL" else op.BitwiseOr(left, right)

    def both(left: Any, right: Any) -> Any:
        return op.And(left, right) if left.dtype is None or left.dtype.name == "BOOL" else op.BitwiseAnd(left, right)

    def any_of(x: Any, dim: int, keepdim: bool = False) -> Any:
        return op.ReduceMax(x, op.Constant(value_ints=[dim]), keepdims=int(keepdim))  # takes bool from opset 20 on

    def all_of(x: Any) -> Any:
        return op.ReduceMin(x, keepdims=0)

    def to(x: Any, dtype: Any, non_blocking: bool = False, copy: bool = False, memory_format: Any = None) -> Any:
        return op.Cast(x, to=dtype)

    def rsub(x: Any, other: Any, alpha: float = 1.0) -> Any:
        scaled = x if alpha == 1 else op.Mul(x, op.CastLike(op.Constant(value_float=float(alpha)), x))
        return op.Sub(op.CastLike(other, x), scaled)

    def sort(x: Any, *, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        size = op.Shape(x, start=dim % len(x.shape), end=dim % len(x.shape) + 1)
        return op.TopK(x, size, axis=dim, largest=int(descending), sorted=1)  # of equal values the first comes first

    def log1p(x: Any) -> Any:
        """Accurate near 0, where log(1 + x), torch's own translation, has lost x."""
        near = op.Less(op.Abs(x), op.CastLike(op.Constant(value_float=0.25), x))
        return op.Where(near, log1p_series(x), op.Log(op.Add(x, op.CastLike(op.Constant(value_float=1.0), x))))

    aten = torch.ops.aten
    own: dict[Any, Callable[..., Any]] = dict(ops.translation_table(contrib))
    own |= {aten.__or__.Tensor: either, aten.__and__.Tensor: both, aten.any.dim: any_of, aten.all.default: all_of}
    own |= {aten.to.dtype: to, aten.rsub.Scalar: rsub, aten.sort.stable: sort}
    return {
        **own,
        aten.index_copy.default: index_copy,
        aten.log1p.default: log1p,
        aten.scaled_dot_product_attention.default: attention,
        aten.rms_norm.default: rms_norm,
    }
