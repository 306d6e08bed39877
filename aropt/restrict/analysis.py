"""The legality query of `restrict`: which axis of each value is the sequence, which ops mix rows, what masks hide.

Runs over a captured `forward(ids[B, T]) -> logits[B, T, V]`. The result says for every content node what its axes are;
each op is in the table of `rules`, or mixes rows and says how (`mixers`), or is refused by name. An append cache is
exact if no row sees a later one; the masks' tables are evaluated to find that out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir.calls import bind, draws, op_name, tensor_inputs
from aropt.restrict.dims import (
    ROW,
    Axes,
    B,
    NotRowwise,
    align,
    broadcast,
    check,
    free,
    from_sizes,
    has,
    positive,
    without,
)
from aropt.restrict.info import Hide, Info
from aropt.restrict.mixers import NotCausal, mixed, mixer_of, weighted
from aropt.restrict.moves import moved
from aropt.restrict.normalize import WHY
from aropt.restrict.positions import HINT, Positions, content_nodes, is_number, refusal
from aropt.restrict.rules import RESHAPES, pointwise, rule_for

FULL_SIZE = {"aten::cat", "aten::slice_scatter", "aten::copy"}  # line up elementwise, but don't broadcast
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
        self.masks: dict[Any, Hide | None] = {}
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
                raise refusal(node, f"{op_name(node)} {unread(node) or reason}", HINT) from None
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
            return Info(source.axes[which])
        self.check_numbers(node, name)
        mixer = mixer_of(node)
        info = mixed(self, node, mixer) if mixer else weighted(self, node)
        if info is None and self.canvas and (found := moved(node, self.info)) is not None:
            return Info(
                found[0], role="moved", ahead=found[1]
            )  # its axes may be of a length that `check` does not know
        if info is None:
            rule = rule_for(node)
            if rule is None:
                raise NotRowwise("draws random numbers" if draws(node) else "is not known to work row by row")
            info = Info(())
            info.axes = rule(self.inputs(node, info, self.beside(node, name, rule is pointwise)), self.dims(node))
        dims = self.dims(node)
        for axes, sizes in zip(info.axes, dims, strict=True) if isinstance(dims, list) else [(info.axes, dims)]:
            check(axes, sizes)
        return info

    def check_numbers(self, node: fx.Node, name: str) -> None:
        """A number that depends on the length may only be a size of a shape (`dims.check` decides if it is right)."""
        if name not in SIZED:
            for source in node.all_input_nodes:
                if source not in self.content and is_number(source):
                    self.positions.number(source)
                elif source in self.content and not isinstance(source.meta["val"], (Tensor, list, tuple)):
                    raise NotRowwise("takes a number from the tokens")

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


def unsupported(error: Exception, what: str) -> Unsupported:
    """An error of torch's shape rules as a refusal."""
    node = getattr(error, "aropt_node", None)
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    if node is None:
        return Unsupported(what=what, why=why, hint=HINT)
    return refusal(node, why, HINT, what)


def unread(node: fx.Node) -> str:
    """Why attention that is written out around a node is not known, for a refusal of it; "" if there is none."""
    queue, seen = [node], {node}
    while queue and len(seen) < 50:
        one = queue.pop(0)
        if WHY in one.meta:
            return f"is part of attention that is written out in a form that is not known: {one.meta[WHY]}"
        new = [user for user in one.users if user not in seen]
        seen |= set(new)
        queue += new
    return ""
