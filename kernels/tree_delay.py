"""`aropt::tree_delay`: `aropt::delay` on the nodes of a tree, each as its ancestor some steps above was.

    tree_delay(x, rows, state, pairs) -> y

* `x` [B, R, F]: y[:, t] is x of the ancestor `rows` steps above node t; above the roots lie the rows of `state`.
* `state` [B, rows, F]: the rows before the roots, the latest last; None: zeros.
* `pairs` bool [B, R, R], or [1, R, R] of all sequences: whether node j is an ancestor of node i, or i itself. A node
  comes after its ancestors: its parent is the last of them. A node that has none goes on from `state`, as several may.

What the tree forms of all mixers share is here too: trees as parents and as pairs, and random ones; and what their
kernels do alike, which hold all nodes of a tree at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aropt.ir.opdef import Aot, Cost, OpDef, onnx_scan
from aropt.kernels import delay

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LARGEST = 64  # nodes that a kernel holds
FEATURES = 32  # of a program
POWERS = [float(2**i) for i in range(21)]  # of trees with fewer nodes, where an ONNX graph is for any number


def pairs_of(parents: Tensor) -> Tensor:
    """bool [B, R, R] from int64 [B, R]: each node's parent, which comes before it, or -1."""
    rows = parents.shape[1]
    place = torch.arange(rows, device=parents.device)
    pairs = (parents.unsqueeze(2) == place) | (place.unsqueeze(1) == place)
    for _ in range((rows - 1).bit_length()):  # what is seen from there is seen from here: twice as far each time
        pairs = pairs.float() @ pairs.float() > 0
    return pairs


def parents_of(pairs: Tensor) -> Tensor:
    """int64 [B, R]: the last node that is an ancestor of each, or -1."""
    place = torch.arange(pairs.shape[1], device=pairs.device)
    return torch.where(pairs & (place.unsqueeze(1) != place), place, -1).amax(2)


def above(pairs: Tensor, kept: int, steps: int) -> Tensor:
    """int64 [B, R]: where, behind `kept` rows of a state, the node is that lies so many steps above each."""
    depth = pairs.sum(2) - 1
    wanted = depth - steps
    found = (pairs & (depth.unsqueeze(1) == wanted.unsqueeze(2))).int().argmax(2)
    return kept + torch.where(wanted >= 0, found, wanted)


def on_path(pairs: Tensor | None, leaf: Tensor, rows: int) -> Tensor:
    """bool [B, R]: a leaf and what is above it; nothing of leaf -1. Without pairs each node is above the next."""
    place = torch.arange(rows, device=leaf.device)
    if pairs is None:
        return place <= leaf.unsqueeze(1)
    found = pairs.expand(leaf.shape[0], -1, -1).gather(1, leaf.clamp(min=0).reshape(-1, 1, 1).expand(-1, 1, rows))
    return found.squeeze(1) & (leaf >= 0).unsqueeze(1)


def reference(x: Tensor, rows: int, state: Tensor | None, pairs: Tensor) -> Tensor:
    """The definition."""
    state = x.new_zeros(x.shape[0], rows, x.shape[2]) if state is None else state
    place = above(pairs, rows, rows).unsqueeze(2).expand(x.shape[0], -1, x.shape[2])
    return torch.cat([state, x], 1).gather(1, place)


