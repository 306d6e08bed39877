"""The kernels of recurrent mixers on the rows of sequences: longer than a tile, padded, and in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aropt.ir.opdef import OpDef
from tests.support.op_models import assert_matches
from tests.support.trees import INTERPRET, RECURRENT, Args, every_op, mixer, names, placed, rows_axis, wide


def sequences(op: OpDef, rows: int, padded: bool) -> Args:
    """Two sequences, larger than a kernel's tiles in each axis; padded, one has padding before its rows and after."""
    *args, _ = wide(mixer(op).tree, rows)
    positions = torch.arange(rows).repeat(2, 1)
    positions[0] = torch.where((positions[0] < rows // 9) | (positions[0] >= rows - rows // 7), -1, positions[0])
    return (*args, positions if padded else None)


def piece(op: OpDef, args: Args, start: int, end: int) -> Args:
    """These rows of the arguments."""
    rows = mixer(op).rows | {mixer(op).positions: -1}
    return tuple(
        a.narrow(rows[name], start, end - start).contiguous() if name in rows and a is not None else a
        for name, a in zip(names(op), args, strict=True)
    )


def counted(op: OpDef, y: Tensor, args: Args) -> Tensor:
    """Results, without those of padding, which are any."""
    positions = args[-1]
    if positions is None:
        return y
    there = (positions >= 0).reshape(*positions.shape, *[1] * (y.dim() - 2))
    return torch.where(there.movedim(1, rows_axis(op)), y, 0.0)


@pytest.mark.parametrize(("rows", "padded"), [(1, False), (40, True)])
@every_op
def test_kernel_of_many_tiles(op: OpDef, rows: int, padded: bool) -> None:
    """Equal to the definition; and a piece after another, from the state that it left, has the bits of the whole."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("needs a GPU; test_trees does it in the interpreter")
    args, launch = placed(sequences(op, rows, padded)), op.launch
    assert launch is not None and op.supports(*args) is None
    y, *left = launch(*args)
    assert_matches(op, (y, *left), op.reference(*args))
    if rows == 1:
        return
    found, states = [], mixer(op).state
    for start, end in ((0, 23), (23, 24), (24, rows)):
        given = dict(zip(names(op), piece(op, args, start, end), strict=True))
        made, *after = launch(*given.values())
        found.append(made)
        args = tuple(dict(zip(states, after, strict=True)).get(n, a) for n, a in zip(names(op), args, strict=True))
    assert torch.equal(counted(op, torch.cat(found, rows_axis(op)), args), counted(op, y, args))
    assert all(torch.equal(a, b) for a, b in zip(after, left, strict=True))


def test_kernels_refuse_other_floats() -> None:
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    for op in RECURRENT:
        args = sequences(op, 2, False)
        halved = (a.half() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
        assert op.supports(*args) is None and "float32" in (op.supports(*halved) or "")
