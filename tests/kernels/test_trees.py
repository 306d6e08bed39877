"""The tree forms of the recurrent mixers: a node's row is what its path alone gives, whatever else is in the tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aropt.ir import ops
from aropt.ir.opdef import OpDef
from aropt.kernels.tree_delay import drawn, pairs_of, parents_of
from tests.support.op_models import Call, assert_matches, free, symbolic
from tests.support.trees import (
    COMMITS,
    HUGE,
    INTERPRET,
    PRODUCTS,
    RECURRENT,
    Args,
    asked,
    beside,
    chained,
    changed,
    chosen,
    close,
    closed,
    committed,
    double,
    every_op,
    filled,
    mixer,
    names,
    on_samples,
    placed,
    rows_axis,
    single,
    tree,
    wide,
    with_rows,
)

STEPPED = {"tree_delay", "rg_lru_tree", "selective_tree_scan"}  # of the bits that steps give


def alone(op: OpDef, args: Args, node: int) -> Tensor:
    """The row of one sequence's node as its path gives it without a tree."""
    path = chosen(op, args, args[-1][0, node].nonzero()[:, 0])
    return op.reference(*path[:-1], None)[0].select(rows_axis(op), -1)  # type: ignore[no-any-return]


def stepped(op: OpDef, args: Args, node: int) -> Tensor:
    """As `alone`, one row a call, each from the state that the one before it leaves."""
    y, carried = Tensor(), {}
    for t in args[-1][0, node].nonzero()[:, 0]:
        row = dict(zip(names(op), chosen(op, args, t.reshape(1))))
        y, *left = op.reference(*(row | carried | {mixer(op).positions: None}).values())
        carried = dict(zip(mixer(op).state, left, strict=True))
    return y.select(rows_axis(op), 0)


def assert_paths(op: OpDef, args: Args, bits: bool = False, by: Callable[[OpDef, Args, int], Tensor] = alone) -> None:
    """Every node of small trees, every seventh of large ones."""
    got, count = tree(op).reference(*args), args[-1].shape[1]
    for b in range(args[-1].shape[0]):
        one = single(op, args, b)
        for node in range(0, count, 1 if count < 10 else 7):
            close(got[b : b + 1].select(rows_axis(op), node), by(op, one, node), op, bits)


def test_every_recurrent_op_has_a_tree_form() -> None:
    """With the same arguments, but for the last, and one result."""
    assert len(RECURRENT) == 8
    for op in RECURRENT:
        *one, positions = op.overload._schema.arguments
        *other, pairs = tree(op).overload._schema.arguments
        assert positions.name == mixer(op).positions and (pairs.name, str(pairs.type)) == ("pairs", "Tensor")
        assert [(a.name, str(a.type)) for a in one] == [(a.name, str(a.type)) for a in other]
        assert len(tree(op).overload._schema.returns) == 1


@on_samples(200)
@given(data=st.data())
def test_parents_are_pairs(data: st.DataObject) -> None:
    """There and back; pairs are the parent's and the node itself."""
    parents = drawn(data.draw, data.draw(st.integers(1, 3)), data.draw(st.integers(1, 70)))
    pairs = pairs_of(parents)
    assert pairs.dtype == torch.bool and torch.equal(parents_of(pairs), parents)
    for b, row in enumerate(parents.tolist()):
        for i, parent in enumerate(row):
            want = {i} | (set(pairs[b, parent].nonzero()[:, 0].tolist()) if parent >= 0 else set())
            assert parent < i and set(pairs[b, i].nonzero()[:, 0].tolist()) == want


@every_op
@on_samples(25)
@given(data=st.data())
def test_nodes_equal_their_paths(op: OpDef, data: st.DataObject) -> None:
    args = data.draw(tree(op).samples())
    assert_paths(op, args)
    assert_paths(op, double(args))


@pytest.mark.parametrize("op", [op for op in RECURRENT if mixer(op).tree in STEPPED], ids=lambda op: op.name)
@on_samples(25)
@given(data=st.data())
def test_nodes_have_the_bits_of_steps(op: OpDef, data: st.DataObject) -> None:
    assert_paths(op, data.draw(tree(op).samples()), bits=True, by=stepped)


@every_op
@on_samples(15)
@given(data=st.data())
def test_a_chain_is_a_sequence(op: OpDef, data: st.DataObject) -> None:
    *args, pairs = data.draw(tree(op).samples())
    chain = torch.ones_like(pairs).tril()
    for given_args in (tuple(args), double(tuple(args))):
        want = op.reference(*given_args, None)[0]
        close(tree(op).reference(*given_args, chain), want, op)


