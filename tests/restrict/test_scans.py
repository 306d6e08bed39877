"""Anyone's own recurrence, written with torch's scan: captured, computed in pieces, drafted, stored and exported."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

import aropt
from aropt.errors import AroptError, Unsupported, UsageError
from aropt.ir.printer import digest, text
from aropt.ir.program import Graph, Program
from aropt.ir.serialize import from_json, to_json
from aropt.kernels import scan as kernel
from aropt.pipeline.registry import make
from aropt.restrict import bodies
from aropt.restrict.rewrite import restrict
from tests.support.equivalence import check
from tests.support.run import generate

VOCAB, D, CAPACITY = 23, 8, 24
ROOT = Path(__file__).parents[2]


class MinGRU(nn.Module):
    """Feng et al. 2024: a gate and a candidate that read no state; rows at dim 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.candidate = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        def step(h: Tensor, row: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            gate, candidate = row
            h = (1 - gate) * h + gate * candidate
            return h, h.clone()

        rows = torch.sigmoid(self.gate(x)), self.candidate(x)
        return scan(step, torch.zeros_like(x[:, 0]), rows, dim=1)[1]  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """Hochreiter & Schmidhuber 1997, from a learned h: two carries, weights in the body, rows at dim 0."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.state = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D)
        self.start = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        def step(carry: tuple[Tensor, Tensor], row: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
            h, c = carry
            i, f, g, o = (row + self.state(h)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            return (h, c), h.clone()

        init = self.start.expand(x.shape[0], -1).clone(), x.new_zeros(x.shape[0], D)
        return scan(step, init, self.rows(x).transpose(0, 1))[1].transpose(0, 1)  # type: ignore[no-any-return]


class Stable(nn.Module):
    """Sums of exponentials with their largest apart (xLSTM, Beck et al. 2024): from -inf, a dict, two ys, a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v, self.forget = nn.Linear(D, 4), nn.Linear(D, 2), nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        def step(carry: dict[str, Tensor], row: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
            k, v, forget = row
            top = torch.maximum(forget + carry["top"], k.amax(-1, keepdim=True))
            old, new = torch.exp(forget + carry["top"] - top), torch.exp(k - top)
            memory = old.unsqueeze(2) * carry["memory"] + v.unsqueeze(2) * new.unsqueeze(1)
            return {"memory": memory, "top": top}, (memory.view(memory.shape[0], 8).clone(), old * v)

        size = x.shape[0]
        init = {"memory": x.new_zeros(size, 2, 4), "top": torch.full((size, 1), -torch.inf)}
        _, (y, z) = scan(step, init, (self.k(x), self.v(x), -self.forget(x).exp()), dim=1)
        return torch.tanh(y) + z.repeat(1, 1, 4)


class Model(nn.Module):
    capacity = CAPACITY

    def __init__(self, kind: type[nn.Module], layers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding, self.head = nn.Embedding(VOCAB, D), nn.Linear(D, VOCAB)
        self.mixers = nn.ModuleList(kind() for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for mixer in self.mixers:
            x = x + mixer(x)
        return self.head(x)  # type: ignore[no-any-return]


STATE = {MinGRU: 1, LSTM: 3, Stable: 2}  # of the learned start: whether there was a row
KINDS = pytest.mark.parametrize("kind", STATE, ids=lambda kind: kind.__name__)
OTHERS = [pytest.param(target, marks=pytest.mark.exhaustive) for target in ("eager", "inductor")]
PROMPTS = [[4, 5, 6, 7, 8, 9], [3], [10, 2, 4]]
DRAWN = {"temperature": 1.0, "seed": 3}


@cache
def plain(kind: type[nn.Module]) -> Program:
    return aropt.capture(Model(kind, 2).eval(), name="scanned")


@cache
def cached(kind: type[nn.Module], target: str) -> aropt.Compiled:
    return aropt.optimize(plain(kind), target=target)


def forward(program: Program) -> Graph:
    return next(g for g in program.graphs.values() if list(g.inputs) == ["ids"])


@KINDS
def test_chunks_of_ragged_sequences_equal_the_forward(kind: type[nn.Module]) -> None:
    """Random pieces, within the noise floor, against the model in double precision."""
    result, restricted = check(Model(kind), VOCAB, CAPACITY)
    assert result.ok and result.reach > 100 * result.floor, result
    assert [s.kind for s in restricted.state.values()].count("recurrent") == STATE[kind]


@KINDS
@pytest.mark.parametrize("target", ["onnxruntime", *OTHERS])
def test_tokens_are_those_of_the_plain_forward(kind: type[nn.Module], target: str) -> None:
    """Greedy and drawn, in a batch of three lengths and alone."""
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    made = cached(kind, target)
    assert {p["name"]: p["status"] for p in made.report["passes"]}["kv-cache"] == "applied"
    assert made.report["verify"]["status"] == "pass"
    assert [s.kind for s in made.program.state.values()].count("recurrent") == 2 * STATE[kind]
    for params in ({}, DRAWN):
        assert made.generate(PROMPTS, 9, **params) == generate(plain(kind), PROMPTS, 9, **params)
        assert made.generate(PROMPTS[:1], 9, **params) == generate(plain(kind), PROMPTS[:1], 9, **params)


@pytest.mark.parametrize("kind", [LSTM, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in (MinGRU, Stable))])
def test_the_whole_loop_is_one_onnx_file(kind: type[nn.Module], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    path = tmp_path / "loop.onnx"
    export_program(cached(kind, "onnxruntime").program, path)
    assert run_loop.compare(path, cached(kind, "onnxruntime").program)["status"] == "pass"


@pytest.mark.parametrize("kind", [LSTM, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in (MinGRU, Stable))])
@pytest.mark.parametrize(("draft", "shape"), [("text", "chain:3"), ("self", "2x1")])
def test_drafts_are_checked_on_the_state(kind: type[nn.Module], draft: str, shape: str) -> None:
    """A chain of drafts, and a tree of them by its parents; rejected ones leave no trace."""
    passes = [make("kv-cache"), make("tree-draft", {"draft": draft, "shape": shape})]
    made = aropt.optimize(plain(kind), target="eager", passes=passes)
    assert [p["status"] for p in made.report["passes"]] == ["applied"] * 2
    assert made.report["verify"]["status"] == "pass"
    assert ("aropt.scan_tree" in text(made.program)) == (draft == "self")
    for params in ({}, DRAWN):
        assert made.generate(PROMPTS[:1], 9, **params) == generate(plain(kind), PROMPTS[:1], 9, **params)


def test_ngram_drafts_say_why_they_skip() -> None:
    passes = [make("kv-cache"), make("ngram-draft")]
    made = aropt.optimize(plain(MinGRU), target="eager", passes=passes, check=False)
    found = {p["name"]: p for p in made.report["passes"]}["ngram-draft"]
    assert found["status"] == "skipped" and "can't be taken back of its recurrent state" in found["reason"]


def test_the_text_shows_the_body_and_comes_back() -> None:
    """Through JSON; another body is another program, and one that may not run is refused where it is read."""
    program = cached(MinGRU, "onnxruntime").program
    shown = text(program)
    assert "  v0 = aten.rsub.Scalar(x0, 1)\n" in shown and "  return [v3], [v3]\n" in shown
    data = json.loads(json.dumps(to_json(program), allow_nan=False))
    again = from_json(data, program.weights)
    assert digest(again) == digest(program) and text(again) == shown
    other = json.loads(json.dumps(data).replace("aten.rsub.Scalar(x0, 1)", "aten.rsub.Scalar(x0, 2)"))
    assert digest(from_json(other, program.weights)) != digest(program)
    for instead, why in (
        ("from_file.default('secret')", "none of the ops"),
        ("full.default([99999999], 0)", "too many"),
    ):
        bad = json.loads(json.dumps(data).replace("return [v3]", f"v4 = aten.{instead}\\nreturn [v3]"))
        with pytest.raises(UsageError, match=why):
            from_json(bad, program.weights)


def test_what_torch_exported_is_taken(tmp_path: Path) -> None:
    """A .pt2 file holds the scan and its body as data."""
    shapes = ({0: torch.export.Dim("b"), 1: torch.export.Dim("s", max=CAPACITY)},)
    ids = torch.randint(0, VOCAB, (3, 7))
    exported = torch.export.export(Model(LSTM, 2).eval(), (ids,), dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "scanned.pt2")
    program = aropt.capture(str(tmp_path / "scanned.pt2"))
    assert generate(program, PROMPTS, 6) == generate(plain(LSTM), PROMPTS, 6)


class Odd(nn.Module):
    """A scan that is no recurrence over the sequence."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        def add(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = h + row
            return h, h.clone()

        def within(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = h + row - row.mean(0, keepdim=True)
            return h, h.clone()

        def in_place(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h.add_(row)
            return h.clone(), h.clone()

        def same(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = h + row
            return h, h

        def joined(h: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.cat([row[:, :1], h[:, 1:]], 1)
            return h, row * h.sum(1, keepdim=True)

        zeros = x.new_zeros(x.shape[0], D)
        body = {"mutates": in_place, "aliases": same, "mixes sequences": within}.get(self.kind, add)
        if self.kind == "reverse":
            return scan(add, zeros, x, dim=1, reverse=True)[1]  # type: ignore[no-any-return]
        if self.kind == "along features":
            return scan(add, x.new_zeros(x.shape[:2]), x.permute(2, 0, 1))[1].permute(1, 2, 0)  # type: ignore[no-any-return]
        if self.kind == "carry of the length":
            return scan(joined, x.new_zeros(x.shape[:2]), x, dim=1)[1]  # type: ignore[no-any-return]
        if self.kind == "without batch":
            return scan(lambda h, row: (h + 1, row * h), torch.zeros(1), x, dim=1)[1]  # type: ignore[no-any-return]
        if self.kind == "starts from the tokens":
            return scan(add, x[:, 0].clone(), x, dim=1)[1]  # type: ignore[no-any-return]
        last, y = scan(body, zeros, x, dim=1)
        return y + last.unsqueeze(1) if self.kind == "reads the last state" else y  # type: ignore[no-any-return]


REFUSED = {
    "reverse": "from the last row to the first",
    "along features": "over an axis of size 8, which is not the sequence",
    "carry of the length": "a state is [B, ...] of fixed sizes",
    "without batch": "a carry has shape [1], and a state is [B, ...]",
    "mutates": "input mutation",
    "aliases": "aliasing",
    "mixes sequences": "along the batch",
    "starts from the tokens": "selects along the sequence",
    "reads the last state": "leaves state behind",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_scans_are_refused_by_name(kind: str) -> None:
    """With the module's path and class, in a sentence, and what to do."""
    model = Model(MinGRU).eval()
    model.mixers[0] = Odd(kind)
    with pytest.raises(Unsupported) as refusal:
        program = aropt.capture(model)
        restrict(forward(program), program.weights, CAPACITY)
    named = "mixers.0" if kind == "starts from the tokens" else "mixers.0 (Odd)"  # there it is the row that is taken
    assert named in refusal.value.where and REFUSED[kind] in refusal.value.why, refusal.value
    assert refusal.value.hint


def test_the_command_line_ends_with_unsupported(tmp_path: Path) -> None:
    (tmp_path / "odd.py").write_text(
        "from tests.restrict.test_scans import MinGRU, Model, Odd\n\n\ndef build():\n"
        "    model = Model(MinGRU)\n    model.mixers[0] = Odd('reverse')\n    return model\n"
    )
    words = ["-m", "aropt.cli.main", "optimize", "odd.py:build", "-o", "out"]
    environment: dict[str, Any] = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 4 and "mixers.0 (Odd)" in done.stderr, done.stdout + done.stderr


def test_a_body_that_mixes_sequences_is_caught_by_validation_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it not refused, padding in one sequence would change another."""
    monkeypatch.setattr(bodies.Body, "require_rows", lambda *_: None)
    monkeypatch.setattr(bodies.Body, "classify", lambda self, node: bodies.Info((bodies.B,)))
    model = Model(MinGRU).eval()
    model.mixers[0] = Odd("mixes sequences")
    with pytest.raises(AroptError, match="differ"):
        aropt.optimize(aropt.capture(model), target="eager", passes=[make("kv-cache")])


def test_padding_that_changes_a_carry_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op for which every row counts differs in a batch of several lengths."""
    right = kernel.OP.reference

    def every_row(*args: Any) -> Any:
        return right(*args[:-1], None if args[-1] is None else args[-1].clamp(min=0))

    monkeypatch.setattr(kernel, "reference", every_row)
    with pytest.raises(AroptError, match="differ"), torch.library._scoped_library("aropt", "IMPL") as library:
        library.impl("scan", every_row, "CPU", allow_override=True)
        aropt.optimize(plain(LSTM), target="eager", passes=[make("kv-cache")])
