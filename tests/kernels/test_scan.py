"""`aropt::scan`: bodies as text, rows in pieces and as nodes, and one row in ONNX; test_ops has the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from aropt.ir import ops
from aropt.ir.verify import op_problem
from aropt.kernels import scan
from aropt.kernels.scan import GATED, parsed, written
from tests.support.op_models import Call, assert_matches, free, sizable, symbolic
from tests.support.trees import on_samples

OP, TREE = ops.load("scan"), ops.load("scan_tree")
Args = tuple[Any, ...]


def rows_of(args: Args, change: Any) -> Args:
    """With other rows."""
    body, init, xs, extra, state, positions = args
    return body, init, [change(x) for x in xs], extra, state, positions


def carried_on(args: Args, left: list[Tensor]) -> Args:
    """The arguments that go on from what rows have left."""
    body, init, xs, extra, state, positions = args
    return body, init if len(left) > len(init) and state else [], xs, extra, left, positions


def split(args: Args, results: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The ys, and what is kept."""
    first = len(results) - (len(args[4]) or len(args[1]))
    return results[:first], results[first:]


@on_samples(60)
@given(data=st.data())
def test_pieces_equal_the_whole(data: st.DataObject) -> None:
    """Rows in two calls, the second on the state of the first; padding before or after them changes no bit."""
    args = (*data.draw(OP.samples())[:-1], None)
    batch, count = args[2][0].shape[:2]
    want, after = split(args, OP.reference(*args))
    cut, pads, last = data.draw(st.integers(1, count)), data.draw(st.integers(0, 3)), data.draw(st.booleans())
    parts, now = [], args
    for start, end, before in ((0, cut, pads), (cut, count, 0)):
        if start == end:
            continue

        def piece(x: Tensor, start: int = start, end: int = end, before: int = before) -> Tensor:
            padding = torch.full_like(x[:, :1], 7.0).repeat_interleave(before, 1)
            return torch.cat([x[:, start:end], padding] if last else [padding, x[:, start:end]], 1)

        at = [torch.full((before,), -1), torch.arange(start, end)]
        positions = torch.cat(at[::-1] if last else at).expand(batch, -1)
        rows = rows_of((*args[:1], now[1], *args[2:4], now[4], None), piece)
        ys, left = split(now, OP.reference(*rows[:-1], positions))
        parts.append([y.narrow(1, 0 if last else before, end - start) for y in ys])
        now = carried_on(now, left)
    for got, y in zip(zip(*parts), want, strict=True):
        torch.testing.assert_close(torch.cat(got, 1), y, rtol=0, atol=1e-6)
    for value, kept in zip(now[4], after, strict=True):
        torch.testing.assert_close(value, kept, rtol=0, atol=1e-6)


@on_samples(40)
@given(data=st.data())
def test_padding_alone_changes_nothing(data: st.DataObject) -> None:
    """A sequence with no row at all still has its first row to come."""
    args = data.draw(OP.samples().filter(lambda a: len(a[4]) > 0))
    _, kept = split(args, OP.reference(*args[:-1], torch.full(args[2][0].shape[:2], -1)))
    if args[1]:  # what starts again is written out
        assert torch.equal(kept[-1], args[4][-1])
        kept = [torch.where(scan.beside(args[4][-1], k), k, s) for k, s in zip(kept[:-1], args[4])]
    assert all(torch.equal(k, s) for k, s in zip(kept, args[4]))


