"""int8-linears: what weights of eight bits lose is measured, and what follows is held to them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import aropt
from aropt.errors import UsageError
from aropt.ir import ops
from aropt.kernels import linear_int8 as op
from aropt.models.shuffle import Shape, ShuffleAR
from aropt.passes.int8_linears import Int8Linears
from aropt.passes.merge_linears import MergeLinears
from aropt.pipeline.checks import Instruments
from aropt.pipeline.compiled import Compiled
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.rewriting.contract import Applies, Skips
from aropt.validate import drift
from aropt.validate.compare import validate, with_probe
from aropt.validate.oracle import Oracle, noise_floor
from tests.support.run import generate
from tests.support.targets import EAGER
from tests.support.wide import CAPACITY, VOCAB, WIDTH, Model, plain

SEEDS = st.integers(0, 2**31)
ASKED = "int8-linears:least=1000"
LOOSE = {"kl": 1.0}


@cache
def optimized(target: str = "eager", **budget: float) -> Compiled:
    return aropt.optimize(plain(), target, pipeline([ASKED]), budget=budget or LOOSE, threads=1)


def entry(made: Compiled) -> dict[str, Any]:
    return next(p for p in made.report["passes"] if p["name"] == "int8-linears")


# --- the op ----------------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from(op.SIZES), st.sampled_from([1e-20, 1.0, 1e10]))
def test_a_weight_is_off_by_half_a_step(seed: int, size: int, scale: float) -> None:
    w = torch.randn(5, 2 * size, generator=torch.Generator().manual_seed(seed)) * scale
    w[1, :size] = 0
    weight, scales = op.packed(w, size)
    off = (op.unpacked(weight, scales) - w).abs().unflatten(1, (2, size))
    assert bool((off <= 0.5001 * scales.unsqueeze(2)).all()) and not bool(off[1, 0].any())
    assert weight.min() >= 1, "whole numbers are symmetric"


@given(SEEDS, st.sampled_from(op.SIZES))
def test_a_large_feature_spoils_its_group_alone(seed: int, size: int) -> None:
    x = torch.randn(3, 3 * size, generator=torch.Generator().manual_seed(seed))
    calm, x[:, 0] = op.rounded(x, size), 1e6
    found = op.rounded(x, size)
    assert torch.equal(found[:, size:], calm[:, size:]) and not torch.equal(found[:, :size], calm[:, :size])


@given(SEEDS)
def test_rows_are_independent(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, weights = torch.randn(4, 96, generator=g), op.packed(torch.randn(7, 96, generator=g), 32)
    each = torch.cat([op.reference(row[None], *weights) for row in x])
    torch.testing.assert_close(op.reference(x, *weights), each, rtol=1e-5, atol=1e-5)


def test_tiny_groups_are_zeros() -> None:
    x = torch.tensor([[1e-38] * 31 + [0.0], [1e-35] * 31 + [1e-20]])
    found = op.rounded(x, 32)
    assert bool(torch.isfinite(found).all()) and not bool(found[0].any()) and bool(found[1].any())


def test_what_it_does_not_take() -> None:
    weight, scales = op.packed(torch.randn(3, 64), 32)
    for x, error in ((torch.randn(2, 32), RuntimeError), (torch.randn(2, 64).half(), TypeError)):
        with pytest.raises(error):
            op.reference(x, weight, scales)
    with pytest.raises(TypeError):
        op.reference(torch.randn(2, 64), weight.to(torch.int8), scales)


# --- the pass --------------------------------------------------------------------------------------------------------


def test_it_has_to_be_asked_for_with_a_budget() -> None:
    assert "int8-linears" not in {p.name for p in pipeline()}
    with pytest.raises(UsageError, match="lossy") as caught:
        run_passes(plain(), pipeline([ASKED]), "eager")
    assert "--budget" in str(caught.value)


def test_which_layers() -> None:
    found = Int8Linears(least=1000).plan(plain(), EAGER)
    assert isinstance(found, Applies) and "14 linear layers" in found.matches[0]
    assert {n for n, _ in found.rejected} == {"head.weight", "rest.weight"}
    assert all("less than least=1000" in why for _, why in found.rejected)
    nothing = Int8Linears().plan(plain(), EAGER)
    assert isinstance(nothing, Skips) and len(nothing.rejected) == 16
    with pytest.raises(UsageError, match="group=48"):
        make("int8-linears", {"group": "48"})


def test_groups_that_divide_and_weights_that_are_none() -> None:
    one = Int8Linears(group=128, least=1).bits
    assert [one.size(torch.zeros(2, n)) for n in (256, 192, 96, 40)] == [128, 64, 32, 0]
    assert "no groups" in one.unfit(torch.zeros(4, 40))
    assert "not finite" in one.unfit(torch.full((4, 64), torch.nan))
    assert "float16" in one.unfit(torch.zeros(4, 64, dtype=torch.float16))


def test_the_program_is_held_to_its_own_weights_of_eight_bits() -> None:
    made = optimized()
    assert entry(made)["status"] == "applied" and made.report["verify"]["status"] == "pass"
    assert made.report["drift"]["kl"] > 0
    weights = [n for n in made.program.weights if "int8" in n]
    assert weights and all(made.program.weights[n].dtype == torch.uint8 for n in weights)
    assert not any(w.is_floating_point() and w.numel() >= WIDTH * WIDTH for w in made.program.weights.values())
    prompts = [[1, 2, 3], [7]]
    held = run_passes(plain(), pipeline([ASKED]), "eager", Instruments(check=False, budget=LOOSE)).reference
    assert any("int8" in n for n in held.weights) and generate(made, prompts, 8) == generate(held, prompts, 8)
    levels = [e.level for e in made.program.ledger]
    assert levels[-1] in ("rounding", "bitwise") and "lossy" in levels


def test_the_drift_is_that_of_two_forwards() -> None:
    """KL of the float model against the rounded one, after the rounded one's own ids."""
    changed = Int8Linears(least=1000).run(plain())
    found = drift.measure(plain(), with_probe(changed))
    case = drift.workload(plain())
    kl, same = [], []
    for prompt in case.prompts:
        ids = [*prompt, *generate(changed, [list(prompt)], case.n)[0]]
        p, q = (
            program.graphs["model"].bind(program.weights)(torch.tensor([ids[:-1]]))[0][0, len(prompt) - 1 :].double()
            for program in (plain(), changed)
        )
        kl.append(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert found.kl_max == pytest.approx(float(torch.cat(kl).max()), rel=1e-3)
    assert found.top1 == float(torch.cat(same).double().mean()) and found.measured == 2 * case.n
    assert len(found.steps) == case.n and found.tokens == 2 * case.n


def test_an_exact_program_does_not_drift() -> None:
    found = drift.measure(plain(), with_probe(plain()))
    assert (found.kl_max, found.top1, found.agreement, found.first) == (pytest.approx(0, abs=1e-9), 1.0, 1.0, -1)


def test_over_the_budget_it_is_reverted_and_said() -> None:
    made = optimized(kl=0.0)
    assert entry(made)["status"] == "reverted" and "kl" in entry(made)["reason"]
    assert any(
        "int8-linears is not in the result: kl" in n and "budget kl=0: give more" in n for n in made.report["notes"]
    )
    assert "drift" not in made.report and generate(made, [[1]], 6) == generate(plain(), [[1]], 6)


def test_layers_that_read_the_same_are_merged_with_the_same_bits() -> None:
    changed = Int8Linears(least=1000).run(plain())
    merged = MergeLinears().run(changed)
    count = [
        sum(n.target is ops.load("linear_int8").overload for n in p.graphs["model"].fx.nodes) for p in (changed, merged)
    ]
    assert count == [14, 8]
    ids = torch.tensor([[1, 5, 9, 2]])
    a, b = (p.graphs["model"].bind(p.weights)(ids)[0] for p in (changed, merged))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_onnxruntime_runs_its_own_operator() -> None:
    pytest.importorskip("onnxruntime", reason="needs aropt[onnx]")
    made = optimized("onnxruntime")
    assert made.report["verify"]["status"] == "pass"
    assert next(iter(made.report["nodes"].values()))["MatMulNBits"] == 8
    assert made.report["drift"]["kl"] < 0.01


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_ways_in_and_out_of_windows_are_left_to_their_fusion(window: int) -> None:
    torch.manual_seed(0)
    sizes = {"levels": 7, "classes": 3, "layers": 1, "heads": 2, "hidden": 64, "mixing": 32}
    model = ShuffleAR(Shape(side=4, window=window, width=64, **sizes)).eval()
    program = aropt.capture(model, prompts=[[8]], vocab=7, input_vocab=10, name="tiny", modality="image")
    results = run_passes(program, pipeline(["int8-linears:least=100"]), "eager", Instruments(budget=LOOSE))[1]
    found = {r.name: r for r in results}
    assert found["int8-linears"].status == "applied", found["int8-linears"].reason
    if window == 2:
        assert len(found["token-shuffle-fusion"].matches) >= 2
        assert any("token-shuffle-fusion" in why for _, why in found["int8-linears"].rejected)
    assert all(r.status != "reverted" for r in results)


@pytest.mark.exhaustive
def test_with_a_lossy_cache_on_a_canvas() -> None:
    """The second pass is measured against the first one's program, the lowered program against the model."""
    torch.manual_seed(0)
    program = aropt.capture(Model(causal=False).eval(), capacity=CAPACITY, vocab=VOCAB, mask=VOCAB - 1,
                            prompts=[[1, 2, 3], [4, 5]])  # fmt: skip
    both = pipeline([ASKED, "dual-cache"])
    made = aropt.optimize(program, "eager", both, budget={"kl": 1.0}, threads=1)
    lossy = [e for e in made.program.ledger if e.level == "lossy"]
    assert [e.name for e in lossy] == ["int8-linears", "dual-cache"] and made.report["verify"]["status"] == "pass"
    assert lossy[0].evidence["kl"] > 0 and made.report["drift"]["kl"] > 0


class Tied(nn.Module):
    """The head's weight is the embedding's, and a layer is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.twice = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.twice(self.embed(ids))
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return self.head(self.twice(x))


def test_a_tied_table_stays_beside_its_weights_of_eight_bits() -> None:
    torch.manual_seed(0)
    program = aropt.capture(Tied().eval(), capacity=CAPACITY, vocab=VOCAB, prompts=[[1, 2]])
    made = aropt.optimize(program, "eager", pipeline([ASKED]), budget=LOOSE, threads=1)
    assert made.report["verify"]["status"] == "pass" and entry(made)["status"] == "applied"
    assert {"embed.weight", "embed.weight_int8", "twice.weight_int8"} <= set(made.program.weights)
    assert "twice.weight" not in made.program.weights


class Written(nn.Module):
    """Products written out: with a bias over flat rows, as GPT-2's, and without."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.bias = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.randn(96))
        self.one, self.two, self.three = (nn.Parameter(torch.randn(m, n) * m**-0.5) for m, n in SHAPES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        h = torch.addmm(self.bias, x.view(-1, WIDTH), self.one).view(*x.shape[:-1], 96)
        return torch.mm((x + h @ self.two).flatten(0, 1), self.three).unflatten(0, ids.shape)


SHAPES = ((WIDTH, 96), (96, WIDTH), (WIDTH, VOCAB))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_products_that_are_written_out(seed: int) -> None:
    torch.manual_seed(0)
    program = aropt.capture(Written().eval(), capacity=CAPACITY, vocab=VOCAB, prompts=[[1, 2]])
    made = aropt.optimize(program, "eager", pipeline([ASKED]), budget=LOOSE, threads=1, seed=seed)
    assert made.report["verify"]["status"] == "pass" and "3 linear layers" in entry(made)["matches"][0]
    assert sum("int8" in n for n in made.program.weights) == 3 and made.report["drift"]["kl"] < 0.01


def test_prompts_that_are_too_long_leave_others_their_room() -> None:
    program = plain().replace(meta={**plain().meta, "prompts": [[1] * 40, [2] * CAPACITY, [3, 4], [5]]})
    case = drift.workload(program)
    half = CAPACITY // 2
    assert case.prompts == ((1,) * half, (3, 4), (5,)) and case.n == half + 1
    with pytest.raises(UsageError, match="no prompts"):
        drift.workload(plain().replace(meta={**plain().meta, "prompts": []}))


def test_what_can_not_be_measured_is_over_the_budget() -> None:
    found = drift.measure(plain(), with_probe(plain()))
    for bounds in ({"kl": 1.0}, {"top1": 0.0}):
        broken = replace(found, kl=float("nan"), top1=float("nan"))
        assert broken.misses(bounds) and not found.misses(bounds)
    with pytest.raises(UsageError, match="on canvases"):
        optimized(quality=0.1)


def test_guidance_counts_with_both_branches() -> None:
    torch.manual_seed(0)
    program = aropt.capture(Model().eval(), capacity=CAPACITY, vocab=VOCAB, prompts=[[1, 2, 3]], null=0,
                            rules=("temperature", "guidance"))  # fmt: skip
    changed = Int8Linears(least=1000).run(program)
    found = drift.measure(program, with_probe(changed))
    case = drift.workload(program)
    ids = generate(changed, [list(case.prompts[0])], case.n)[0]
    logits = []
    for one in (program, changed):
        model = one.graphs["model"].bind(one.weights)
        c, u = (model(torch.tensor([[*start, *ids[:-1]]]))[0][0, 2:].double() for start in ([1, 2, 3], [0, 2, 3]))
        logits.append((u + float(program.inputs["guidance"].default or 1) * (c - u)).log_softmax(-1))
    kl = F.kl_div(logits[1], logits[0], log_target=True, reduction="none").sum(-1)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)


# --- validation ------------------------------------------------------------------------------------------------------


def test_the_noise_floor_knows_of_steps() -> None:
    """Two orders of the same sums cross a step here or there; the floor of a plain program is as it was."""
    changed = Int8Linears(least=1000).run(plain())
    ids = torch.arange(CAPACITY)[None] % VOCAB
    floors = [noise_floor(*(found["logits"] for found in Oracle(p).forward({"ids": ids}))) for p in (plain(), changed)]
    assert floors[0] < 1e-5 < floors[1] < 1e-2
    graph = changed.graphs["model"].bind({n: w * (1 + 2e-7) if w.is_floating_point() else w
                                          for n, w in changed.weights.items()})  # fmt: skip
    assert float((graph(ids)[0] - Oracle(changed).forward({"ids": ids})[0]["logits"]).abs().max()) < 16 * floors[1]


@settings(deadline=None, max_examples=3)
@given(st.integers(0, 6), st.sampled_from(["weights", "groups"]))
def test_wrong_weights_are_found(layer: int, what: str) -> None:
    changed = Int8Linears(least=1000).run(plain())
    name = [n for n in changed.weights if n.endswith("_int8")][layer]
    weights = dict(changed.weights)
    if what == "weights":
        weights[name] = weights[name].flip(0)
    else:
        weights[name.replace("_int8", "_scales")] = weights[name.replace("_int8", "_scales")].flip(1).flip(0)
    verdict = validate(changed, with_probe(changed.replace(weights=weights)))
    assert not verdict.passed and verdict.diverges is not None
    assert "linear_int8" in verdict.diverges["op"] and ".".join(name.split(".")[:2]) in verdict.diverges["module"]