def reordered(pairs: Tensor, draw: Any) -> Tensor:
    """Nodes of one tree in another order, each behind its parent."""
    parents = parents_of(pairs)[0].tolist()
    order: list[int] = []
    while len(order) < len(parents):
        ready = [i for i, p in enumerate(parents) if i not in order and (p < 0 or p in order)]
        order.append(draw(st.sampled_from(ready)))
    return torch.tensor(order)


@every_op
@on_samples(15)
@given(data=st.data())
def test_another_order_of_nodes_is_that_of_results(op: OpDef, data: st.DataObject) -> None:
    args = single(op, data.draw(tree(op).samples()), 0)
    order = reordered(args[-1], data.draw)
    for given_args in (args, double(args)):
        want = tree(op).reference(*given_args).index_select(rows_axis(op), order)
        close(tree(op).reference(*chosen(op, given_args, order)), want, op, mixer(op).tree in STEPPED)


@every_op
@on_samples(40)
@given(data=st.data())
def test_what_is_beside_a_path_leaves_it_alone(op: OpDef, data: st.DataObject) -> None:
    """Bit for bit: another subtree, of huge numbers with strong decays; of NaN, where no product takes all nodes."""
    args = double(single(op, data.draw(tree(op).samples()), 0))
    path, others, pairs = beside(data, args[-1])
    safe = PRODUCTS.get(mixer(op).tree)
    fills: list[Callable[[str], float | None]] = [
        lambda name: HUGE.get(name, 1e30),
        lambda name: HUGE.get(name, -1e30),
        lambda name: torch.nan if safe is None or name in safe else None,
    ]
    want = tree(op).reference(*args).index_select(rows_axis(op), path)
    assert want.isfinite().all()
    for fill in fills:
        for shape in (args[-1], pairs):
            got = tree(op).reference(*filled(op, args, others, fill)[:-1], shape)
            close(got.index_select(rows_axis(op), path), want, op, bits=True)


@pytest.mark.parametrize("name", ["gdn_tree_scan", "kda_tree_scan"])
def test_keys_that_overflow_stay_beside(name: str) -> None:
    """The product of two leaves' keys, which no double holds, is that of no path."""
    *args, pairs = double(chain(name, 6))
    pairs[:] = pairs_of(torch.tensor([[-1, 0, 0, 0, 0, 0]]))
    want = ops.load(name).reference(*args, pairs)
    args[0][:, [2, 4]] = args[1][:, [2, 4]] = 1e200
    got = ops.load(name).reference(*args, pairs)
    assert torch.equal(got[:, [0, 1, 3, 5]], want[:, [0, 1, 3, 5]])


@every_op
@on_samples(15)
@given(data=st.data())
def test_more_nodes_leave_the_first_alone(op: OpDef, data: st.DataObject) -> None:
    args = double(single(op, data.draw(tree(op).samples()), 0))
    count, more = args[-1].shape[1], data.draw(st.integers(1, 5))
    hung = drawn(data.draw, 1, count + more)[:, count:]
    pairs = pairs_of(torch.cat([parents_of(args[-1]), hung], 1))
    longer = changed(
        op, args, lambda _, a, axis: torch.cat([a, a.narrow(axis, 0, 1).repeat_interleave(more, axis)], axis)
    )
    got = tree(op).reference(*longer[:-1], pairs)
    close(got.narrow(rows_axis(op), 0, count), tree(op).reference(*args), op)


@every_op
@on_samples(10)
@given(data=st.data())
def test_the_state_stays_as_it_is(op: OpDef, data: st.DataObject) -> None:
    """Bytes, and those of all other arguments."""
    args = data.draw(tree(op).samples())
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    y = tree(op).reference(*args)
    for was, a in zip(before, args, strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(was.view(torch.uint8), a.view(torch.uint8))
            assert y.untyped_storage().data_ptr() != a.untyped_storage().data_ptr()


STRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "A": lambda a: 300 * a.clamp(max=-1), "g": lambda g: 300 * g - 1, "w": lambda w: 300 * w.clamp(max=-1),
    "a": lambda a: a * 1e-30,
}  # fmt: skip


@pytest.mark.parametrize("op", [op for op in RECURRENT if set(names(op)) & set(STRONG)], ids=lambda op: op.name)
@on_samples(15)
@given(data=st.data())
def test_strong_decays_stay_finite(op: OpDef, data: st.DataObject) -> None:
    """Sums of logarithms in the hundreds, which no float32 takes the exponential of."""
    args = data.draw(tree(op).samples())
    args = *(STRONG[n](a) if n in STRONG else a for n, a in zip(names(op), args[:-1])), args[-1]
    assert tree(op).reference(*args).isfinite().all()
    assert_paths(op, args)