@on_samples(40)
@given(data=st.data())
def test_nodes_equal_their_paths(data: st.DataObject) -> None:
    """The rows of a path alone give the bits of its last node."""
    args = data.draw(TREE.samples())
    got = TREE.reference(*args)
    for b in range(args[2][0].shape[0]):
        for node in range(args[2][0].shape[1]):
            path = args[-1][b, node].nonzero()[:, 0]
            init, state = ([x[b : b + 1] for x in args[i]] for i in (1, 4))
            one = (args[0], init, [x[b : b + 1, path] for x in args[2]], args[3], state, None)
            for y, alone in zip(got, OP.reference(*one)):
                torch.testing.assert_close(y[b, node], alone[0, -1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("body", [GATED, pytest.param(scan.STABLE, marks=pytest.mark.exhaustive)])
@on_samples(1)
@given(data=st.data())
def test_one_row_in_onnx(body: str, data: st.DataObject) -> None:
    """An export for any number of rows takes another branch for one: both give the reference's rows and state."""
    pytest.importorskip("onnxscript", reason="needs aropt[onnx]")
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    every = sizable(OP).filter(lambda a: a[0] == body and bool(a[1]) and bool(a[4]) and a[5] is not None)
    args = data.draw(every)
    model = torch.onnx.export(
        Call(OP, args).eval(), tuple(free(OP, args)), dynamo=True, dynamic_shapes=(symbolic(OP, args),),
        custom_translation_table=ops.translation_table(), verbose=False,
    ).model_proto  # fmt: skip
    assert {node.domain for node in model.graph.node} == {""}, "standard ops only"
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (slice(None), slice(0, 1)):
        for position in (0, -1):
            some = rows_of(args, lambda x, rows=rows: x[:, rows].contiguous())
            some = (*some[:-1], torch.full(some[2][0].shape[:2], position))
            feeds = zip(session.get_inputs(), free(OP, some), strict=True)
            got = [torch.from_numpy(a) for a in session.run(None, {i.name: v.numpy() for i, v in feeds})]
            assert_matches(OP, got, OP.reference(*some))


@pytest.mark.parametrize("body", [GATED, scan.STABLE, scan.CELL.replace("WIDTH", "3")])
def test_text_is_read_as_it_was_written(body: str) -> None:
    carries = 1 + ("c1" in body)
    sizes = (carries, 1 if "linear" in body else 2, 2 if "linear" in body else 0)
    assert written(parsed(body, sizes).graph, carries) == body


def test_arguments_of_each_kind_come_back() -> None:
    lines = (
        "v0 = aten.full.default([2, 3], -inf, dtype=torch.float32)",
        "v1 = aten.sym_size.int(c0, 0)",
        "v2 = operator.mul(v1, -2)",
        "v3 = aten.gelu.default(x0, approximate='tanh')",
        "v4 = aten.clamp.default(v3, None, 0.5)",
        "v5 = aten.all.dim(v4, 0, True)",
        "return [c0], [v0, v2, v5]",
    )
    assert written(parsed("\n".join(lines), (1, 1, 0)).graph, 1) == "\n".join(lines)


HOSTILE = {
    "v0 = aten.from_file.default('/etc/passwd')\nreturn [c0], [v0]": "none of the ops that programs may hold",
    "v0 = aten.rand_like.default(c0)\nreturn [c0], [v0]": "hidden generator",
    "v0 = aten.add_.Tensor(c0, x0)\nreturn [c0], [v0]": "writes to its arguments",
    "v0 = __import__('os').system('true')\nreturn [c0], [v0]": "no op that the body",
    "v0 = operator.attrgetter('grad')\nreturn [c0], [v0]": "no op that the body",
    "v0 = aten.__class__.mro()\nreturn [c0], [v0]": "no op that the body",
    "v0 = aptly.neg.default(c0)\nreturn [c0], [v0]": "no op that the body",
    "v0 = aten.neg.default(c0.grad)\nreturn [c0], [v0]": "can't be an argument",
    "v0 = aten.neg.default(exit())\nreturn [c0], [v0]": "can't be an argument",
    "v1 = aten.neg.default(c0)\nreturn [c0], [v1]": "no call with its number",
    "v0 = lambda: 0\nreturn [c0], [v0]": "no call with its number",
    "return [c0, x0], [x0]": "not 1 carries",
    "return [c0], []": "not 1 carries",
    "return [c0], [2]": "not 1 carries",
    "return [c9], [x0]": "can't be an argument",
    "": "can't be read",
    "v0 = aten.neg.default(" + "(" * 3000 + ")" * 3000 + ")\nreturn [c0], [v0]": "can't be",
    "return [c0], [x0]" + " " * 100_000: "more than",
}


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_bodies_that_are_no_data_are_refused(body: str) -> None:
    """None is run: the verifier, which asks this of every graph that is read, only parses."""
    x = torch.zeros(2, 3)
    problem = op_problem(OP.overload, (body, [x], [x], [], [], None), {})
    assert problem is not None and problem[0] == "op-body" and HOSTILE[body] in problem[1], problem


def test_lists_of_other_lengths_are_refused() -> None:
    x, body = torch.zeros(2, 3), "return [c0], [x0]"
    for init, xs, state in (([x], [], []), ([x], [x], [x]), ([], [x], []), ([x], [x, x], [x, x, x])):
        assert op_problem(OP.overload, (body, init, xs, [], state, None), {}) is not None
    assert op_problem(OP.overload, (body, [x], [x], [], [x, x], None), {}) is None
    assert op_problem(OP.overload, (body, [], [x], [], [x], None), {}) is None
