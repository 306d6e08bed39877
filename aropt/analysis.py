"""The legality query of `restrict`: which axis of each value is the sequence, which ops mix rows, what masks hide.

Runs over a captured `forward(ids[B, T]) -> logits[B, T, V]`. The result says for every content node what its axes are;
each op is on the whitelist of `axes`, or is one of attention's products (written out or SDPA), or is refused by name.
An append cache is exact if no row sees a later one; the masks' tables are evaluated to find that out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from aropt.axes import COLUMN, ROW, Axes, B, NotRowwise, arg, broadcast, find, from_sizes, has, op_name, plain, positive, rule_for
from aropt.errors import Unsupported
from aropt.positions import Positions, content_nodes, hidden_by, hides_future, refusal

aten = torch.ops.aten
SDPA = "aten::scaled_dot_product_attention"
PRODUCTS = {"aten::matmul", "aten::bmm", "aten::baddbmm"}
# ops that keep "hidden" (a very negative score) hidden, when their other operands are harmless
KEEP_HIDDEN = {
    "aten::add", "aten::sub", "aten::_to_copy", "aten::to", "aten::clone", "aten::view", "aten::_unsafe_view", "aten::reshape",
    "aten::expand", "aten::unsqueeze", "aten::squeeze", "aten::dropout", "aten::where", "aten::masked_fill", "aten::cat",
    "aten::maximum", "aten::clamp_min", "aten::slice", "aten::permute", "aten::transpose",
}  # fmt: skip
SCALINGS = {"aten::mul", "aten::div"}
KEEP_ZEROED = KEEP_HIDDEN | SCALINGS
SOFTMAXES = {"aten::softmax", "aten::_softmax"}
BIDIRECTIONAL = "this model is bidirectional; it can't be decoded one token at a time"


@dataclass
class Info:
    """Facts about a content node. `hidden` [n, n]: columns that each row ignores; `zeroed`: those are exactly 0."""

    axes: Any  # Axes, or a list of them for an op with several results
    hidden: Tensor | None = None
    zeroed: bool = False
    role: str = "row"  # row | score (q k^T) | mix (p v) | sdpa
    operands: dict[fx.Node, Axes] = field(default_factory=dict)  # meaning of each position operand's axes


class Analysis:
    """Classifies every content node of a captured forward. Raises Unsupported with node, op and module path."""

    def __init__(self, graph: fx.Graph, weights: Mapping[str, Tensor], names: Mapping[Any, str], capacity: int) -> None:
        self.graph = graph
        self.positions = Positions(weights, names, capacity)
        self.content = content_nodes(graph)
        self.info: dict[fx.Node, Info] = {}
        for node in graph.nodes:
            if node in self.content and node.op != "output":
                try:
                    self.info[node] = self.classify(node)
                except NotRowwise as reason:
                    raise refusal(node, f"{op_name(node)} {reason}", HINT) from None
                except (IndexError, TypeError, ValueError, KeyError, AssertionError) as reason:
                    raise refusal(node, f"{op_name(node)} has a form that is not known: {reason}", HINT) from reason

    def dims(self, node: fx.Node) -> Any:
        """The node's dims: a tuple, or a list of tuples for several results."""
        value = node.meta["val"]
        if isinstance(value, (list, tuple)):
            return [self.positions.dims(node, v) for v in value]
        return self.positions.dims(node)

    def classify(self, node: fx.Node) -> Info:
        if node.op == "placeholder":
            return Info((B, ROW))
        name = op_name(node)
        if name == "getitem":
            source = self.info[node.args[0]]  # type: ignore[index]
            return Info(source.axes[node.args[1]], source.hidden, source.zeroed)
        if name == SDPA:
            return self.sdpa(node)
        rule = rule_for(node)
        if rule is None:
            raise NotRowwise("is not known to work row by row")
        info = Info(())
        inputs = self.inputs(node, info, pointwise=rule.__name__ == "pointwise")
        if name in PRODUCTS and (product := self.product(node, inputs)) is not None:
            product.operands = info.operands
            return product
        info.axes = rule(node, inputs, self.dims(node))
        self.check_size_arguments(node, name)
        self.follow_mask(node, name, info)
        return info

    def inputs(self, node: fx.Node, info: Info, pointwise: bool) -> list[Axes]:
        """Axes of the tensor inputs in order; position operands get theirs from the content beside them."""
        tensors = tensor_inputs(node)
        known = [self.info[t].axes for t in tensors if t in self.content]
        merged = broadcast(known) if pointwise else ()
        result = []
        for tensor in tensors:
            if tensor in self.content:
                result.append(self.info[tensor].axes)
                continue
            dims = self.positions.dims(tensor)
            if pointwise:
                axes = self.align(dims, merged)
            else:
                axes = from_sizes(dims, (("?", 0),))
            info.operands[tensor] = axes
            result.append(axes)
        return result

    def align(self, dims: tuple[int | str, ...], beside: Axes) -> Axes:
        """Meaning of a position operand's axes from the value that it is combined with."""
        axes = []
        for i, dim in enumerate(dims):
            other = beside[i - len(dims)] if len(dims) - i <= len(beside) else ()
            if isinstance(dim, int):
                axes.append(plain(dim))
            elif other and (has(other, "rcb")):
                axes.append(other)
            elif dim == "B":
                axes.append(B)
            else:
                raise NotRowwise(f"combines a value of size {dim} with one that has no such axis")
        return tuple(axes)

    def check_size_arguments(self, node: fx.Node, name: str) -> None:
        """A size used as a number (not as a shape) would make the value depend on the length."""
        from aropt.axes import RESHAPES

        if name in RESHAPES or name in ("aten::slice", "aten::split_with_sizes", "aten::split"):
            return
        for source in node.all_input_nodes:
            if self.positions.is_size(source) and source not in self.content:
                small = {self.positions.value(source, n, b) for n in (2, 3) for b in (1, 2)}
                if len(small) > 1:
                    raise NotRowwise("computes with the sequence length itself")

    # --- attention -----------------------------------------------------------------------------------------------

    def product(self, node: fx.Node, inputs: list[Axes]) -> Info | None:
        """q k^T and p v: the two products of written-out attention. None: an ordinary product."""
        left, right = inputs[-2], inputs[-1]
        if len(left) < 2 or len(right) < 2:
            return None
        lead = broadcast([left[:-2], right[:-2]])
        if left[-2] == ROW and right[-1] == ROW and not has(left[-1], "rcb") and not has(right[-2], "rcb"):
            axes: Axes = (*lead, ROW, COLUMN)
            return Info(broadcast([inputs[0], axes]) if len(inputs) == 3 else axes, role="score")
        if left[-1] == COLUMN and right[-2] == ROW:
            weights = self.info.get(tensor_inputs(node)[-2])
            if weights is None or not weights.zeroed:
                raise NotRowwise("sums over the sequence with weights that no causal mask has zeroed")
            return Info((*lead, left[-2], right[-1]), role="mix")
        return None

    def sdpa(self, node: fx.Node) -> Info:
        """scaled_dot_product_attention(q, k, v, mask): each row of q over all rows of k and v."""
        query, key, value = node.args[:3]
        mask, causal = arg(node, 3, "attn_mask"), arg(node, 5, "is_causal", False)
        if arg(node, 4, "dropout_p", 0.0):
            raise NotRowwise("has dropout; call model.eval()")
        axes = [self.info[n].axes if n in self.content else () for n in (query, key, value)]  # type: ignore[index]
        if not all(len(a) >= 3 and a[-2] == ROW for a in axes):
            raise NotRowwise("attends over something other than the sequence")
        info = Info((*axes[0][:-1], axes[2][-1]), role="sdpa")
        n = self.positions.capacity
        if causal:
            info.hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        elif mask is None:
            raise refusal(node, "attention without a mask: each position sees later ones", BIDIRECTIONAL_HINT, BIDIRECTIONAL)
        elif mask in self.content:
            raise NotRowwise("has a mask that depends on the tokens")
        else:
            dims = self.positions.dims(mask)
            if dims[-2:] != ("T", "T") or any(isinstance(d, str) and d != "B" for d in dims[:-2]):
                raise NotRowwise(f"has a mask of shape {list(dims)}")
            info.operands[mask] = tuple(plain(d) if isinstance(d, int) else B for d in dims[:-2]) + (ROW, COLUMN)
            info.hidden = self.hidden(mask, info.operands[mask], above=False)
        self.require_causal(node, info.hidden)
        return info

    def hidden(self, mask: fx.Node, axes: Axes, above: bool | None) -> Tensor | None:
        """Which columns the mask hides; None when it doesn't span rows and columns. Bool masks: True sees, if above=False."""
        row, column = find(axes, "r"), find(axes, "c")
        if row is None or column is None:
            return None
        table = self.positions.table(mask)
        if table.dtype == torch.bool:
            return hidden_by(table, row, column, above if above is not None else False)
        return hidden_by(table, row, column) if table.is_floating_point() else None

    def require_causal(self, node: fx.Node, hidden: Tensor | None) -> None:
        if hidden is None:
            raise refusal(node, "no mask hides later positions here", BIDIRECTIONAL_HINT, BIDIRECTIONAL)
        if not hides_future(hidden):
            i, j = (int(x) for x in (~hidden).triu(1).nonzero()[0])
            raise refusal(node, f"the mask lets position {i} see position {j}", BIDIRECTIONAL_HINT, BIDIRECTIONAL)
        if hidden.diagonal().any():
            raise NotRowwise("has a mask that hides a position from itself")

    def follow_mask(self, node: fx.Node, name: str, info: Info) -> None:
        """Carries what is hidden and what is zero through the ops between the scores and the weighted sum."""
        scored = [t for t in tensor_inputs(node) if t in self.content and axis_of(self.info[t].axes, "c") is not None]
        if not scored:
            return
        source = self.info[scored[0]]
        if name in SOFTMAXES or name in ("aten::amax", "aten::max", "aten::logsumexp", "aten::sum", "aten::mean"):
            self.reduce_columns(node, name, info, source)
            return
        if axis_of(info.axes, "c") is None:
            raise NotRowwise("reduces over the sequence")
        others = all(t in info.operands or axis_of(self.info[t].axes, "c") is None for t in tensor_inputs(node) if t is not scored[0])
        if name in KEEP_ZEROED and source.zeroed and (name in SCALINGS or len(tensor_inputs(node)) == 1):
            info.hidden, info.zeroed = source.hidden, True
        elif name == "aten::exp" and source.hidden is not None and not source.zeroed:
            info.hidden, info.zeroed = source.hidden, True
        elif others and not source.zeroed and (name in KEEP_HIDDEN or (name in SCALINGS and positive_factor(node))):
            info.hidden = source.hidden
        added = self.mask_of(node, name, info)
        if added is not None:
            info.hidden = added if info.hidden is None else info.hidden | added

    def mask_of(self, node: fx.Node, name: str, info: Info) -> Tensor | None:
        """Columns that this op hides, if it applies a mask."""
        if name == "aten::add":
            masks = [self.hidden(p, a, None) for p, a in info.operands.items() if p.meta["val"].is_floating_point()]
            return masks[0] if masks else None
        if name == "aten::where" and node.args[0] in info.operands:
            mask, yes, no = node.args[:3]
            if self.is_minimum(no):
                return self.hidden(mask, info.operands[mask], above=False)  # type: ignore[index,arg-type]
            if self.is_minimum(yes):
                return self.hidden(mask, info.operands[mask], above=True)  # type: ignore[index,arg-type]
        if name == "aten::masked_fill" and node.args[1] in info.operands and self.is_minimum(node.args[2]):
            return self.hidden(node.args[1], info.operands[node.args[1]], above=True)  # type: ignore[index,arg-type]
        return None

    def is_minimum(self, value: Any) -> bool:
        """Whether a number or a one-element tensor is so negative that softmax makes it zero."""
        if isinstance(value, fx.Node):
            if value in self.content or value.meta["val"].numel() != 1:
                return False
            value = float(self.positions.value(value, 2))
        return isinstance(value, (int, float)) and value <= -1e4

    def reduce_columns(self, node: fx.Node, name: str, info: Info, source: Info) -> None:
        column = axis_of(source.axes, "c")
        if name in SOFTMAXES and positive(arg(node, 1, "dim"), len(source.axes)) == column:
            self.require_causal(node, source.hidden)
            info.hidden, info.zeroed = source.hidden, True
        elif axis_of(info.axes, "c") is not None:
            info.hidden, info.zeroed = source.hidden, source.zeroed
        elif name == "aten::sum" and source.zeroed:
            return
        elif name in ("aten::amax", "aten::max", "aten::logsumexp") and source.hidden is not None and not source.zeroed:
            self.require_causal(node, source.hidden)
        else:
            raise NotRowwise("reduces over the sequence without a causal mask")


HINT = "aropt needs ops that work on each position alone, or causal attention; please report the model"
BIDIRECTIONAL_HINT = "a masked-diffusion model is decoded by unmasking: try --loop unmask when your version has it"


def tensor_inputs(node: fx.Node) -> list[fx.Node]:
    """The node's tensor arguments in order, repeats kept."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return [n for n in found if isinstance(n.meta.get("val"), (Tensor, list, tuple))]


def axis_of(axes: Any, kind: str) -> int | None:
    """Index of the axis of that kind (a lone factor); None for several results or no such axis."""
    return find(axes, kind) if isinstance(axes, tuple) else None


def positive_factor(node: fx.Node) -> bool:
    """Whether a mul or div is by a positive number."""
    return len(node.args) > 1 and isinstance(node.args[1], (int, float)) and node.args[1] > 0