def fake(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def onnx_parents(pairs: Any) -> Any:
    """`parents_of` in standard ONNX ops."""
    from onnxscript import opset20 as op

    one, zero = op.Constant(value_int=1), op.Constant(value_int=0)
    place = op.Range(zero, op.Squeeze(op.Shape(pairs, start=1, end=2)), one)
    strict = op.And(pairs, op.Less(place, op.Unsqueeze(place, op.Constant(value_ints=[1]))))
    return op.ReduceMax(op.Where(strict, place, op.Constant(value_int=-1)), op.Constant(value_ints=[2]), keepdims=0)


def onnx_above(pairs: Any, kept: int, steps: Sequence[int]) -> Any:
    """`above` in standard ONNX ops, int64 [B, R, S] for each of S numbers of steps."""
    from onnxscript import opset20 as op

    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    depth = op.Sub(op.ReduceSum(op.Cast(pairs, to=7), ints(2), keepdims=0), ints(1))
    wanted = op.Sub(op.Unsqueeze(depth, ints(2)), ints(*steps))  # [B, R, S]
    there = op.Equal(op.Unsqueeze(wanted, ints(3)), op.Unsqueeze(depth, ints(1, 2)))
    there = op.Cast(op.And(there, op.Unsqueeze(pairs, ints(2))), to=6)  # [B, R, S, R]
    found = op.ArgMax(there, axis=3, keepdims=0)
    return op.Add(op.Where(op.GreaterOrEqual(wanted, ints(0)), found, wanted), ints(kept))


def onnx_on_path(pairs: Any, leaf: Any, x: Any) -> tuple[Any, Any]:
    """`on_path` in standard ONNX ops, and fp32 [B, R, 1] that is 1 at the leaf; x has its rows at axis 1."""
    from onnxscript import opset20 as op

    place = op.Range(op.Constant(value_int=0), op.Squeeze(op.Shape(x, start=1, end=2)), op.Constant(value_int=1))
    last = op.Unsqueeze(leaf, op.Constant(value_ints=[1]))
    alone = op.Cast(op.Equal(place, last), to=1)
    if pairs is None:
        return op.LessOrEqual(place, last), op.Unsqueeze(alone, op.Constant(value_ints=[2]))
    row = op.MatMul(op.Unsqueeze(alone, op.Constant(value_ints=[1])), op.Cast(pairs, to=1))
    path = op.Cast(op.Squeeze(row, op.Constant(value_ints=[1])), to=9)
    return path, op.Unsqueeze(alone, op.Constant(value_ints=[2]))


def onnx_taken(rows: Any, place: Any, pairs: Any) -> Any:
    """[B, .., F] in ONNX: the rows [B, N, F] at places int64 [B, ..], or [1, ..] where the pairs are [1, R, R]."""
    from onnxscript import opset20 as op

    if pairs.shape[0] == 1:  # of a tree that is always the same, places are constants
        return op.Gather(rows, op.Squeeze(place, op.Constant(value_ints=[0])), axis=1)
    return op.GatherND(rows, op.Unsqueeze(place, op.Constant(value_ints=[-1])), batch_dims=1)


def onnx_doubled(x: Any, axis: int, states: Sequence[Any], double: Callable[..., tuple[Any, ...]], more: int) -> Any:
    """In an ONNX translation: the states after `double(*states, n)` for n = 1, 2, 4, .. below the rows of x + `more`.

    n and the states are fp32. Where the graph is for any number of rows, a Scan does it.
    """
    from onnxscript import opset20 as op

    rows = x.shape[axis]
    if isinstance(rows, int):
        for n in POWERS[: (rows + more - 1).bit_length()]:
            states = double(*states, op.Constant(value_float=n))
        return states
    count = op.Add(op.Shape(x, start=axis, end=axis + 1), op.Constant(value_ints=[more]))
    below = op.Cast(op.Less(op.Constant(value_floats=POWERS), op.Cast(count, to=1)), to=7)
    ends = op.Max(op.ReduceSum(below, op.Constant(value_ints=[0]), keepdims=1), op.Constant(value_ints=[1]))
    sizes = op.Slice(op.Constant(value_floats=POWERS), op.Constant(value_ints=[0]), ends)
    return onnx_scan(double, list(states), [sizes], 0, 0)


def onnx(x, rows, state, pairs):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops."""
    from onnxscript import opset20 as op

    if state is None:
        shape = op.Concat(op.Shape(x, start=0, end=1), op.Constant(value_ints=[rows]), op.Shape(x, start=2), axis=0)
        state = op.Expand(op.CastLike(op.Constant(value_float=0.0), x), shape)
    place = op.Squeeze(onnx_above(pairs, rows, [rows]), op.Constant(value_ints=[2]))
    return onnx_taken(op.Concat(state, x, axis=1), place, pairs)


if HAS_TRITON:

    @triton.jit
    def seen(pairs_ptr, rows, ROWS: tl.constexpr, TURNED: tl.constexpr):  # type: ignore[no-untyped-def]
        """A tree's pairs [ROWS, ROWS], False outside of it; `TURNED`: their transpose."""
        one, other = tl.arange(0, ROWS)[:, None], tl.arange(0, ROWS)[None, :]
        at = other * rows + one if TURNED else one * rows + other
        return tl.load(pairs_ptr + at, mask=(one < rows) & (other < rows), other=0) != 0

    @triton.jit
    def climbed(pairs_ptr, leaf, rows, ROWS: tl.constexpr, TREE: tl.constexpr):  # type: ignore[no-untyped-def]
        """`on_path` [ROWS] of one leaf, from a tree's pairs; without `TREE`, of a chain."""
        row = tl.arange(0, ROWS)
        path = row <= leaf
        if TREE:  # a node comes after its ancestors
            path = tl.load(pairs_ptr + leaf * rows + row, mask=path, other=0) != 0
        return path

    @triton.jit
    def parents_in(pairs_ptr, rows, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
        """`parents_of` [ROWS] of a tree's pairs."""
        row = tl.arange(0, ROWS)
        strict = seen(pairs_ptr, rows, ROWS, False) & (row[None, :] < row[:, None])
        return tl.max(tl.where(strict, row[None, :], -1), 1)

    @triton.jit
    def _tree_delay_kernel(  # type: ignore[no-untyped-def]
        x_ptr, state_ptr, pairs_ptr, out_ptr, rows, steps, size,
        GIVEN: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    ):  # fmt: skip
        """One program for `SIZE` features of a tree; each node's row is read where its ancestor is."""
        batch, row = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
        column = (tl.program_id(1) * SIZE + tl.arange(0, SIZE))[None, :]
        inside = (row < rows)[:, None] & (column < size)
        pairs_ptr += batch * rows * rows
        sees = seen(pairs_ptr, rows, ROWS, False)  # [nodes, ancestors]
        wanted = tl.sum(sees.to(tl.int32), 1) - 1 - steps
        higher = tl.sum(seen(pairs_ptr, rows, ROWS, True).to(tl.int32), 0) - 1  # depths along the other axis
        found = tl.max(tl.where(sees & (higher[None, :] == wanted[:, None]), row[None, :], 0), 1)
        above = (wanted >= 0)[:, None]
        x = tl.load(x_ptr + (batch * rows + found[:, None]) * size + column, mask=inside & above, other=0.0)
        if GIVEN:
            before = state_ptr + (batch * steps + steps + wanted[:, None]) * size + column
            x = tl.where(above, x, tl.load(before, mask=inside & (above == 0), other=0.0))
        tl.store(out_ptr + (batch * rows + row[:, None]) * size + column, x, mask=inside)


def supports(*given: Any) -> str | None:
    """Why the kernel can't run, or None."""
    return refused(given)


def launch(x: Tensor, rows: int, state: Tensor | None, pairs: Tensor) -> Tensor:
    """Runs the Triton kernel: a program for some features of a tree."""
    out, (batch, nodes, size) = fake(x), x.shape
    if out.numel():
        given = [out if t is None else t.contiguous() for t in (x, state, shared(pairs, batch))]
        held, grid = {"ROWS": tile(nodes), "SIZE": FEATURES}, (batch, triton.cdiv(size, FEATURES))
        flags = {"GIVEN": state is not None, "num_warps": warps(held["ROWS"])}
        _tree_delay_kernel[grid](*given, out, nodes, rows, size, **held, **flags)
    return out


def aot() -> Sequence[Aot]:
    """Trees of each size."""
    return sized(
        _tree_delay_kernel, ["*fp32", "*fp32", "*i1", "*fp32", *["i32"] * 3], {"GIVEN": True, "SIZE": FEATURES}
    )


def sized(kernel: Any, types: Sequence[str], constants: dict[str, Any], **more: Any) -> list[Aot]:
    """A kernel for trees of each size, from the types of what is no constexpr."""
    return [delay.compiled(kernel, types, {**constants, "ROWS": n}, warps(n), **more) for n in (16, 32, LARGEST)]


def shared(pairs: Tensor, batch: int) -> Tensor:
    """The pairs of each sequence, as kernels read them."""
    return pairs.expand(batch, -1, -1).contiguous()


def refused(given: Sequence[Any], rows: int | None = None) -> str | None:
    """Why a kernel for trees can't take these arguments, or None; pairs come last where `rows` don't say the nodes."""
    many = (given[-1].shape[1] if rows is None else rows) > LARGEST
    return f"a kernel holds {LARGEST} nodes" if many else delay.refused(given)


def tile(size: int, most: int = LARGEST) -> int:
    """The power of two that holds the size, within what a kernel multiplies and holds."""
    return min(most, max(16, 1 << (size - 1).bit_length()))


def warps(rows: int) -> int:
    """Of a program, so that a tree's pairs stay in registers."""
    return 4 if rows < LARGEST else 8


def cost(x: Tensor, rows: int, state: Any, pairs: Tensor) -> Cost:
    """Rows in and out, the state and the pairs."""
    return Cost(0.0, 2.0 * x.nbytes + 1.0 * rows * x[:, 0].nbytes + pairs.nbytes)


def drawn(draw: Any, batch: int, rows: int) -> Tensor:
    """Parents int64 [B, R] for samples: chains, stars, bushes, chains with twigs and forests, or one node."""
    from hypothesis import strategies as st

    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    place, chance = torch.arange(rows), torch.rand(3, batch, rows, generator=generator)
    bush = (chance[0] * place).long()
    kinds = {
        "chain": place - 1,
        "star": place * 0,
        "bush": bush,
        "twigs": (place - 1 - (chance[1] * 3).long()).clamp(min=0),
        "forest": torch.where(chance[2] < 0.3, -1, bush),
    }
    chosen = [draw(st.sampled_from(sorted(kinds))) for _ in range(batch)]
    parents = torch.stack([kinds[kind].expand(batch, -1)[i] for i, kind in enumerate(chosen)])
    return torch.where(place > 0, parents, -1)


def on_trees(samples: Callable[..., Any], axis: int, like: tuple[Any, ...] | None) -> SearchStrategy[tuple[Any, ...]]:
    """The samples of a mixer with pairs in the place of its positions; `axis`: that of rows in its first argument."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        *args, _ = draw(samples(None if like is None else (*like[:-1], None)))
        return *args, pairs_of(drawn(draw, args[0].shape[0], args[0].shape[axis]))

    return build()


def leaves(draw: Any, batch: int, rows: int) -> Tensor:
    """int64 [B] for samples: nodes, and none."""
    from hypothesis import strategies as st

    return torch.tensor([draw(st.integers(-1, rows - 1)) for _ in range(batch)])


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """Fewer nodes above than the delay and more, from a state or from nothing."""
    return on_trees(delay.samples, 1, like)


OP = OpDef(
    name="tree_delay",
    schema="(Tensor x, int rows, Tensor? state, Tensor pairs) -> Tensor",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    launch=launch,
    supports=supports,
    aot=aot,
    fixed={"state": (1,)},
)
