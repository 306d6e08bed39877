"""`aropt::scan_tree`: `aropt::scan` on the nodes of a tree.

    scan_tree(body, init, xs, extra, state, pairs) -> ys

* `body`, `init`, `xs` [B, R, ...], `extra` and `state` as of `aropt::scan`; `ys` [B, R, ...].
* The carries before node i are those after its parent, or what `init` and `state` say where it has none.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself (see
  `aropt::tree_delay`).

Nothing is known of a body, so that nodes are computed in turn, each from the carries of its parent. In ONNX it is a
Scan whose state holds the carries of all nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Cost, OpDef, onnx_scan
from aropt.kernels import scan
from aropt.kernels.tree_delay import drawn, onnx_parents, pairs_of, parents_of

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def reference(
    body: str, init: list[Tensor], xs: list[Tensor], extra: list[Tensor], state: list[Tensor], pairs: Tensor
) -> list[Tensor]:
    """The definition, node by node."""
    before, (size, rows) = scan.begin(init, state), xs[0].shape[:2]
    step = scan.parsed(body, (len(before), len(xs), len(extra)))
    batch, parents = torch.arange(size, device=pairs.device), parents_of(pairs).expand(size, -1) + 1
    kept = [x.new_zeros(rows + 1, size, *x.shape[1:]) for x in before]
    found = []
    for held, first in zip(kept, before):
        held[0] = first
    for t in range(rows):
        carry = [held[parents[:, t], batch] for held in kept]
        new = step(*carry, *(x.select(1, t) for x in xs), *extra)
        found.append(new[len(kept) :])
        for held, value in zip(kept, new):
            held[t + 1] = value
    return [torch.stack(y, 1).clone(memory_format=torch.contiguous_format) for y in zip(*found)]


def fake(
    body: str, init: list[Tensor], xs: list[Tensor], extra: list[Tensor], state: list[Tensor], pairs: Any
) -> list[Tensor]:
    return scan.fake(body, init, xs, extra, state, None)[: -len(state or init)]


def onnx(body, init, xs, extra, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    import onnx_ir as ir
    from onnxscript import opset20 as op

    carried = state[: len(init)] if init and state else state or init
    count, row, one = len(carried), scan.onnx_step(body, carried, xs, extra), op.Constant(value_ints=[1])
    sizes = op.Shape(xs[0], start=0, end=2)
    above = op.Add(op.Expand(onnx_parents(pairs), sizes), op.Constant(value_int=1))
    slots = op.Add(op.Gather(sizes, one), one)  # [1]: the nodes, and what is above the roots
    place = op.Range(op.Constant(value_int=0), op.Squeeze(slots), op.Constant(value_int=1))

    def every(value: Any, like: Any) -> Any:
        """[B, R + 1, ...] of a value [B, ...], the same at each node."""
        rank = len(like.shape)
        batch, rest = (op.Shape(value, start=i, end=j) for i, j in ((0, 1), (1, rank)))
        shape = op.Concat(batch, slots, rest, axis=0) if rank > 1 else op.Concat(batch, slots, axis=0)
        return op.Expand(op.Unsqueeze(value, one), shape)

    def step(*given: Any) -> tuple[Any, ...]:
        """The carries of all nodes, how many are done, a node of each of the xs, its parent -> the first two, ys."""
        kept, done, node, parent = given[:count], given[count], given[count + 1 : -1], given[-1]
        at, done = op.Unsqueeze(parent, one), op.Add(done, op.Constant(value_int=1))
        new = row(*(op.GatherND(held, at, batch_dims=1) for held in kept), *node)
        for i, (held, like) in enumerate(zip(kept, carried)):
            axes = [0, *range(2, len(like.shape) + 1)]
            own = op.Unsqueeze(op.Equal(place, done), op.Constant(value_ints=axes))
            new[i] = op.Where(own, op.Unsqueeze(new[i], one), held)
        return (*new[:count], done, *new[count:])

    kept = [every(value, like) for value, like in zip(scan.onnx_begin(init, state), carried)]
    states = [*kept, op.Constant(value_int=0)]
    kinds = [*(c.dtype for c in carried), ir.DataType.INT64, *(x.dtype for x in xs), ir.DataType.INT64]
    return onnx_scan(step, states, [*xs, above], 1, 1, kinds)[count + 1 :]


def cost(body: str, init: Any, xs: list[Tensor], extra: Any, state: Any, pairs: Tensor) -> Cost:
    """That of the rows, one after the other, and the pairs."""
    rows = scan.cost(body, init, xs, extra, state, None)
    return Cost(rows.flops, rows.bytes + pairs.nbytes)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One node and several, from initial carries, from earlier rows or from either."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        *args, _ = draw(scan.samples(None if like is None else (*like[:-1], None)))
        return *args, pairs_of(drawn(draw, *args[2][0].shape[:2]))

    return build()


OP = OpDef(
    name="scan_tree",
    schema="(str body, Tensor[] init, Tensor[] xs, Tensor[] extra, Tensor[] state, Tensor pairs) -> Tensor[]",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    calls=lambda body, init, xs, extra, state, pairs: scan.calls(body, init, xs, extra, state, None),
    inside=scan.inside,
    fixed=scan.OP.fixed,
    tolerance=scan.OP.tolerance,
)
