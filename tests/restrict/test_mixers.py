"""A new mixer is one kernel file: a toy op, and models with it that are cached, verified, run and exported."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import aropt
from aropt.errors import AroptError, Unsupported
from aropt.ir import ops
from aropt.ir.dims import Dim
from aropt.ir.opdef import Mixer, OpDef
from aropt.ir.program import Graph, Program
from aropt.pipeline.registry import make
from aropt.restrict import analysis, mixers
from aropt.restrict.rewrite import restrict
from aropt.rewriting import tree
from tests.restrict.toys import moving_average
from tests.support.op_models import Call, assert_matches, free, sizable, symbolic

ops.add(moving_average.OP)
CARRIED = [op for op in ops.load_all().values() if op.mixer and op.mixer.state and not op.mixer.initial]  # test_scan
VOCAB, D = 23, 16
average = torch.ops.aropt.moving_average


class Averages(nn.Module):
    """Two layers of averages, and attention between them if wanted."""

    capacity = 24

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.up, self.qkv = nn.Linear(D, D), nn.Linear(D, 3 * D)
        self.decay = nn.Parameter(torch.linspace(-2, 2, D))
        self.attention = attention

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = x + average(x, self.decay.sigmoid(), None, None)[0]
        if self.attention:
            q, k, v = (t.unflatten(-1, (2, D // 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + average(F.gelu(self.up(x)), 1 - self.decay.sigmoid(), None, None)[0]
        return self.head(x)  # type: ignore[no-any-return]


def model(attention: bool = False) -> Averages:
    torch.manual_seed(3)
    return Averages(attention).eval()


@cache
def plain(attention: bool = False) -> Program:
    return aropt.capture(model(attention))


@cache
def optimized(target: str, attention: bool) -> aropt.Compiled:
    return aropt.optimize(plain(attention), target=target)


def greedy(module: nn.Module, prompt: list[int], n: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, module(ids)[:, -1:].argmax(-1)], 1)
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


PROMPTS = [[4, 5, 6, 7, 8, 9], [3], [10, 2, 4]]


SELDOM = (("eager", False), ("eager", True), ("onnxruntime", False))
BOTH = [*(pytest.param(*both, marks=pytest.mark.exhaustive) for both in SELDOM), ("onnxruntime", True)]


@pytest.mark.parametrize(("target", "attention"), BOTH)
def test_a_model_is_cached_and_verified(target: str, attention: bool) -> None:
    """One state a layer, in place of keys and values; sequences of any lengths in one batch."""
    module, made = model(attention), optimized(target, attention)
    assert {p["name"]: p["status"] for p in made.report["passes"]}["kv-cache"] == "applied"
    assert made.report["verify"]["status"] == "pass"
    kinds = [state.kind for state in made.program.state.values()]
    assert kinds.count("recurrent") == 2 and kinds.count("append-kv") == (3 if attention else 0)
    texts = [t.tolist() for t in map(torch.as_tensor, made.generate(PROMPTS, 9))]
    assert [t[-9:] for t in texts] == [greedy(module, p, 9) for p in PROMPTS]


def test_the_whole_loop_is_one_onnx_file(tmp_path: Path) -> None:
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    made = optimized("onnxruntime", True)
    path = tmp_path / "loop.onnx"
    export_program(made.program, path)
    assert run_loop.compare(path, made.program)["status"] == "pass"


def test_a_sketch_leaves_recurrent_state_alone() -> None:
    """What it drafts would be in the state that the check starts from."""
    passes = [make("kv-cache"), make("int8-draft")]
    made = aropt.optimize(plain(), target="eager", passes=passes, check=False)
    found = {p["name"]: p for p in made.report["passes"]}
    assert found["kv-cache"]["status"] == "applied"
    assert found["int8-draft"]["status"] == "skipped" and "recurrent" in found["int8-draft"]["reason"]


def test_drafts_from_the_text_are_checked_on_recurrent_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that were rejected leave no trace in it; a state that keeps them gives other tokens, which is caught."""
    passes = [make("kv-cache"), make("tree-draft", {"draft": "text", "shape": "chain:3"})]
    made = aropt.optimize(plain(True), target="eager", passes=passes)
    assert [p["status"] for p in made.report["passes"]] == ["applied"] * 2
    assert made.report["verify"]["status"] == "pass"
    places = tree.path_places

    def every_row_counts(slots: bool, size: Dim) -> Graph:
        found = places(slots, size)
        counts = found.results()[1]
        with found.fx.inserting_after(counts):
            none = found.fx.call_function(torch.ops.aten.mul.Tensor, (counts, 0))
        counts.replace_all_uses_with(none, lambda user: user.op == "output")
        return found

    monkeypatch.setattr(tree, "path_places", every_row_counts)
    with pytest.raises(AroptError, match="differ"):
        aropt.optimize(plain(True), target="eager", passes=passes)


