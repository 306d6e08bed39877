"""The tree forms of the recurrent mixers: a node's row is what its path alone gives, whatever else is in the tree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aropt.ir import ops
from aropt.ir.opdef import Mixer, OpDef
from aropt.kernels.tree_delay import drawn, on_path, pairs_of, parents_of
from tests.support.op_models import Call, assert_matches, free, symbolic

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
RECURRENT = [op for op in map(ops.load, ops.NAMES) if op.mixer and op.mixer.state]
STEPPED = {"tree_delay", "rg_lru_tree", "selective_tree_scan"}  # of the bits that steps give
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


def beside(data: st.DataObject, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A node's path, the nodes of one tree that are not on it, and pairs with these hung anew."""
    count = pairs.shape[1]
    path = pairs[0, data.draw(st.integers(0, count - 1))]
    parents = parents_of(pairs)
    other = drawn(data.draw, 1, count)
    return path.nonzero()[:, 0], (~path).nonzero()[:, 0], pairs_of(torch.where(path, parents, other))


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


COMMITS = [op for op in RECURRENT if mixer(op).commit]
every_commit = pytest.mark.parametrize("op", COMMITS, ids=lambda op: op.name)


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


def wide(name: str, rows: int) -> Args:
    """Two trees, larger than a kernel's tiles in each axis; decays are below 1."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(2, *sizes, generator=generator)

    place = torch.arange(rows)
    parents = torch.where(place > 0, (torch.rand(2, rows, generator=generator) * place).long(), -1)
    parents[1] = torch.where(place % 5 == 3, -1, (place - 1 - place % 3).clamp(min=-1))
    pairs = pairs_of(parents)
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
    return q, k, v, -g.abs(), beta.sigmoid(), normal(3, 35, 37), pairs


def placed(args: Args) -> Args:
    """Where a kernel runs."""
    return args if INTERPRET else tuple(a.cuda() if isinstance(a, Tensor) else a for a in args)


KERNELS = [op for op in RECURRENT if tree(op).launch]


@pytest.mark.parametrize("rows", [1, 17, 64])
@pytest.mark.parametrize("op", KERNELS, ids=lambda op: op.name)
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


@pytest.mark.parametrize("rows", [1, 17, 64])
@every_commit
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


def test_kernels_refuse_what_they_do_not_hold() -> None:
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    assert len(KERNELS) == 4
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


@pytest.mark.skipif(INTERPRET, reason="runs itself")
def test_kernels_in_the_interpreter() -> None:
    """Tests of kernels in a process of its own, as in test_ops."""
    pytest.importorskip("triton", reason="needs aropt[triton], which is for Linux alone")
    command = [sys.executable, "-m", "pytest", "-q", __file__, "-k", "test_kernel_of_many_tiles"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "21 passed" in done.stdout, done.stdout + done.stderr
