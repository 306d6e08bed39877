"""State-space and hybrid models of transformers: computed in chunks, in ragged batches, against the whole forward."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported
from aropt.ir import known_mixers
from aropt.kernels import causal_conv1d, gated_delta, kda, selective_scan, ssd_scan
from aropt.pipeline.registry import make
from tests.support.equivalence import check
from tests.support.run import generate
from tests.support.sweep import CAPACITY, RECURRENT, VOCAB, build

pytest.importorskip("transformers", reason="needs aropt[hf]")
OPS = {op.OP.name for op in (causal_conv1d, gated_delta, kda, selective_scan, ssd_scan)}
QUICK = {"mamba", "mamba2"}
SPREAD = [pytest.param(name, marks=[pytest.mark.exhaustive] * (name not in QUICK)) for name in RECURRENT]


@pytest.mark.parametrize("name", SPREAD)
def test_chunks_of_ragged_sequences_equal_the_forward(name: str) -> None:
    """Within the noise floor, against the model in double precision."""
    result, restricted = check(build(name), VOCAB, CAPACITY)
    assert result.ok and result.reach > 100 * result.floor, result
    kinds = {state.kind for state in restricted.state.values()}
    assert "recurrent" in kinds


@pytest.mark.parametrize("name", ["lfm2", pytest.param("kimi_linear", marks=pytest.mark.exhaustive)])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """Each sequence of a batch of three lengths gets what the forward of all its tokens gives."""
    model = build(name)
    passes = [make(n) for n in ("canonicalize", "kv-cache", "prune")]
    program = aropt.optimize(aropt.capture(model, capacity=32), target="eager", passes=passes, check=False)
    assert {p["name"]: p["status"] for p in program.report["passes"]}["kv-cache"] == "applied"
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    made = generate(program, prompts, 8)
    for prompt, found in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(8):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        assert list(found)[-8:] == ids[0, len(prompt) :].tolist()


@pytest.mark.exhaustive  # test_mixers has one that is quick
def test_the_whole_loop_of_a_recurrence_is_one_onnx_file(tmp_path: Path) -> None:
    """Its prefill scans rows in ONNX's own operator; its tokens are those of the program."""
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    program = aropt.optimize(aropt.capture(build("mamba"), capacity=32), target="onnxruntime")
    assert program.report["verify"]["status"] == "pass"
    statuses = {p["name"]: p["status"] for p in program.report["passes"]}
    assert statuses["kv-cache"] == "applied"
    export_program(program.program, tmp_path / "loop.onnx")
    assert run_loop.compare(tmp_path / "loop.onnx", program.program)["status"] == "pass"


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):  # type: ignore[no-untyped-def]
    """mamba_ssm's, as its own reference is written."""
    delta = F.softplus(delta + delta_bias[:, None]) if delta_softplus else delta
    h, found = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + delta[..., t, None] * B[:, None, :, t] * u[..., t, None]
        found.append((h * C[:, None, :, t]).sum(2))
    return (torch.stack(found, 2) + D[:, None] * u) * F.silu(z)


def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, **rest):  # type: ignore[no-untyped-def]
    """fla's, row by row."""
    state, found = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state
        learned = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t, :, :, None] * learned[:, :, None]
        found.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t] * scale))
    return torch.stack(found, 1), None


class Remote(nn.Module):
    """Code that calls both kernels by their public names and arguments."""

    capacity = 24

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix, self.head = nn.Embedding(VOCAB, 8), nn.Linear(8, 32), nn.Linear(8, VOCAB)
        self.decay, self.bias = nn.Parameter(torch.rand(8, 4)), nn.Parameter(torch.rand(8))

    def forward(self, ids: Tensor) -> Tensor:
        u, delta, b, c, z = self.mix(self.embedding(ids)).transpose(1, 2).split([8, 8, 4, 4, 8], 1)
        x = selective_scan_fn(u, delta, -self.decay, b, c, self.bias, z=z, delta_bias=self.bias, delta_softplus=True)
        q, k, v, g = (t.unflatten(2, (2, 4)) for t in self.mix(x.transpose(1, 2)).chunk(4, 2))
        k, gate = F.normalize(k, dim=3), g[..., 0].sigmoid()
        o, _ = chunk_gated_delta_rule(q, k, v, gate.log(), gate, scale=0.3, output_final_state=False)
        return self.head(o.flatten(2))  # type: ignore[no-any-return]


def test_code_that_calls_the_kernels_is_taken() -> None:
    result, restricted = check(Remote(), VOCAB, 12, rounds=1)
    assert result.ok and result.reach > 100 * result.floor, result
    assert [s.kind for s in restricted.state.values()].count("recurrent") == 2


def test_functions_stand_again_after_a_capture() -> None:
    model = build("lfm2")
    import transformers.models.lfm2.modeling_lfm2 as file

    before = file.causal_conv1d_fn
    graph = aropt.capture(model, capacity=32).graphs["model"]
    assert file.causal_conv1d_fn is before
    assert {str(n.target).split(".")[1] for n in graph.fx.nodes if "aropt" in str(n.target)} <= OPS


def test_an_op_that_is_not_the_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The captured graph is held against the module with its own functions."""
    monkeypatch.setattr(known_mixers, "EPS", 0.3)
    with pytest.raises(Unsupported, match="can't be captured") as refusal:
        aropt.capture(build("qwen3_5_text"), capacity=32)
    assert "other logits" in refusal.value.why


class Looped(nn.Module):
    """A recurrence in Python."""

    def forward(self, x: Tensor) -> Tensor:
        state, found = torch.zeros_like(x[:, 0]), []
        for row in range(x.shape[1]):
            state = torch.tanh(state + x[:, row])
            found.append(state)
        return torch.stack(found, 1)


class Model(nn.Module):
    capacity = 24

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mixer, self.head = nn.Embedding(VOCAB, 8), Looped(), nn.Linear(8, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mixer(self.embedding(ids)))  # type: ignore[no-any-return]


def test_a_loop_over_the_sequence_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="mixes the sequence in a loop") as refusal:
        aropt.capture(Model())
    assert refusal.value.where == "mixer (Looped)" and "ops for 3 tokens" in refusal.value.why
    assert "adding_a_mixer" in refusal.value.hint
