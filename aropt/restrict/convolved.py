"""Token shifts and causal convolutions, as models write them with padding and slices, become ops that carry state.

pad(x, (0, 0, r, -r));  pad(x[:, :-r], (0, 0, r, 0));  cat([zeros, x[:, :-r]], 1)      ->  aropt::delay
conv1d(x, padding=K - 1)[..., :T];  conv1d(pad(x, (K - 1, 0)))        depthwise        ->  aropt::causal_conv1d
                                                                      of all channels  ->  delays and linear layers
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.ir.edit import copied
from aropt.ir.program import Graph
from aropt.ir.torch_compat import build, propagate
from aropt.restrict.positions import content_nodes

aten = torch.ops.aten
ZEROS = {"aten::zeros", "aten::zeros_like", "aten::new_zeros"}
PADS = {"aten::constant_pad_nd", "aten::pad"}
FULL = {"aten::full", "aten::full_like", "aten::new_full"}
Write = Callable[[fx.Graph], Any]


def normalize_convolutions(graph: Graph, weights: Mapping[str, Tensor], never: Sequence[int] = ()) -> Graph:
    """The graph with shifts and causal convolutions along the sequence as ops; itself where it has none."""
    if not any(op_name(n) in FORMS for n in graph.fx.nodes if n.op == "call_function"):
        return graph
    copy, count = copied(graph.fx), 0
    content = content_nodes(copy, propagate(copy, graph.inputs, weights), never)
    for node in list(copy.nodes):
        form = FORMS.get(op_name(node)) if node.op == "call_function" and node in content else None
        write = form(node) if form else None
        if write is not None:
            with copy.inserting_before(node):
                new = write(copy)
            new.meta["where"] = node.meta.get("where", "")
            node.replace_all_uses_with(new)
            count += 1
    copy.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return build(graph.name, copy, dict(graph.inputs), list(graph.outputs), weights) if count else graph


# --- shifts ----------------------------------------------------------------------------------------------------------


def padded(node: fx.Node) -> Write | None:
    """Padding before the first row, the last ones cut off by it or by a slice before."""
    found = one_axis(node)
    if found is None:
        return None
    source, axis, before, after = found
    if after == 0:
        inner = cut(source, axis, before)
        return delay(inner, axis, before) if inner is not None else None
    return delay(source, axis, before) if after == -before else None


def joined(node: fx.Node) -> Write | None:
    """Zeros, then all rows but the last."""
    x = bind(node)
    if len(x["tensors"]) != 2:
        return None
    first, rest = x["tensors"]
    if rank(first) != rank(node):  # torch.cat takes an empty tensor of one axis to anything
        return None
    axis, rows = x["dim"] % rank(node), first.meta["val"].shape[x["dim"]]
    fill = bind(first).get("fill_value") if op_name(first) in FULL else None
    if not isinstance(rows, int) or not (op_name(first) in ZEROS or fill == 0):
        return None
    inner = cut(rest, axis, rows)
    alike = inner is not None and inner.meta["val"].dtype == node.meta["val"].dtype
    return delay(inner, axis, rows) if inner is not None and alike else None


def one_axis(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """(x, axis, before, after) of zeros put before the rows of one axis, whose size varies."""
    x = bind(node)
    pads: Any = list(x["pad"])
    pairs = {
        i: (pads[2 * i], pads[2 * i + 1]) for i in range(len(pads) // 2) if (pads[2 * i], pads[2 * i + 1]) != (0, 0)
    }
    if len(pairs) != 1 or x.get("mode", "constant") != "constant" or x["value"]:
        return None
    (place, (before, after)), source = next(iter(pairs.items())), x["self"]
    axis = rank(node) - 1 - place
    if not isinstance(before, int) or not isinstance(after, int) or before < 1 or fixed(source, axis):
        return None
    return source, axis, before, after


def cut(node: Any, axis: int, rows: int) -> fx.Node | None:
    """The value of which a node is all rows but the last."""
    if not isinstance(node, fx.Node) or op_name(node) != "aten::slice" or fixed(node, axis):
        return None
    x = bind(node)
    same = x["dim"] % rank(node) == axis and not x["start"] and x["step"] == 1 and x["end"] == -rows
    return x["self"] if same else None


def delay(source: fx.Node, axis: int, rows: int) -> Write | None:
    """Writes the delay of [B, T, F] or [B, F, T]."""
    if rank(source) != 3 or axis == 0:
        return None

    def write(graph: fx.Graph) -> fx.Node:
        value = source if axis == 1 else graph.call_function(aten.transpose.int, (source, 1, 2))
        value = delayed(graph, value, rows)
        return value if axis == 1 else graph.call_function(aten.transpose.int, (value, 1, 2))

    return write


def delayed(graph: fx.Graph, value: fx.Node, rows: int) -> fx.Node:
    if rows == 0:
        return value
    made = graph.call_function(ops.load("delay").overload, (value, rows, None, None))
    return graph.call_function(operator.getitem, (made, 0))


# --- convolutions ----------------------------------------------------------------------------------------------------


def padded_itself(node: fx.Node) -> Write | None:
    """A convolution that pads both ends, and a slice that drops what lies behind the last row."""
    x = bind(node)
    conv = x["self"]
    if op_name(conv) != "aten::conv1d" or len(conv.users) != 1 or x["dim"] % 3 != 2 or x["start"] or x["step"] != 1:
        return None
    given = bind(conv)
    end, length, width = x["end"], given["input"].meta["val"].shape[2], span(given)
    end = end.meta["val"] if isinstance(end, fx.Node) else end
    if width is None or width == 0 or given["padding"] != [width] or str(end) not in (str(length), str(-width)):
        return None
    return convolution(given["input"], given, width)


def padded_before(node: fx.Node) -> Write | None:
    """A convolution over rows with padding before them."""
    given = bind(node)
    width, source = span(given), given["input"]
    if width is None or width == 0 or given["padding"] != [0] or op_name(source) not in PADS:
        return None
    found = one_axis(source)
    return convolution(found[0], given, width) if found and found[1:] == (2, width, 0) else None


def span(given: Mapping[str, Any]) -> int | None:
    """How many rows a convolution looks back, of batches of channels and rows; None where it skips some."""
    if list(given["stride"]) != [1] or rank(given["input"]) != 3 or not isinstance(given["padding"], list):
        return None
    return int((given["weight"].meta["val"].shape[2] - 1) * given["dilation"][0])


def convolution(source: fx.Node, given: Mapping[str, Any], width: int) -> Write | None:
    """Writes a causal convolution of [B, C, T]."""
    weight, bias, groups = given["weight"], given["bias"], given["groups"]
    outputs, inputs, taps = weight.meta["val"].shape
    apart = int(given["dilation"][0])
    if fixed(source, 2) or (groups != 1 and (inputs != 1 or outputs != groups or apart != 1)):
        return None

    def depthwise(graph: fx.Graph) -> fx.Node:
        narrow = graph.call_function(aten.squeeze.dim, (weight, 1))
        made = graph.call_function(ops.load("causal_conv1d").overload, (source, narrow, bias, None, None))
        return graph.call_function(operator.getitem, (made, 0))

    def whole(graph: fx.Graph) -> fx.Node:
        rows, total = graph.call_function(aten.transpose.int, (source, 1, 2)), None
        for tap in reversed(range(taps)):
            value = delayed(graph, rows, width - tap * apart)
            part = graph.call_function(aten.select.int, (weight, 2, tap))
            value = graph.call_function(aten.linear.default, (value, part, bias if total is None else None))
            total = value if total is None else graph.call_function(aten.add.Tensor, (total, value))
        return graph.call_function(aten.transpose.int, (total, 1, 2))

    return whole if groups == 1 else depthwise


FORMS: dict[str, Callable[[fx.Node], Write | None]] = {
    **dict.fromkeys(PADS, padded),
    "aten::cat": joined,
    "aten::slice": padded_itself,
    "aten::conv1d": padded_before,
}


def fixed(node: fx.Node, axis: int) -> bool:
    """Whether an axis has the same size for all sequences."""
    return isinstance(node.meta["val"].shape[axis], int)


def rank(node: Any) -> int:
    return int(node.meta["val"].dim())