def test_padding_that_changes_state_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that is not told which rows are padding differs in a batch of several lengths."""
    mixer = Mixer(rows={"x": -2}, state=("state",))
    monkeypatch.setattr(mixers, "mixer_of", lambda node: mixer if ops.called(node) else None)
    monkeypatch.setattr(analysis, "mixer_of", mixers.mixer_of)
    with pytest.raises(AroptError, match="logits differ") as caught:
        aropt.optimize(plain(), target="eager", passes=[make("kv-cache")])
    assert caught.value.where.startswith("kv-cache")


class Odd(Averages):
    """A call that can't be computed for new rows alone."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, ids: Tensor) -> Tensor:
        x, decay = self.embedding(ids), self.decay.sigmoid()
        if self.kind == "over the batch":
            x = average(x.transpose(0, 1), decay, None, None)[0].transpose(0, 1)
        if self.kind == "reads the last state":
            y, state = average(x, decay, None, None)
            x = y + state.unsqueeze(1)
        if self.kind == "decay from the tokens":
            x = average(x, x[0, 0].sigmoid(), None, None)[0]
        if self.kind == "begins with a state":
            x = average(x, decay, torch.zeros_like(x[:, 0]), None)[0]
        return self.head(x)  # type: ignore[no-any-return]


def forward(program: Program) -> Graph:
    return next(g for g in program.graphs.values() if list(g.inputs) == ["ids"])


REFUSED = {
    "over the batch": "something other than the sequence",
    "reads the last state": "leaves state behind",
    "decay from the tokens": "",
    "begins with a state": "",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_calls_are_refused_by_name(kind: str) -> None:
    torch.manual_seed(0)
    program = aropt.capture(Odd(kind).eval(), name="odd", capacity=24)
    with pytest.raises(Unsupported) as caught:
        restrict(forward(program), program.weights, 24)
    assert REFUSED[kind] in str(caught.value)


def test_a_canvas_is_refused() -> None:
    program = aropt.capture(model(), name="averages")
    with pytest.raises(Unsupported, match="in any order"):
        restrict(
            next(g for g in program.graphs.values() if list(g.inputs) == ["ids"]), program.weights, 24, canvas=True
        )


@pytest.mark.parametrize("op", CARRIED, ids=lambda op: op.name)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_equal_the_whole(op: OpDef, data: st.DataObject) -> None:
    """Rows in two calls, the second on the state of the first; padding before or after them changes nothing."""
    names = [argument.name for argument in op.overload._schema.arguments]
    mixer = op.mixer
    assert mixer is not None
    whole = dict(zip(names, data.draw(op.samples()), strict=True))
    whole[mixer.positions] = None
    rows = whole[next(iter(mixer.rows))].shape[next(iter(mixer.rows.values()))]
    want, *after = op.reference(*whole.values())
    cut, pads, last = data.draw(st.integers(0, rows)), data.draw(st.integers(0, 3)), data.draw(st.booleans())
    parts, state = [], {n: whole[n] for n in mixer.state}
    for start, end, before in ((0, cut, pads), (cut, rows, 0)):
        if end - start + before == 0:
            continue
        given_rows = {}
        for name, axis in mixer.rows.items():
            piece = whole[name].narrow(axis, start, end - start)
            padding = torch.full_like(whole[name].narrow(axis, 0, 1), 7.0).repeat_interleave(before, axis)
            given_rows[name] = torch.cat([piece, padding] if last else [padding, piece], axis)
        batch = want.shape[0]
        at = [torch.full((before,), -1), torch.arange(start, end)]
        at = torch.cat(at[::-1] if last else at).expand(batch, -1)
        got, *left = op.reference(*(whole | given_rows | state | {mixer.positions: at}).values())
        state = dict(zip(mixer.state, left, strict=True))
        axis = next(iter(mixer.rows.values()))
        parts.append(got.narrow(axis, 0 if last else before, end - start))
    rtol, atol = op.tolerance.get(torch.float32, (0.0, 0.0))
    torch.testing.assert_close(torch.cat(parts, next(iter(mixer.rows.values()))), want, rtol=rtol, atol=atol)
    for got, value in zip(state.values(), after, strict=True):
        torch.testing.assert_close(got, value, rtol=rtol, atol=atol)


FIRST = {"ssd_scan", "causal_conv1d", "wkv"}  # a chunk, a Conv, a Scan
ONE_ROW = [
    pytest.param(op, id=op.name, marks=[pytest.mark.exhaustive] * (op.name not in FIRST)) for op in CARRIED if op.onnx
]


@pytest.mark.parametrize("op", ONE_ROW)
@settings(max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_one_row_in_onnx(op: OpDef, data: st.DataObject) -> None:
    """An export for any number of rows takes another branch for one: both give the reference's rows and state."""
    runtime = pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    names, mixer = [argument.name for argument in op.overload._schema.arguments], op.mixer
    assert mixer is not None
    kept = [names.index(n) for n in (*mixer.state, mixer.positions)]
    args = data.draw(sizable(op).filter(lambda args: all(args[i] is not None for i in kept)))
    model = torch.onnx.export(
        Call(op, args, constant=True).eval(),
        tuple(free(op, args)),
        dynamo=True,
        dynamic_shapes=(symbolic(op, args),),
        custom_translation_table=ops.translation_table(),
        verbose=False,
    ).model_proto
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    axes = {**mixer.rows, mixer.positions: 1}
    for row in range(3):
        at = {n: v.narrow(axes[n], row % v.shape[axes[n]], 1) if n in axes else v for n, v in zip(names, args)}
        at[mixer.positions] = torch.full_like(at[mixer.positions], row - 1)  # padding, then rows
        feeds = zip(session.get_inputs(), free(op, tuple(at.values())), strict=True)
        got = [torch.from_numpy(a) for a in session.run(None, {i.name: v.contiguous().numpy() for i, v in feeds})]
        assert_matches(op, got, op.reference(*at.values()))