@every_op
@on_samples(10)
@given(data=st.data())
def test_one_tree_of_all_sequences(op: OpDef, data: st.DataObject) -> None:
    """Pairs [1, R, R] are those of each sequence, bit for bit."""
    *args, pairs = data.draw(tree(op).samples())
    batch = pairs.shape[0]
    want = tree(op).reference(*args, pairs[:1].expand(batch, -1, -1).contiguous())
    close(tree(op).reference(*args, pairs[:1]), want, op, bits=True)
    if mixer(op).commit and args[-1] is not None:
        leaf = torch.arange(-1, batch - 1).clamp(max=pairs.shape[1] - 1)
        got, want = (committed(op, tuple(args), p, leaf) for p in (pairs[:1], pairs[:1].expand(batch, -1, -1)))
        close(got, want, op, bits=True)


class Constant(torch.nn.Module):
    """A call of a tree's op, and of what commits a path of it, with pairs that are a constant."""

    def __init__(self, op: OpDef, args: Args) -> None:
        super().__init__()
        self.op, self.rest = op, args
        self.register_buffer("pairs", args[-1])

    def forward(self, leaf: Tensor, *free_args: Tensor) -> Any:
        values = iter(free_args)
        args = tuple(next(values) if isinstance(a, Tensor) else a for a in self.rest[:-1])
        y = tree(self.op).overload(*args, self.pairs)
        if not mixer(self.op).commit:
            return y
        return y, closed(self.op).overload(*asked(self.op, args, self.pairs, leaf))


