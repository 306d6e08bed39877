"""Rules that look back: re-masking, credit and smoothing against plain Python, on all targets, with lossy caches."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import aropt
from aropt.errors import Unsupported, UsageError
from aropt.exporters.whole_loop import export_program
from aropt.ir.program import Program
from aropt.loops.unmask.commit import chosen
from aropt.models.canvas import MASK, VOCAB, CanvasLM
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import make, pipeline
from aropt.targets import lower
from aropt.targets.ort import run_loop
from aropt.validate.compare import cases, validate, with_probe
from aropt.validate.drift import measure
from tests.support.canvases import capture, rounds, tiny
from tests.support.run import from_session, generate

PROMPTS = [[4, 5, 6], [7], [8, 9, 1, 2]]


@pytest.fixture(scope="module")
def model() -> CanvasLM:
    return tiny()


@pytest.fixture(scope="module")
def segments(model: CanvasLM) -> Program:
    return capture(model, "segments", "remask")


def canvases(program: Program, prompt: list[int], n: int, **params: Any) -> list[list[int]]:
    """The canvas after each round."""
    kept: list[list[int]] = []

    def keep(values: Any) -> None:
        kept.append(values["tokens"][0].tolist())
        assert len(kept) <= n  # it ends

    generate(program, [prompt], n, on_round=keep, **params)
    return kept


def runs(rows: list[int]) -> list[list[int]]:
    """Neighbours together."""
    found: list[list[int]] = []
    for row in rows:
        if found and found[-1][-1] == row - 1:
            found[-1].append(row)
        else:
            found.append([row])
    return found


@torch.no_grad()
def remasking(
    model: CanvasLM, prompt: list[int], n: int, block: int, low: float, how: dict[str, Any]
) -> list[list[int]]:
    """dInfer's get_transfer_index_hierarchy_remask in plain Python, block by block: the canvas after each round.

    `how`: threshold and low of its runs ("segments"); of a threshold or of a quota `steps` alone, no runs.
    """
    x, kept = torch.tensor([prompt + [MASK] * n]), []
    for begin in range(len(prompt), len(prompt) + n, block):
        inside, step = range(begin, begin + block), 0
        while left := [i for i in inside if x[0, i] == MASK]:
            logits = model(x)[0].double()
            logits[:, MASK] = -torch.inf
            best, ids = logits.softmax(-1).max(-1)
            again = [i for i in inside if x[0, i] != MASK and best[i] < low]
            able = sorted([*left, *again])
            if "steps" in how:
                stay = sum(block // how["steps"] + (j < block % how["steps"]) for j in range(step + 1, how["steps"]))
                take, least = set(), len(able) - stay
            else:
                take, least = {i for i in able if best[i] > how["threshold"]}, len(again) + 1
            if "low" in how:
                top = [max(run, key=lambda i: (float(best[i]), -i)) for run in runs(able)]
                take |= {i for i in top if best[i] > how["low"]}
            rest = sorted([i for i in able if i not in take], key=lambda i: (-float(best[i]), i))
            take |= set(rest[: max(0, least - len(take))])
            for i in able:
                x[0, i] = ids[i] if i in take else MASK
            kept.append(x[0].tolist())
            step += 1
    return kept


def again(kept: list[list[int]]) -> int:
    """How often a written id was masked or changed."""
    return sum(a != b and a != MASK for x, y in pairwise(kept) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("low", [0.1, 0.3, 0.9])
def test_remasking_is_that_of_dinfer(model: CanvasLM, segments: Program, low: float) -> None:
    revised = 0
    for prompt in PROMPTS:
        want = remasking(model, prompt, 16, 8, low, {"threshold": 0.5, "low": 0.15})
        params = {"threshold": 0.5, "low": 0.15, "remask_threshold": low, "block": 8}
        assert canvases(segments, prompt, 16, **params) == want
        revised += again(want)
        masks = [row.count(MASK) for row in want]
        assert all(a > b for a, b in pairwise(masks))  # so it ends
    assert revised


@pytest.mark.parametrize(("rule", "how"), [("threshold", {"threshold": 0.2}), ("uniform", {"steps": 3})])
def test_remasking_with_other_tests(model: CanvasLM, rule: str, how: dict[str, Any]) -> None:
    """What is written follows from the threshold, or from a quota: then no more rounds than its steps."""
    program = capture(model, rule, "remask")
    params = {**how, "steps": 6} if "steps" in how else how
    for prompt in PROMPTS:
        want = remasking(model, prompt, 16, 8, 0.3, how)
        assert canvases(program, prompt, 16, remask_threshold=0.3, block=8, **params) == want
        assert again(want) and ("steps" not in how or len(want) == 6)


def test_nothing_is_below_a_threshold_of_0(model: CanvasLM, segments: Program) -> None:
    plain = capture(model, "segments")
    params = {"threshold": 0.3, "low": 0.15, "block": 8}
    assert rounds(segments, PROMPTS, 16, remask_threshold=0.0, **params) == rounds(plain, PROMPTS, 16, **params)


def test_given_ids_are_not_masked_again(segments: Program) -> None:
    """However unsure the model is of them; nor those of a prompt in a block of the model's own."""
    fill = [5, MASK, MASK, 6, MASK, 7, 8, MASK]
    for kept in canvases(segments, [1, 2], 8, fill=[fill], block=8, remask_threshold=1.0, threshold=0.3):
        assert all(k == f for k, f in zip(kept[2:], fill, strict=True) if f != MASK)
    own = capture(tiny(8), "segments", "remask")
    assert all(kept[:3] == [1, 2, 3] for kept in canvases(own, [1, 2, 3], 13, remask_threshold=1.0))


