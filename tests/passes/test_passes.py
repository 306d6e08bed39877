"""The passes and their manager: what fires, what must not, what is reverted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import aropt
from aropt.errors import AroptError, Unsupported, UsageError
from aropt.ir.control import calls, loops
from aropt.ir.liveness import outputs_needed
from aropt.ir.program import Program
from aropt.passes.canonicalize import Canonicalize
from aropt.passes.fuse_sampler import FuseSampler
from aropt.passes.kv_cache import KvCache
from aropt.passes.prune import Prune
from aropt.pipeline.bisect import bisect
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, names, parse, pipeline
from aropt.rewriting.contract import Applies, Contract, Skips, planned
from aropt.rewriting.target import Target
from tests.support.run import generate
from tests.support.targets import EAGER


class Tiny(nn.Module):
    """One grouped attention with written-out RMS norms, as transformers writes them."""

    capacity = 24

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 16)
        self.q, self.kv, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 13)
        self.norm = nn.Parameter(torch.rand(16) + 0.5)
        self.causal = causal

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        b, t = ids.shape
        x = self.embed(ids)
        h = self.norm * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        q = self.q(h).view(b, t, 4, 4).transpose(1, 2)
        k, v = self.kv(h).view(b, t, 2, 8).transpose(1, 2).chunk(2, -1)
        k, v = (y[:, :, None].expand(b, 2, 2, t, 4).reshape(b, 4, t, 4) for y in (k, v))
        mask = torch.ones(t, t, dtype=torch.bool).tril() if self.causal else None
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x + mixed.transpose(1, 2).reshape(b, t, 16))


@pytest.fixture(scope="module")
def plain() -> Program:
    return aropt.capture(Tiny())


def ops_of(program: Program, graph: str) -> list[str]:
    return [str(n.target) for n in program.graphs[graph].fx.nodes if n.op == "call_function"]


def test_pipeline_makes_one_call_a_round(plain: Program) -> None:
    fast, results, _ = run_passes(plain, pipeline(), "eager")
    statuses = {r.name: r.status for r in results}
    assert statuses.pop("fuse-attention") == "skipped", "eager has no kernel for it"
    for name in ("block-cache", "guide-cache", "fuse-canvas", "fuse-tree", "cfg-batch", "token-shuffle-fusion"):
        assert statuses.pop(name) == "skipped", "it has no canvas, no drafts, no guidance and no windows"
    assert set(statuses.values()) == {"applied"}, [r.reason for r in results]
    assert [len(list(calls(loop.body))) for loop in loops(fast.control)] == [1, 1]
    step = fast.graphs["step_greedy"]
    assert "logits" not in step.outputs and "row" not in step.outputs and "emitted" in step.outputs
    assert "tokens" not in fast.state, "nobody reads the growing tokens any more"
    assert [e.name for e in fast.ledger] == list(statuses)
    prompts = [[1, 2, 3], [4]]
    assert generate(fast, prompts, 10) == generate(plain, prompts, 10)
    assert generate(fast, prompts, 10, temperature=1.0, seed=9) == generate(plain, prompts, 10, temperature=1.0, seed=9)


def test_canonicalize_finds_norm_and_groups(plain: Program) -> None:
    changed = Canonicalize().run(plain)
    assert ops_of(changed, "model").count("aten.rms_norm.default") == 1
    assert "aten.rsqrt.default" not in ops_of(changed, "model") and "aten.expand.default" not in ops_of(
        changed, "model"
    )
    assert KvCache().run(changed).state["k_0"].spec.dims[1] == 2, "the cache keeps the heads that are not repeated"
    assert isinstance(Canonicalize().plan(changed, EAGER), Skips)
    assert KvCache().run(Canonicalize(heads=False).run(plain)).state["k_0"].spec.dims[1] == 2


def test_canonicalize_brings_written_out_attention_to_sdpa() -> None:
    class Written(Tiny):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            b, t = ids.shape
            x = self.embed(ids)
            q, k = (y.view(b, t, 2, 8).transpose(1, 2) for y in (self.q(x), self.kv(x)))
            mask = torch.ones(t, t, dtype=torch.bool).tril()
            scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~mask, -torch.inf)
            return self.out((scores.softmax(-1) @ k).transpose(1, 2).reshape(b, t, 16))

    plain = aropt.capture(Written())
    changed = Canonicalize().run(plain)
    assert ops_of(changed, "model").count("aten.scaled_dot_product_attention.default") == 1
    assert "aten.scaled_dot_product_attention.default" not in ops_of(Canonicalize(attention=False).run(plain), "model")
    assert generate(KvCache().run(changed), [[1, 2]], 6) == generate(plain, [[1, 2]], 6)


def test_canonicalize_leaves_other_norms_alone() -> None:
    class Other(Tiny):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            wrong_value = x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + 1e-6)
            wrong_axis = x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + 1e-6)
            return self.out(wrong_value + wrong_axis)

    assert isinstance(Canonicalize().plan(aropt.capture(Other()), EAGER), Skips)


def test_kv_cache_refuses_a_bidirectional_model() -> None:
    with pytest.raises(Unsupported, match="bidirectional") as error:
        KvCache().plan(aropt.capture(Tiny(causal=False)), EAGER)
    assert "--loop unmask" in error.value.hint and "scaled_dot_product_attention" in error.value.where


def test_kv_cache_does_not_fire_twice(plain: Program) -> None:
    assert isinstance(planned(KvCache(), KvCache().run(plain), EAGER), Skips)


def test_fuse_alone_keeps_the_full_forward(plain: Program) -> None:
    fused = FuseSampler().run(plain)
    assert generate(fused, [[1, 2]], 6) == generate(plain, [[1, 2]], 6)
    assert isinstance(FuseSampler().plan(fused, EAGER), Skips)


def test_prune_keeps_what_a_loop_carries(plain: Program) -> None:
    pruned = Prune().run(plain)
    assert "tokens" in outputs_needed(pruned)["append"], "the full forward reads the tokens of the round before"
    assert isinstance(Prune().plan(Prune().run(FuseSampler().run(KvCache().run(plain))), EAGER), Skips)


@dataclass(frozen=True)
class Sabotage:
    """A pass that breaks the rule: the tokens are no longer the model's."""

    amount: float = 0.5
    name: ClassVar[str] = "sabotage"
    contract: ClassVar[Contract] = Contract("bitwise")

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        return Applies(("everywhere",))

    def run(self, program: Program) -> Program:
        weights = {n: w + self.amount if n == "out.bias" else w for n, w in program.weights.items()}
        weights["out.bias"] = torch.roll(weights["out.bias"], 1)
        return program.replace(weights=weights)