@every_op
def test_onnx_with_a_tree_that_is_a_constant(op: OpDef) -> None:
    """For any batch: what follows from the pairs alone is no part of what runs."""
    pytest.importorskip("onnxscript", reason="needs aropt[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    states, batch = mixer(op).state, torch.export.Dim.DYNAMIC

    @on_samples(1)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        wanted = tree(op).samples().filter(lambda a: a[-1].shape[0] > 1 and 3 < a[-1].shape[1] < 9)
        *args, pairs = data.draw(wanted.filter(lambda a: all(a[names(op).index(n)] is not None for n in states)))
        model = Constant(op, (*args, pairs[:1].clone())).eval()
        leaf = torch.tensor([2, -1, 0][: pairs.shape[0]])
        given_args = (leaf, *(a for a in args if isinstance(a, Tensor)))
        rows = {*mixer(op).rows, *states}
        dims = [{0: batch} if n in rows else {} for n, a in zip(names(op), args) if isinstance(a, Tensor)]
        exported = torch.onnx.export(
            model, given_args, dynamo=True, dynamic_shapes=({0: batch}, tuple(dims)),
            custom_translation_table=ops.translation_table(), verbose=False,
        ).model_proto  # fmt: skip
        session = runtime.InferenceSession(exported.SerializeToString(), providers=["CPUExecutionProvider"])
        feeds = {spec.name: a.numpy() for spec, a in zip(session.get_inputs(), given_args, strict=True)}
        want = model(*given_args)
        assert_matches(tree(op), [torch.from_numpy(a) for a in session.run(None, feeds)], want)

    check()


def test_histories_longer_than_the_tree() -> None:
    """Taps and delays reach from each node over its ancestors into the state."""
    pairs = pairs_of(torch.tensor([[-1, 0, 0, 1, -1]]))
    x = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    state = torch.tensor([1.0, 2.0, 3.0])
    weight = torch.tensor([[1e6, 1e4, 1e2, 1.0]])
    y = ops.load("tree_conv1d").reference(x[None, None], weight, None, state[None, None], pairs)
    assert y.flatten().tolist() == [1020310.0, 2031020.0, 2031030.0, 3102040.0, 1020350.0]
    late = ops.load("tree_delay").reference(x[None, :, None], 3, state[None, :, None], pairs)
    assert late.flatten().tolist() == [1.0, 2.0, 2.0, 3.0, 1.0]


def chain(name: str, rows: int) -> Args:
    """Arguments for a chain from a state: keys alike, and what is learned stays."""
    generator = torch.Generator().manual_seed(0)
    pairs = torch.ones(2, rows, rows, dtype=torch.bool).tril()
    if name == "rg_lru_tree":
        x, state = (torch.randn(2, *shape, generator=generator) for shape in ((rows, 5), (5,)))
        return x, 1 - 0.01 * torch.rand(2, rows, 5, generator=generator), state, pairs
    if name == "selective_tree_scan":
        x, b, c = (torch.randn(2, 3, rows, generator=generator) for _ in "xbc")
        a, state = -torch.rand(3, 3, generator=generator), torch.randn(2, 3, 3, generator=generator)
        return x, 0.05 * x.abs(), a, b, c, a[0], state, pairs
    q, k, v, state = (torch.randn(2, n, 2, 4, generator=generator) for n in (rows, 1, rows, 4))
    k = torch.nn.functional.normalize(k, dim=3).expand_as(q).clone()
    g, beta = torch.zeros(2, rows, 2), torch.rand(2, rows, 2, generator=generator) * 0.05 + 0.95
    g = g.unsqueeze(3).expand_as(q).clone() if name == "kda_tree_scan" else g
    return q, k, v, g, beta, state.transpose(1, 2).contiguous(), pairs


@pytest.mark.parametrize("held", [True, False], ids=["held", "any"])
@pytest.mark.parametrize("name", ["gdn_tree_scan", "kda_tree_scan", "rg_lru_tree", "selective_tree_scan"])
def test_onnx_takes_long_paths(name: str, held: bool) -> None:
    """64 nodes in a chain, in a graph for as many and in one for any number; large powers would lose the digits."""
    pytest.importorskip("onnxscript", reason="needs aropt[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    op = ops.load(name)
    args = chain(name, 64)
    model = torch.onnx.export(
        Call(op, args).eval(),
        tuple(free(op, args)),
        dynamo=True,
        dynamic_shapes=None if held else (symbolic(op, args),),
        custom_translation_table=ops.translation_table(),
        verbose=False,
    ).model_proto
    assert any(node.op_type == "Scan" for node in model.graph.node) != held
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in [64] if held else [64, 63, 33, 2, 1]:
        args = chain(name, rows)
        feeds = {spec.name: a.numpy() for spec, a in zip(session.get_inputs(), free(op, args), strict=True)}
        assert_matches(op, [torch.from_numpy(a) for a in session.run(None, feeds)], op.reference(*args))


KERNELS = [op for op in RECURRENT if tree(op).launch]


@with_rows(KERNELS)
def test_kernel_of_many_tiles(op: OpDef, rows: int) -> None:
    """Equal to the definition; and what is beside a path leaves its bits alone."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    if not (INTERPRET or torch.cuda.is_available()):
        pytest.skip("needs a GPU; `test_kernels_in_the_interpreter` does it on the CPU")
    args = placed(wide(mixer(op).tree, rows))
    launch = tree(op).launch
    assert launch is not None and tree(op).supports(*args) is None
    got = launch(*args)
    assert_matches(tree(op), got, tree(op).reference(*args))
    path = args[-1][0, rows - 1]
    huge = torch.nan if mixer(op).tree not in PRODUCTS else 1e9
    others = filled(op, args, (~path).nonzero()[:, 0], lambda name: -huge if name == "g" else huge)
    kept = path.nonzero()[:, 0]
    again = launch(*others)[:1].index_select(rows_axis(op), kept)
    assert torch.equal(again, got[:1].index_select(rows_axis(op), kept))


def test_kernels_refuse_what_they_do_not_hold() -> None:
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    assert KERNELS == RECURRENT
    for op in KERNELS:
        args = wide(mixer(op).tree, 65)
        assert "nodes" in (tree(op).supports(*args) or "")
        args = wide(mixer(op).tree, 3)
        assert "float32" in (tree(op).supports(*double(args)) or "")
    for op in COMMITS:
        leaf = torch.tensor([0, -1])
        for pairs in [wide(mixer(op).tree, 3)[-1], *[None] * chained(op)]:
            many = None if pairs is None else wide(mixer(op).tree, 65)[-1]
            assert "nodes" in (closed(op).supports(*asked(op, wide(mixer(op).tree, 65), many, leaf)) or "")
            args = asked(op, wide(mixer(op).tree, 3), pairs, leaf)
            assert closed(op).supports(*args) is None
            assert "float32" in (closed(op).supports(*double(args)) or "")


@pytest.mark.slow
@pytest.mark.skipif(INTERPRET, reason="runs itself")
@pytest.mark.parametrize(
    ("marked", "count"), [("not exhaustive", 44), pytest.param("exhaustive", 5, marks=pytest.mark.exhaustive)]
)
def test_kernels_in_the_interpreter(marked: str, count: int) -> None:
    """Tests of kernels, here, in test_commits and in test_rows, in a process of their own, as in test_ops."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    files = [__file__, *(__file__.replace("trees", name) for name in ("commits", "rows"))]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", "test_kernel_of_many_tiles", "-m", marked]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and f"{count} passed" in done.stdout, done.stdout + done.stderr
