"""Unmasking: rules against plain Python, invariants of schedules and tests, batches, infilling, validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aropt
from aropt.errors import UsageError
from aropt.ir.interpreter import Eager
from aropt.ir.program import Program
from aropt.loops.unmask.build import filled
from aropt.loops.unmask.commit import SCHEDULES, Round, chosen, probability, ranked
from aropt.models.canvas import MASK, VOCAB, CanvasLM
from aropt.pipeline.manager import run_passes
from aropt.validate.compare import cases, validate, with_probe
from tests.support.canvases import capture, rounds, tiny
from tests.support.run import generate

SLOW = settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
lists = st.integers(1, 6)


@pytest.fixture(scope="module")
def model() -> CanvasLM:
    return tiny()


@pytest.fixture(scope="module")
def quota(model: CanvasLM) -> Program:
    return capture(model)


@pytest.fixture(scope="module")
def above(model: CanvasLM) -> Program:
    return capture(model, "threshold")


@torch.no_grad()
def plainly(model: CanvasLM, prompt: list[int], n: int, block: int, steps: int, tau: float | None = None) -> list[int]:
    """LLaDA's algorithm 4 with low-confidence remasking, and Fast-dLLM's threshold, in the words of the papers."""
    x = torch.tensor([prompt + [MASK] * n])
    for begin in range(len(prompt), len(prompt) + n, block):
        end, count = min(begin + block, len(prompt) + n), 0
        size = end - begin
        while (x[0, begin:end] == MASK).any():
            logits = model(x)[0].double()
            logits[:, MASK] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            best[(x[0] != MASK) | (torch.arange(len(x[0])) >= end)] = -1
            order = sorted(range(begin, end), key=lambda i: (-float(best[i]), i))
            order = [i for i in order if x[0, i] == MASK]
            quota = size // steps + (count < size % steps)
            take = order[:quota] if tau is None else [i for r, i in enumerate(order) if r == 0 or best[i] >= tau]
            for i in take:
                x[0, i] = token[i]
            count += 1
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("block", "steps"), [(16, 16), (8, 3), (4, 4), (4, 1)])
def test_quota_is_that_of_llada(model: CanvasLM, quota: Program, block: int, steps: int) -> None:
    got, count = rounds(quota, [[1, 2, 3]], 16, block=block, steps=steps * (16 // block))
    assert got == [plainly(model, [1, 2, 3], 16, block, steps)]
    assert count == steps * (16 // block)


@pytest.mark.parametrize("tau", [0.02, 0.2, 0.6])
def test_threshold_is_that_of_fast_dllm(model: CanvasLM, above: Program, tau: float) -> None:
    got, count = rounds(above, [[9, 8]], 16, block=8, threshold=tau)
    assert got == [plainly(model, [9, 8], 16, 8, 1, tau)]
    assert 2 <= count <= 16


@torch.no_grad()
def revising(model: CanvasLM, prompt: list[int], n: int, block: int, steps: int) -> tuple[list[int], list[int]]:
    """RCR in the words of MDPO's code: write all masks of the block, mask the least sure again. Also masks left."""
    x, left = torch.tensor([prompt + [MASK] * n]), []
    for begin in range(len(prompt), len(prompt) + n, block):
        sure: dict[int, float] = {}
        for i in range(steps):
            logits = model(x)[0].double()
            logits[:, MASK] = -torch.inf
            best, token = logits.log_softmax(-1).max(-1)
            for row in range(begin, begin + block):
                if x[0, row] == MASK:
                    x[0, row], sure[row] = token[row], float(best[row])
            rest = sum(block // steps + (j < block % steps) for j in range(i + 1, steps))
            for row in sorted(sure, key=lambda r: (sure[r], -r))[:rest]:
                x[0, row] = MASK
            left.append(int((x == MASK).sum()))
    return x[0, len(prompt) :].tolist(), left


@pytest.mark.parametrize(("block", "steps"), [(8, 4), (16, 16), (8, 3), (4, 1)])
def test_rcr_is_that_of_mdpo(model: CanvasLM, quota: Program, block: int, steps: int) -> None:
    """E13: the masks left are the sum of the quotas to come; one round a block is the plain rule."""
    rcr, masks = capture(model, "rcr"), []  # type: ignore[var-annotated]
    params = {"block": block, "steps": steps * (16 // block)}

    def keep(values: Any) -> None:
        masks.append(int((values["tokens"] == MASK).sum()))

    (got,) = generate(rcr, [[4, 5, 6]], 16, on_round=keep, **params)
    assert (got, masks) == revising(model, [4, 5, 6], 16, block, steps)
    if steps == 1:
        assert [got] == generate(quota, [[4, 5, 6]], 16, **params)


def test_rcr_revises(model: CanvasLM) -> None:
    """Some id that was written is another one later; a stop token fills the rest when its block is done."""
    rcr, seen = capture(model, "rcr"), []  # type: ignore[var-annotated]

    def keep(values: Any) -> None:
        seen.append(values["tokens"][0].clone())

    (free,) = generate(rcr, [[4, 5, 6]], 16, block=16, on_round=keep)
    assert any(len(set(column.tolist()) - {MASK}) > 1 for column in torch.stack(seen).T)
    (got,) = generate(rcr, [[4, 5, 6]], 16, block=16, stop=[free[5]])
    assert MASK not in got and got[-1] == free[5]


def test_eoser_without_its_factor_is_the_plain_rule(model: CanvasLM, quota: Program) -> None:
    """E5; and with one that is 0 at first, an end token comes later."""
    late, stop = capture(model, "eoser"), [generate(quota, [[4, 5, 6]], 16, block=16)[0][5]]
    assert generate(late, [[4, 5, 6]], 16, block=16, stop=stop, eos_gamma=1.0) == generate(
        quota, [[4, 5, 6]], 16, block=16, stop=stop
    )


def test_tests_end_where_quotas_do(model: CanvasLM, quota: Program, above: Program) -> None:
    """A threshold above 1 writes one id a round, one of about 0 a block; so does the factor rule."""
    one_a_round, all_at_once = rounds(quota, [[1]], 12, block=4), rounds(quota, [[1]], 12, block=4, steps=3)
    assert one_a_round[1] == 12 and all_at_once[1] == 3
    assert rounds(above, [[1]], 12, block=4, threshold=2.0) == one_a_round
    assert rounds(above, [[1]], 12, block=4, threshold=1e-9) == all_at_once
    factor = capture(model, "factor")
    assert rounds(factor, [[1]], 12, block=4, factor=0.0) == one_a_round
    assert rounds(factor, [[1]], 12, block=4, factor=100.0) == all_at_once


@given(masks=st.integers(1, 70), steps=st.integers(1, 70), name=st.sampled_from(sorted(SCHEDULES)))
def test_schedules_write_all(masks: int, steps: int, name: str) -> None:
    rule = chosen((name,))
    left, written = masks, []
    for step in range(masks + 1):
        active = torch.arange(masks).unsqueeze(0) < left
        numbers = (torch.tensor([[n]]) for n in (step, masks, left, 0))
        round = Round(active, torch.zeros(1, masks), *numbers)
        rows = int(rule.select(round, steps=torch.tensor(steps), shift=torch.tensor(0.33)).sum())
        assert 1 <= rows <= left
        left -= rows
        written.append(rows)
        if left == 0:
            break
    assert left == 0 and len(written) <= max(steps, 1)
    if name == "uniform" and steps <= masks:
        assert written == [masks // steps + (i < masks % steps) for i in range(steps)]
    if name == "doubling":
        assert written[:-1] == [2**i for i in range(len(written) - 1)]


def test_confidence_does_not_saturate() -> None:
    """Probabilities that fp32 rounds to 1 keep their order."""
    logits = torch.tensor([[20.0, 0.0], [25.0, 0.0], [22.0, 0.0]])
    assert (logits.softmax(-1).amax(-1) == 1).sum() >= 2
    assert probability(logits).argsort().tolist() == [0, 2, 1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_ties_go_to_the_first(values: list[int]) -> None:
    got = ranked(torch.tensor([values], dtype=torch.float32))[0].tolist()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    assert [order.index(i) for i in range(len(values))] == got


@SLOW
@given(st.lists(st.lists(st.integers(0, 250), min_size=3, max_size=3), min_size=2, max_size=4), st.integers(0, 3))
def test_a_row_of_a_batch_equals_the_request_alone(above: Program, prompts: list[list[int]], seed: int) -> None:
    """Rows of a batch are in different blocks; none waits for another, or is changed by it."""
    for params in ({"threshold": 0.1}, {"threshold": 0.3, "temperature": 1.0, "seed": seed}):
        together = generate(above, prompts, 12, block=4, **params)
        alone = [generate(above, [p], 12, block=4, streams=[i], **params)[0] for i, p in enumerate(prompts)]
        assert together == alone


def test_infilling_keeps_what_is_given(above: Program) -> None:
    fill = [5, MASK, MASK, 6, MASK, 7, 8, MASK]
    (got,) = generate(above, [[1, 2]], 8, fill=[fill], block=4, threshold=0.2)
    assert all(g == f for g, f in zip(got, fill, strict=True) if f != MASK) and MASK not in got


def test_a_stop_token_fills_the_rest() -> None:
    tokens = torch.tensor([[1, 9, 4, 9, MASK, MASK], [1, 9, MASK, 9, MASK, MASK], [9, 9, 3, 3, MASK, MASK]])
    at, answers = torch.arange(6).expand(3, 6), torch.tensor([2, 2, 2])
    got = filled(tokens, torch.tensor([9]), MASK, at, answers)
    assert got.tolist() == [[1, 9, 4, 9, 9, 9], tokens[1].tolist(), tokens[2].tolist()]


def test_generation_ends_with_the_stop_token(above: Program) -> None:
    (free,) = generate(above, [[1, 2, 3]], 16, block=4, threshold=0.2)
    (got,) = generate(above, [[1, 2, 3]], 16, block=4, threshold=0.2, stop=[free[5]])
    at = free.index(free[5])
    assert got == free[: at + 1]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n": 0}, "can't generate 0"),
        ({"prompts": [[1, MASK]]}, "mask id"),
        ({"prompts": [[]]}, "empty"),
        ({"n": 63}, "don't fit"),
        ({"block": 5}, "don't divide"),
        ({"block": 4, "steps": 3}, "whole number"),
        ({"fill": [[1]]}, "fill 0 has 1 ids"),
        ({"wrong": 1}, "unknown sampling parameter"),
    ],
)
def test_bad_input(quota: Program, changes: dict[str, Any], why: str) -> None:
    options = {"prompts": [[1, 2]], "n": 16, **changes}
    with pytest.raises(UsageError, match=why):
        generate(quota, options.pop("prompts"), options.pop("n"), **options)


@pytest.mark.parametrize(
    ("rules", "why"),
    [
        (("nucleus",), "unknown rule"),
        (("factor", "cosine"), "together"),
        (("margin", "entropy"), "two rules"),
        (("rcr", "factor"), "together"),
    ],
)
def test_bad_rules(rules: tuple[str, ...], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        chosen(rules)


def test_a_model_without_a_mask_is_refused(model: CanvasLM) -> None:
    with pytest.raises(UsageError, match="no mask id"):
        aropt.capture(model, loop="unmask")
    with pytest.raises(UsageError, match="outside the vocabulary"):
        aropt.capture(model, mask=VOCAB)


@pytest.mark.parametrize(
    "rules",
    [
        ("segments", "margin"),
        *(
            pytest.param(r, marks=pytest.mark.exhaustive)
            for r in (("threshold",), ("rcr",), ("cosine", "entropy", "eoser"))
        ),
    ],
)
def test_the_lowered_program_is_verified(model: CanvasLM, rules: tuple[str, ...]) -> None:
    fast = aropt.optimize(capture(model, *rules), target="onnxruntime")
    assert fast.report["verify"]["status"] == "pass"
    found = {c["name"].partition(": ")[2] for c in fast.report["verify"]["cases"]}
    assert found >= {"ragged greedy", "ragged greedy, stop token", "blocks of two"}


class Off(Eager):
    """Runs a program with one thing wrong."""

    def __init__(self, program: Program, wrong: str) -> None:
        super().__init__(program)
        self.wrong, self.count = wrong, 0

    def call(self, graph: str, inputs: Any) -> Any:
        self.count += 1
        results = super().call(graph, inputs)
        tokens = results.get("tokens")
        if graph == "model" and self.wrong == "logits":
            results["logits"] = results["logits"].roll(1, 1)
        if graph == "commit" and tokens is not None:
            changed = (tokens != inputs["tokens"]).nonzero()
            if self.wrong == "token" and len(changed):
                tokens[tuple(changed[0])] = (tokens[tuple(changed[0])] + 1) % 100
            if self.wrong == "early" and (tokens == MASK).any():
                tokens[tuple((tokens == MASK).nonzero()[0])] = inputs["candidate"][tokens == MASK][0]
            if self.wrong == "revised" and self.count > 6:
                tokens[0, -1] = 3
            if self.wrong == "prompt":
                tokens[0, 0] = 3
            results["finished"] = ~(tokens == MASK).any()
        if graph == "answer" and self.wrong == "answer":
            results["generated"] = results["generated"].roll(1, 1)
        return results


@pytest.mark.parametrize("wrong", ["logits", "token", "early", "revised", "prompt", "answer", ""])
def test_validation_catches(quota: Program, wrong: str) -> None:
    verdict = validate(quota, with_probe(quota), Off(quota, wrong), cases(quota, quick=True))
    assert verdict.passed is (wrong == ""), verdict.outcomes[-1]


def test_passes_fuse_the_round(quota: Program) -> None:
    from aropt.ir.control import calls
    from aropt.pipeline.registry import pipeline

    fast, results, _ = run_passes(quota, pipeline(), "eager")
    assert {r.name for r in results if r.status == "applied"} >= {"merge-linears", "fuse-sampler", "prune"}
    assert [c.graph for c in calls(fast.control)] == ["start", "model_greedy", "model_sample", "answer"]
    assert "logits" not in fast.graphs["model_greedy"].outputs


def test_a_reference_model_is_not_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from aropt.cli.optimize import find
    from aropt.cli.options import Reading

    (tmp_path / "text-mdlm").mkdir()
    monkeypatch.chdir(tmp_path)
    source = find(Reading("text-mdlm", mask=258))
    assert source.meta["source"] == "text-mdlm" and source.meta["mask"] == 258


@pytest.mark.exhaustive  # test_reach_masked has the kinds with their caches
@pytest.mark.parametrize("kind", ["ModernBert", "Bert", "Roberta"])
def test_masked_language_models(kind: str, tmp_path: Path) -> None:
    """Any directory that AutoModelForMaskedLM loads."""
    import transformers

    special: dict[str, int] = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0}
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"intermediate_size": 48, "max_position_embeddings": 66, "sep_token_id": 2} | special
    config = getattr(transformers, f"{kind}Config")(
        **sizes, **(more if kind != "Bert" else {**more, "pad_token_id": 0})
    )
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForMaskedLM")(config).eval().save_pretrained(tmp_path)
    from aropt.frontend.sources import resolve

    source = resolve(str(tmp_path), masked=True)
    source.meta["mask"] = 4
    assert source.meta["capacity"] == (64 if kind == "Roberta" else 66)
    fast = aropt.optimize(aropt.capture(source, loop="unmask"), target="onnxruntime")
    assert fast.report["verify"]["status"] == "pass"
    (got,) = generate(fast, [[5, 6, 7]], 8, block=4)
    assert len(got) == 8 and 4 not in got