def test_a_wrong_pass_is_reverted_and_explained(plain: Program) -> None:
    with pytest.raises(AroptError, match="sabotage fails") as error:  # a pass is never lost in silence
        run_passes(plain, [Sabotage()], "eager")
    assert error.value.code == 1 and "noise floor" in error.value.why and "--keep-going" in error.value.hint
    after, results, _ = run_passes(plain, [Sabotage()], "eager", Instruments(keep_going=True))
    assert after is plain and results[0].status == "reverted"
    assert "noise floor" in results[0].reason and "repro: aropt.generate(program, " in results[0].reason
    assert "aten::linear" in results[0].reason, results[0].reason


def test_bisect_names_the_pass(plain: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = [Canonicalize(), KvCache(), Sabotage(), FuseSampler()]
    assert bisect(plain, chosen, "eager", lambda _: None) == "sabotage"
    assert bisect(plain, chosen[:2], "eager", lambda _: None) is None


def test_options_are_parsed_and_checked() -> None:
    assert make(*parse("prune:fold=false,limit=3")) == Prune(fold=False, limit=3)
    assert [p.name for p in pipeline(dropped=["prune"])] == [n for n in names("default") if n != "prune"]
    for text, message in (
        ("prune:fold=maybe", "no value"),
        ("prune:limits=1", "no option"),
        ("prun", "unknown pass"),
        ("prune:fold", "not an option"),
    ):
        with pytest.raises(UsageError, match=message):
            make(*parse(text))


def test_each_prompt_has_a_noise_stream(plain: Program) -> None:
    with pytest.raises(UsageError, match="1 noise streams for 2 prompts"):
        generate(plain, [[1], [2]], 2, streams=[0])


def test_instruments_dump_each_stage(plain: Program, tmp_path: Any) -> None:
    shown: list[str] = []
    run_passes(
        plain,
        pipeline(),
        "eager",
        Instruments(
            show=shown.append, print_after=frozenset({"prune"}), print_diff=True, dump_dir=tmp_path, check=False
        ),
    )
    assert sorted(f.name for f in tmp_path.iterdir())[:2] == ["01-canonicalize.after.txt", "01-canonicalize.diff"]
    assert (
        sum(s.startswith("// after prune") for s in shown) == 1 and sum(s.startswith("// diff of") for s in shown) == 5
    )