@torch.no_grad()
def crediting(
    model: CanvasLM, prompt: list[int], n: int, block: int, tau: float, weight: float, power: float, decay: float
) -> list[list[int]]:
    """dInfer's CreditThresholdParallelDecoder in plain Python: the canvas after each round."""
    x, kept = torch.tensor([prompt + [MASK] * n]), []
    for begin in range(len(prompt), len(prompt) + n, block):
        credit = torch.zeros(block, VOCAB, dtype=torch.float64)
        while (x[0, begin : begin + block] == MASK).any():
            logits = model(x)[0, begin : begin + block].double()
            logits[:, MASK] = -torch.inf
            credit *= decay
            best, ids = logits.softmax(-1).max(-1)
            for i in range(block):
                if x[0, begin + i] == MASK:
                    credit[i, ids[i]] += best[i] ** power
            best, ids = (logits + weight * torch.log(credit + 1)).softmax(-1).max(-1)
            masked = [i for i in range(block) if x[0, begin + i] == MASK]
            top = max(masked, key=lambda i: (float(best[i]), -i))
            for i in masked:
                if i == top or best[i] >= tau:
                    x[0, begin + i] = ids[i]
            kept.append(x[0].tolist())
    return kept


@pytest.mark.parametrize(
    ("weight", "power", "decay"), [pytest.param(0.7, 0.2, 0.8, marks=pytest.mark.exhaustive), (3.0, 0.5, 0.95)]
)
def test_credit_is_that_of_dinfer(model: CanvasLM, weight: float, power: float, decay: float) -> None:
    """And it does change what is written."""
    program, plain = capture(model, "threshold", "credit"), capture(model, "threshold")
    params = {"credit_weight": weight, "credit_power": power, "credit_decay": decay}
    differs = False
    for prompt in PROMPTS:
        got = canvases(program, prompt, 16, threshold=0.25, block=8, **params)
        assert got == crediting(model, prompt, 16, 8, 0.25, weight, power, decay)
        differs |= got != canvases(plain, prompt, 16, threshold=0.25, block=8)
    assert differs


def test_credit_of_weight_0_is_the_plain_rule(model: CanvasLM) -> None:
    with_credit, plain = capture(model, "margin", "cosine", "credit"), capture(model, "margin", "cosine")
    for more in ({}, {"temperature": 0.9, "seed": 2}):
        params: dict[str, Any] = {"block": 8, "steps": 8, **more}
        assert rounds(with_credit, PROMPTS, 16, credit_weight=0.0, **params) == rounds(plain, PROMPTS, 16, **params)


