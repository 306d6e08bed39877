"""What tests of trees of rows share: a mixer's arguments for the nodes of a tree, changed, cut and filled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from aropt.ir import ops
from aropt.ir.opdef import Mixer, OpDef
from aropt.kernels.tree_delay import drawn, pairs_of, parents_of

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# The arguments of aropt::scan are lists: tests/kernels/test_scan.py.
RECURRENT = [op for op in map(ops.load, ops.NAMES) if op.mixer and op.mixer.state and not op.mixer.initial]
PRODUCTS = {"ssd_tree_scan": "BC", "gdn_tree_scan": "q", "kda_tree_scan": "q"}  # in which 0 * NaN is: all but these
HUGE = {"g": -1e30, "dt": 1e30}  # decays, of which the other sign is growth
every_op = pytest.mark.parametrize("op", RECURRENT, ids=lambda op: op.name)
Args = tuple[Any, ...]


def on_samples(count: int) -> Callable[[Any], Any]:
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


def mixer(op: OpDef) -> Mixer:
    assert op.mixer is not None
    return op.mixer


def tree(op: OpDef) -> OpDef:
    return ops.load(mixer(op).tree)


def names(op: OpDef) -> list[str]:
    return [argument.name for argument in op.overload._schema.arguments]


def rows_axis(op: OpDef) -> int:
    return next(iter(mixer(op).rows.values()))


def double(args: Args) -> Args:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def changed(op: OpDef, args: Args, change: Callable[[str, Tensor, int], Tensor]) -> Args:
    """With `change(name, value, its axis of rows)` in the place of each argument of rows, but the pairs."""
    rows = mixer(op).rows
    found = [change(n, a, rows[n]) if n in rows else a for n, a in zip(names(op), args[:-1])]
    return *found, args[-1]


def single(op: OpDef, args: Args, b: int) -> Args:
    """Of one sequence of the batch."""
    held = (*mixer(op).rows, *mixer(op).state)
    found = [a[b : b + 1] if n in held and a is not None else a for n, a in zip(names(op), args[:-1])]
    return *found, args[-1][b : b + 1]


def chosen(op: OpDef, args: Args, nodes: Tensor) -> Args:
    """Of one sequence these nodes, in this order."""
    args = changed(op, args, lambda _, a, axis: a.index_select(axis, nodes))
    return *args[:-1], args[-1][:, nodes][:, :, nodes]


def filled(op: OpDef, args: Args, nodes: Tensor, value: Callable[[str], float | None]) -> Args:
    """With `value(argument)` in these nodes' rows."""

    def change(name: str, a: Tensor, axis: int) -> Tensor:
        number = value(name)
        return a if number is None else a.index_fill(axis, nodes, number)

    return changed(op, args, change)


def close(got: Tensor, want: Tensor, op: OpDef, bits: bool = False) -> None:
    """In double precision to 1e-12, in single to what the op promises."""
    rtol, atol = (1e-12, 1e-12) if want.dtype == torch.float64 else tree(op).tolerance.get(want.dtype, (0.0, 0.0))
    torch.testing.assert_close(got, want, rtol=0 if bits else rtol, atol=0 if bits else atol)


def beside(data: st.DataObject, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A node's path, the nodes of one tree that are not on it, and pairs with these hung anew."""
    count = pairs.shape[1]
    path = pairs[0, data.draw(st.integers(0, count - 1))]
    parents = parents_of(pairs)
    other = drawn(data.draw, 1, count)
    return path.nonzero()[:, 0], (~path).nonzero()[:, 0], pairs_of(torch.where(path, parents, other))


COMMITS = [op for op in RECURRENT if mixer(op).commit]
every_commit = pytest.mark.parametrize("op", COMMITS, ids=lambda op: op.name)
LONG = ("gated_delta", "kda", "selective_scan", "wkv")  # in Triton's interpreter, with 64 rows of each


def with_rows(ops: list[OpDef]) -> Any:
    """Each op with a row, some more than a tile has, and as many as kernels take."""
    slow = {(name, 64): pytest.mark.exhaustive for name in LONG}
    return pytest.mark.parametrize(
        ("op", "rows"),
        [pytest.param(op, n, id=f"{op.name}-{n}", marks=slow.get((op.name, n), ())) for op in ops for n in (1, 17, 64)],
    )


def closed(op: OpDef) -> OpDef:
    return ops.load(mixer(op).commit)


def chained(op: OpDef) -> bool:
    """Whether the op that gives the state after a path takes a chain for a tree."""
    return "pairs" in str(closed(op).schema).partition("Tensor? ")[2]


def asked(op: OpDef, args: Args, pairs: Tensor | None, leaf: Tensor) -> Args:
    """The arguments of that op; `args` are those of the op without a tree, which has a state."""
    known = dict(zip(names(op), args, strict=False)) | {"pairs": pairs, "leaf": leaf}
    return tuple(known[name] for name in names(closed(op)))


def committed(op: OpDef, args: Args, pairs: Tensor | None, leaf: Tensor) -> Tensor:
    """The state after the path to each sequence's leaf."""
    return closed(op).reference(*asked(op, args, pairs, leaf))  # type: ignore[no-any-return]


def wide(name: str, rows: int) -> Args:
    """Two trees, larger than a kernel's tiles in each axis; decays are below 1."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(2, *sizes, generator=generator)

    place = torch.arange(rows)
    parents = torch.where(place > 0, (torch.rand(2, rows, generator=generator) * place).long(), -1)
    parents[1] = torch.where(place % 5 == 3, -1, (place - 1 - place % 3).clamp(min=-1))
    pairs = pairs_of(parents)
    if name == "tree_delay":
        return normal(rows, 70), 3, normal(3, 70), pairs
    if name == "rg_lru_tree":
        return normal(rows, 300), normal(rows, 300).sigmoid(), normal(300), pairs
    if name == "wkv_tree":
        k, v, (w, u) = normal(rows, 70), normal(rows, 70), normal(70)
        return 3 * k, v, -w.exp(), u, normal(70), normal(70).exp(), normal(70), pairs
    if name == "tree_conv1d":
        return normal(70, rows), normal(70, 4)[0], normal(70)[0], normal(70, 3), pairs
    if name == "selective_tree_scan":
        a, direct = -normal(70, 20)[0].exp(), normal(70)[0]
        return (normal(70, rows), normal(70, rows).abs(), a, *(normal(20, rows) for _ in "bc"), direct,
                normal(70, 20), pairs)  # fmt: skip
    if name == "ssd_tree_scan":
        b, c, x, dt = (normal(rows, *sizes) for sizes in ((2, 35), (2, 35), (4, 37), (4,)))
        return x, dt.abs(), -normal(4)[0].abs(), b, c, normal(4)[0], normal(4, 37, 35), pairs
    q, k, v, g, beta = (normal(rows, 3, *sizes) for sizes in ((35,), (35,), (37,), (), ()))
    k = torch.nn.functional.normalize(k, dim=3)
    g = normal(rows, 3, 35) if name == "kda_tree_scan" else g
    return q, k, v, -g.abs(), beta.sigmoid(), normal(3, 35, 37), pairs


def placed(args: Args) -> Args:
    """Where a kernel runs."""
    return args if INTERPRET else tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)
