"""State-space and hybrid models of transformers: computed in chunks, in ragged batches, against the whole forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported
from aropt.frontend import known_mixers
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


def test_the_whole_loop_of_a_recurrence_is_one_onnx_file() -> None:
    """Its prefill scans rows in ONNX's own operator; its tokens are those of the forward."""
    program = aropt.optimize(aropt.capture(build("mamba"), capacity=32), target="onnxruntime")
    assert program.report["verify"]["status"] == "pass"
    statuses = {p["name"]: p["status"] for p in program.report["passes"]}
    assert statuses["kv-cache"] == "applied"


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