@torch.no_grad()
def smoothing(
    model: CanvasLM, prompt: list[int], n: int, block: int, tau: float, shares: list[float]
) -> list[list[int]]:
    """dInfer's IterationSmooth with H2Embed in plain Python: the canvas after each round. `shares`: of each round."""
    x, kept, soft = torch.tensor([prompt + [MASK] * n]), [], torch.zeros(len(prompt) + n, 32)

    def mixed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        share = shares[min(len(kept), len(shares) - 1)]
        return out + share * torch.where((x == MASK)[..., None], soft, 0.0)

    hook = model.embed.register_forward_hook(mixed)
    for begin in range(len(prompt), len(prompt) + n, block):
        while left := [i for i in range(begin, begin + block) if x[0, i] == MASK]:
            logits = model(x)[0]
            soft = logits.softmax(-1) @ model.embed.weight
            logits[:, MASK] = -torch.inf
            best, ids = logits.softmax(-1).max(-1)
            top = max(left, key=lambda i: (float(best[i]), -i))
            for i in left:
                if i == top or best[i] >= tau:
                    x[0, i] = ids[i]
            kept.append(x[0].tolist())
    hook.remove()
    return kept


def test_smoothing_is_that_of_dinfer(model: CanvasLM) -> None:
    """And it does change what is written; with no share it is the plain rule."""
    program, plain = capture(model, "threshold", "smooth"), capture(model, "threshold")
    params = {"threshold": 0.25, "block": 8}
    differs = False
    for prompt in PROMPTS:
        got, before = canvases(program, prompt, 16, **params), canvases(plain, prompt, 16, **params)
        assert got == smoothing(model, prompt, 16, 8, 0.25, [0.0] + [min(0.15 + 0.02 * t, 0.3) for t in range(9)])
        most = {"smooth_start": 0.5, "smooth_growth": 0.1, "smooth_most": 0.9}
        got = canvases(program, prompt, 16, **params, **most)
        assert got == smoothing(model, prompt, 16, 8, 0.25, [0.0, 0.5, 0.6, 0.7, 0.8, 0.9])
        assert canvases(program, prompt, 16, smooth_most=0.0, **params) == before
        differs |= got != before
    assert differs


class Twice(nn.Module):
    """Looks its ids up in two tables, or in none."""

    def __init__(self, tables: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, 8) for _ in range(tables))
        self.head, self.capacity = nn.Linear(8 if tables else 20, 20), 16

    def forward(self, ids: Tensor) -> Tensor:
        rows: Any = sum(t(ids) for t in self.tables) if self.tables else nn.functional.one_hot(ids, 20).float()
        logits: Tensor = self.head(rows)
        return logits


@pytest.mark.parametrize("tables", [0, 2])
def test_smoothing_needs_one_embedding(tables: int) -> None:
    with pytest.raises(Unsupported, match="no embedding of the canvas") as error:
        aropt.capture(Twice(tables), mask=3, rules=("smooth",))
    assert error.value.code == 4 and ("tables.1" if tables else "aten::") in error.value.where


ALL = ("credit", "smooth", "remask", "segments")
PARAMS = {"threshold": 0.3, "low": 0.15, "remask_threshold": 0.3, "block": 4}


@pytest.fixture(scope="module")
def together(model: CanvasLM) -> Program:
    program = capture(model, *ALL)
    return program.replace(meta={**program.meta, "prompts": PROMPTS})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dual-cache", {}),
        pytest.param("dkv-cache", {"refresh": "4"}, marks=pytest.mark.exhaustive),
        ("free-cache", {"left": "2", "right": "6"}),
    ],
)
def test_with_lossy_caches(together: Program, name: str, options: dict[str, str]) -> None:
    """Each sequence alone has the ids of the batch; stale rows change ids; refreshed in each round there is no loss."""
    fast = make(name, options).run(together)
    got = generate(fast, PROMPTS, 16, **PARAMS)
    assert got == [generate(fast, [p], 16, streams=[i], **PARAMS)[0] for i, p in enumerate(PROMPTS)]
    assert got != generate(together, PROMPTS, 16, **PARAMS)
    always = with_probe(make(name, {"refresh": "1"}).run(together))
    assert validate(together, always, chosen=cases(together, quick=True)).passed
    none, some = measure(together, always), measure(together, with_probe(fast))
    assert none.kl < 1e-9 < some.kl and none.agreement == 1


