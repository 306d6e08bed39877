"""The legality query of `restrict`: which axis of each value is the sequence, which ops mix rows, what masks hide.

Runs over a captured `forward(ids[B, T]) -> logits[B, T, V]`. The result says for every content node what its axes are;
each op is in the table of `rules`, or is one of attention's products (written out or SDPA), or is refused by name.
An append cache is exact if no row sees a later one; the masks' tables are evaluated to find that out (see `bounds`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir.calls import bind, draws, op_name, tensor_inputs
from aropt.restrict.bounds import (
    FRESH,
    Bias,
    Hide,
    NotCausal,
    Operand,
    Scores,
    bias_of,
    column_reduction,
    transfer,
    use_of,
)  # fmt: skip
from aropt.restrict.dims import (
    COLUMN,
    ROW,
    Axes,
    B,
    NotRowwise,
    align,
    broadcast,
    check,
    count,
    find,
    free,
    from_sizes,
    has,
    positive,
    without,
)
from aropt.restrict.info import Info
from aropt.restrict.mixers import SDPA, mixed, mixer_of
from aropt.restrict.moves import moved
from aropt.restrict.positions import HINT, Positions, content_nodes, is_number, refusal
from aropt.restrict.rules import RESHAPES, named_axes, pointwise, rule_for

PRODUCTS = {"aten::matmul", "aten::bmm"}
REDUCTIONS = {"aten::softmax", "aten::_softmax", "aten::amax", "aten::max", "aten::logsumexp", "aten::sum"}
FULL_SIZE = {"aten::cat", "aten::slice_scatter", "aten::copy"}  # line up elementwise, but don't broadcast
SOFTMAX = {"aten::softmax", "aten::_softmax"}
SIZED = RESHAPES | {"aten::repeat_interleave"}  # their size arguments are written anew
BIDIRECTIONAL = "this model is bidirectional; it can't be decoded one token at a time"
BIDIRECTIONAL_HINT = "a masked-diffusion model is decoded by unmasking: try --loop unmask"


class Analysis:
    """Classifies every content node of a captured forward. Raises Unsupported with node, op and module path."""

    def __init__(
        self,
        graph: fx.Graph,
        weights: Mapping[str, Tensor],
        names: Mapping[Any, str],
        capacity: int,
        canvas: bool = False,
        never: Sequence[int] = (),
    ) -> None:
        self.graph, self.canvas = graph, canvas  # a canvas: rows may see later ones
        self.positions = Positions(weights, names, capacity, never)
        self.content = content_nodes(graph, names, never)
        self.biases: dict[Any, Bias] = {}
        self.causal = Hide(torch.ones(capacity, capacity, dtype=torch.bool).triu(1), False)
        self.nothing = Hide(torch.zeros(capacity, capacity, dtype=torch.bool), False)
        self.info: dict[fx.Node, Info] = {}
        for node in graph.nodes:
            if node not in self.content:
                continue
            try:
                if node.op == "output":
                    self.require_rows(node)
                else:
                    self.info[node] = self.classify(node)
            except NotCausal as reason:
                raise refusal(node, f"{op_name(node)} {reason}", BIDIRECTIONAL_HINT, BIDIRECTIONAL) from None
            except NotRowwise as reason:
                raise refusal(node, f"{op_name(node)} {reason}", HINT) from None
            except (IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as reason:
                raise refusal(node, f"{op_name(node)} has a form that is not known: {reason!r}", HINT) from reason

    def require_rows(self, output: fx.Node) -> None:
        """The logits must be [B, T, vocabulary]."""
        logits = output.all_input_nodes[0]
        axes: Axes = self.info[logits].axes if logits in self.info else ()
        if len(axes) < 3 or axes[:2] != (B, ROW) or any(has(axis, "brc?") for axis in axes[2:]):
            raise NotRowwise("returns something other than one row of logits for each token")

    def dims(self, node: fx.Node) -> Any:
        """The node's dims: a tuple, or a list of tuples for several results."""
        value = node.meta["val"]
        if isinstance(value, (list, tuple)):
            return [self.positions.dims(node, v) for v in value]
        return self.positions.dims(node)

    # --- one node --------------------------------------------------------------------------------------------------

    def classify(self, node: fx.Node) -> Info:
        if node.op == "placeholder":
            return Info((B, ROW, *(free(d) for d in self.dims(node)[2:])))  # ids, or values of each row
        name = op_name(node)
        if name == "getitem":
            of, which = bind(node).values()
            source = self.info[of]
            return Info(source.axes[which], source.scores, source.range)
        self.check_numbers(node, name)
        mixer = mixer_of(node)
        info = mixed(self, node, mixer) if mixer else self.product(node) if name in PRODUCTS else None
        if info is None and self.canvas and (found := moved(node, self.info)) is not None:
            return Info(
                found[0], role="moved", ahead=found[1]
            )  # its axes may be of a length that `check` does not know
        if info is None:
            rule = rule_for(node)
            if rule is None:
                raise NotRowwise("draws random numbers" if draws(node) else "is not known to work row by row")
            info = Info(())
            bound = self.inputs(node, info, self.beside(node, name, rule is pointwise))
            if name in REDUCTIONS and self.over_columns(node, bound, info):
                pass
            else:
                info.axes = rule(bound, self.dims(node))
                self.follow_scores(node, info)
        dims = self.dims(node)
        for axes, sizes in zip(info.axes, dims, strict=True) if isinstance(dims, list) else [(info.axes, dims)]:
            check(axes, sizes)
        return info

    def check_numbers(self, node: fx.Node, name: str) -> None:
        """A number that depends on the length may only be a size of a shape (`dims.check` decides if it is right)."""
        if name not in SIZED and not (name == "aten::slice" and self.drops_columns(node)):
            for source in node.all_input_nodes:
                if source not in self.content and is_number(source):
                    self.positions.number(source)
                elif source in self.content and not isinstance(source.meta["val"], (Tensor, list, tuple)):
                    raise NotRowwise("takes a number from the tokens")

    def drops_columns(self, node: fx.Node) -> bool:
        """Whether a slice is along the columns (`rules.slice_` then decides if it is right)."""
        x = bind(node)
        return has(self.info[x["self"]].axes[x["dim"]], "c")

    def beside(self, node: fx.Node, name: str, elementwise: bool) -> Axes | None:
        """The axes with which position operands line up; None for an op that is not elementwise."""
        known = [self.info[t].axes for t in tensor_inputs(node) if t in self.content]
        if elementwise:
            return broadcast(known)
        if name in FULL_SIZE:
            along = bind(node).get("dim")
            return broadcast([a if along is None else without(a, positive(along, len(a))) for a in known])
        return None

    def inputs(self, node: fx.Node, info: Info, beside: Axes | None) -> dict[str, Any]:
        """The bound arguments with tensors given by their axes; records the position operands."""

        def axes_of(source: fx.Node) -> Any:
            if source in self.content:
                return self.info[source].axes
            if is_number(source):
                return source
            dims = self.positions.dims(source)
            if beside is None and any(isinstance(d, str) for d in dims):
                raise NotRowwise(f"uses a value of shape {list(dims)} in a way that is not elementwise")
            axes = info.operands[source] = from_sizes(dims) if beside is None else align(dims, beside)
            return axes

        return dict(fx.node.map_arg(bind(node), axes_of))

    # --- scores ----------------------------------------------------------------------------------------------------

    def operand(self, node: fx.Node, source: fx.Node, info: Info) -> Operand:
        """What is known of an operand's values; records the operands that hide entries."""
        if source in self.content:
            facts = self.info[source]
            return facts.range if facts.scores is None else facts.scores
        axes = info.operands[source]
        row, column = find(axes, "r"), find(axes, "c")
        table = self.positions.value(source, self.positions.capacity)
        if row is None or column is None:
            return (float(table.min()), float(table.max())) if table.numel() else (0.0, 0.0)
        if op_name(node) == SDPA:
            use = "no" if table.dtype == torch.bool else "add"
        else:
            scored = [t for t in tensor_inputs(node) if t in self.info and self.info[t].scores is not None]
            use = use_of(node, source, scored)
        key = (source, row, column, use)
        if key not in self.biases:
            self.biases[key] = bias_of(table, row, column, use)
        bias = self.biases[key]
        if bias.hide is not None:
            info.hides[source] = bias.hide
        return bias

    def follow_scores(self, node: fx.Node, info: Info) -> None:
        """Carries scores through an op that keeps columns; an op that loses them otherwise has no rule."""
        sources = list(dict.fromkeys(tensor_inputs(node)))
        if not any(s in self.content and self.info[s].scores is not None for s in sources):
            return
        several = isinstance(info.axes, list)
        if op_name(node) == "aten::slice" and not count(info.axes, "c"):
            info.range = self.info[sources[0]].scores.seen  # type: ignore[union-attr]  # appended columns alone
            return
        if any(not any(has(a, "c") for a in axes) for axes in (info.axes if several else [info.axes])):
            raise NotRowwise("reduces along the sequence")
        info.scores = transfer(node, {s: self.operand(node, s, info) for s in sources})

    def over_columns(self, node: fx.Node, bound: Mapping[str, Any], info: Info) -> bool:
        """A softmax or reduction over columns. False: over other axes."""
        axes, over = bound["self"], named_axes(bound)
        column = next((i for i in over if has(axes[i], "c")), None)
        if column is None:
            return False
        source = self.info[bind(node)["self"]].scores
        if len(over) > 1 or source is None or len(axes[column]) > 1:
            raise NotRowwise("reduces or sorts along the sequence")
        if self.canvas and source.hidden is None and op_name(node) in SOFTMAX:
            info.hides[node] = self.nothing
            info.scores, info.axes = Scores(self.nothing.entries, (0.0, 0.0), (0.0, 1.0), (0.0, 1.0)), axes
            return True
        info.scores, info.range = column_reduction(node, source, self.positions.capacity, self.canvas)
        if info.scores is not None:
            info.axes = axes
            return True
        kept = without(axes, column) if bound.get("keepdim") else (*axes[:column], *axes[column + 1 :])
        several = isinstance(node.meta["val"], (tuple, list))
        info.axes = [kept, kept] if several else kept
        if several and any(user.args[1] != 0 for user in node.users):
            raise NotRowwise("takes the index of a column")
        return True

    # --- attention -----------------------------------------------------------------------------------------------

    def product(self, node: fx.Node) -> Info | None:
        """q k^T and p v: the two products of written-out attention. None: an ordinary product."""
        first, second = tensor_inputs(node)
        if first not in self.content or second not in self.content:
            return None
        left, right = self.info[first].axes, self.info[second].axes
        if len(left) < 2 or len(right) < 2:
            return None
        lead = broadcast([left[:-2], right[:-2]])
        rows = count(left[-2:-1], "r") == 1 and not has(left[-2], "cb")  # of one head, or of several that share keys
        if rows and right[-1] == ROW and not has(left[-1], "rcb") and not has(right[-2], "rcb"):
            return Info((*lead, left[-2], COLUMN), FRESH, role="score")
        if left[-1] == COLUMN and right[-2] == ROW and not has(right[-1], "rcb"):
            weights, info = self.info[first].scores, Info((*lead, left[-2], right[-1]), role="mix")
            if self.canvas and weights is not None and weights.hidden is None:
                info.hides[node] = self.nothing
            elif weights is None or not weights.is_zeroed(self.canvas):
                raise NotCausal("sums over the sequence with weights that no causal mask has zeroed")
            return info
        return None


def unsupported(error: Exception, what: str) -> Unsupported:
    """An error of torch's shape rules as a refusal."""
    node = getattr(error, "aropt_node", None)
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if node is None:
        return Unsupported(what=what, why=why, hint=HINT)
    return refusal(node, why, HINT, what)
