"""The state of a recurrent mixer after one path of a tree: what the path's rows leave one after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aropt.ir.opdef import OpDef
from aropt.kernels.tree_delay import on_path
from tests.support.op_models import assert_matches
from tests.support.trees import (
    COMMITS,
    HUGE,
    INTERPRET,
    Args,
    asked,
    beside,
    chained,
    chosen,
    close,
    closed,
    committed,
    double,
    every_commit,
    filled,
    mixer,
    names,
    on_samples,
    placed,
    single,
    tree,
    wide,
    with_rows,
)


def left(op: OpDef, args: Args, path: Tensor) -> Tensor:
    """The state that rows of one sequence leave one after the other, by the op without a tree."""
    if not len(path):
        return args[names(op).index(mixer(op).state[0])]  # type: ignore[no-any-return]
    return op.reference(*chosen(op, args, path)[:-1], None)[1]  # type: ignore[no-any-return]


def test_states_after_paths_are_closed_forms_of_three() -> None:
    assert [mixer(op).commit for op in COMMITS] == ["conv1d_commit", "gdn_commit", "ssd_commit"]
    assert all(len(mixer(op).state) == 1 for op in COMMITS)


@every_commit
@on_samples(40)
@given(data=st.data())
def test_the_state_after_a_path(op: OpDef, data: st.DataObject) -> None:
    """Is what the path's rows leave, of any node, and the state itself of none; a chain needs no pairs."""
    args = double(data.draw(tree(op).samples().filter(lambda a: a[-2] is not None)))
    batch, count = args[-1].shape[0], args[-1].shape[1]
    leaf = torch.tensor([data.draw(st.integers(-1, count - 1)) for _ in range(batch)])
    got = committed(op, args, args[-1], leaf)
    for b, node in enumerate(leaf.tolist()):
        one = single(op, args, b)
        path = one[-1][0, node].nonzero()[:, 0] if node >= 0 else torch.tensor([], dtype=torch.int64)
        close(got[b : b + 1], left(op, one, path), op)
        if chained(op):
            line = committed(op, one, None, leaf[b : b + 1])
            close(line, left(op, one, torch.arange(node + 1)), op)


@every_commit
@on_samples(20)
@given(data=st.data())
def test_nodes_beside_a_path_leave_its_state_alone(op: OpDef, data: st.DataObject) -> None:
    args = double(single(op, data.draw(tree(op).samples().filter(lambda a: a[-2] is not None)), 0))
    path, others, pairs = beside(data, args[-1])
    leaf = path[-1:]
    want = committed(op, args, args[-1], leaf)
    got = committed(op, filled(op, args, others, lambda name: HUGE.get(name, 1e30)), pairs, leaf)
    close(got, want, op)


@with_rows(COMMITS)
def test_kernel_of_many_tiles_after_a_path(op: OpDef, rows: int) -> None:
    """Equal to the definition; what is beside a path leaves its bits alone, and no path those of the state."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("needs a GPU; `test_kernels_in_the_interpreter` does it on the CPU")
    args, launch, leaf = wide(mixer(op).tree, rows), closed(op).launch, torch.tensor([rows * 3 // 4, -1])
    at = names(op).index(mixer(op).state[0])
    args[at][1, 0, 0] = -0.0  # to which adding zero would make a difference
    for pairs in [args[-1], args[-1][:1], *[None] * chained(op)]:
        found = placed(asked(op, args, pairs, leaf))
        assert launch is not None and closed(op).supports(*found) is None
        got = launch(*found)
        assert_matches(closed(op), got, closed(op).reference(*found))
        assert torch.equal(got[1].cpu().view(torch.int32), args[at][1].view(torch.int32))
        others = list(filled(op, args, (~on_path(pairs, leaf, rows)[0]).nonzero()[:, 0], lambda _: torch.nan))
        others[at] = torch.stack([args[at][0], torch.full_like(args[at][1], torch.nan)])
        again = launch(*placed(asked(op, tuple(others), pairs, leaf))).cpu()
        want = torch.stack([got[0].cpu(), others[at][1]])
        assert torch.equal(again.view(torch.int32), want.view(torch.int32))