def test_rows_that_are_looked_at_again_are_computed(together: Program) -> None:
    """All that were masks of the block at hand; and what changed is computed before it is read again."""
    fast = make("dkv-cache", {"refresh": "100"}).run(together)
    canvases, computed = [[7] + [MASK] * 16], []

    def keep(values: Any) -> None:
        canvases.append(values["tokens"][0].tolist())
        computed.append(set(values["slots"][0].tolist()))

    generate(fast, [[7]], 16, on_round=keep, **{**PARAMS, "remask_threshold": 0.9, "block": 8})
    for number, rows in enumerate(computed):
        begin = 1 + (canvases[number].index(MASK) - 1) // 8 * 8
        assert set(range(begin, begin + 8)) <= rows
        last = canvases[number - 1] if number else canvases[0]
        assert {i for i, (a, b) in enumerate(zip(last, canvases[number], strict=True)) if a != b} <= rows
    assert again(canvases[1:]) and any(len(rows) < 17 for rows in computed)


def test_what_is_expected_of_rows_left_alone_stays(together: Program) -> None:
    kept: list[tuple[set[int], Tensor]] = []

    def keep(values: Any) -> None:
        kept.append((set(values["slots"][0].tolist()), values["expected"][0].clone()))

    generate(make("dual-cache").run(together), [[4, 5, 6]], 16, on_round=keep, **PARAMS)
    for (_, before), (rows, after) in pairwise(kept):
        alone = [i for i in range(19) if i not in rows]
        assert torch.equal(before[alone], after[alone]) and bool((after != 0).any(1).all())
    assert any(len(rows) < 19 for rows, _ in kept)


@pytest.mark.parametrize("shift", [pytest.param(0, marks=pytest.mark.exhaustive), 1])
def test_the_exact_cache(shift: int) -> None:
    program = aropt.capture(tiny(4), mask=MASK, block=4, rules=ALL, shift=shift)
    fast = make("block-cache").run(program)
    assert validate(program, with_probe(fast), chosen=cases(program, quick=True)).passed
    got = generate(fast, PROMPTS, 13, **{k: v for k, v in PARAMS.items() if k != "block"})
    alone = [generate(fast, [p], 13, **{k: v for k, v in PARAMS.items() if k != "block"})[0] for p in PROMPTS]
    assert got == alone


@pytest.mark.exhaustive
def test_onnxruntime(together: Program) -> None:
    done = aropt.optimize(together, "onnxruntime", pipeline(["dual-cache"]), budget={"kl": 100.0})
    assert done.report["verify"]["status"] == "pass"
    assert generate(done, PROMPTS, 16, **PARAMS) == generate(make("dual-cache").run(together), PROMPTS, 16, **PARAMS)


@pytest.mark.exhaustive
def test_inductor(together: Program) -> None:
    """Compiling takes long, so one greedy batch."""
    fast = run_passes(make("dual-cache").run(together), pipeline(), "inductor", Instruments(check=False))[0]
    assert generate(fast, PROMPTS, 8, executor=lower(fast, "inductor"), **PARAMS) == generate(
        fast, PROMPTS, 8, **PARAMS
    )


@pytest.mark.parametrize("cache", [pytest.param("", marks=pytest.mark.exhaustive), "dual-cache"])
def test_the_exported_loop(together: Program, cache: str, tmp_path: Path) -> None:
    """In one call, and stepped with the rules' state handed back."""
    program = make(cache).run(together) if cache else together
    export_program(program, tmp_path / "model.onnx")
    session = run_loop.session(tmp_path / "model.onnx", 1)
    for params in (PARAMS, {**PARAMS, "temperature": 0.8, "seed": 3}):
        want = generate(program, PROMPTS, 8, **params)
        for chunk in (None, 2):
            assert from_session(session, program, PROMPTS, 8, chunk=chunk, **params) == want


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (("remask", "rcr"), "both decide which rows keep their ids"),
        (("remask", "guide-argmax"), "what the guide accepted is kept"),
        (("eoser", "guide-argmax"), "the guide decides"),
    ],
)
def test_bad_rules(rules: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why) as error:
        chosen(rules)
    assert error.value.code == 2


@pytest.mark.parametrize(("name", "value"), [("credit_decay", 1.5), ("remask_threshold", -0.1), ("smooth_most", -1)])
def test_bad_parameters(model: CanvasLM, name: str, value: float) -> None:
    program = capture(model, "threshold", name.partition("_")[0])
    with pytest.raises(UsageError, match=f"{name} can't be"):
        generate(program, [[1]], 4, **{name: value})
