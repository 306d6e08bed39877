"""tree-draft's rules of acceptance: texts of rejection have the model's distribution, those of lossy rules say so."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import aropt
from aropt.errors import UsageError
from aropt.ir.control import drawn
from aropt.ir.printer import text
from aropt.ir.program import Program
from aropt.ir.serialize import from_json, to_json
from aropt.loops.accept import ACCEPT
from aropt.pipeline.registry import make, pass_class
from aropt.validate.compare import probes, with_probe
from tests.support import draft_models
from tests.support.accept_programs import SLIPS, captured, drafted, passes, slipped
from tests.support.draft_models import Few

LENGTH, PROMPT = 3, [1, 3]
DRAWN: dict[str, Any] = {"temperature": 1.0}
Text = tuple[int, ...]
SLOW = pytest.mark.exhaustive


def chances(temperature: float = 1.0, top_k: int = 0) -> dict[Text, float]:
    """The chance of each text after the prompt, by the model alone."""
    texts = list(itertools.product(range(Few.vocab), repeat=LENGTH))
    with torch.no_grad():
        logits = draft_models.few()(torch.tensor([[*PROMPT, *text] for text in texts])).double() / temperature
    if top_k:
        logits = torch.where(logits >= logits.topk(top_k).values[..., -1:], logits, -torch.inf)
    p = logits[:, len(PROMPT) - 1 : -1].softmax(2).gather(2, torch.tensor(texts).unsqueeze(2)).prod(1)
    return dict(zip(texts, p.flatten().tolist(), strict=True))


def counted(program: Program, count: int, seed: int = 3, **params: Any) -> dict[Text, int]:
    """How often each text comes in so many streams of noise, in one batch."""
    texts = aropt.generate(program, [PROMPT] * count, LENGTH, plain=True, seed=seed, **{**DRAWN, **params})
    found, counts = torch.tensor(texts).unique(dim=0, return_counts=True)
    return dict(zip(map(tuple, found.tolist()), counts.tolist(), strict=True))


def p_value(counts: dict[Text, int], wanted: dict[Text, float]) -> float:
    """The chance of such counts, or of ones further off (chi-square); rare texts count as one, impossible ones as 0."""
    total = sum(counts.values())
    if any(not wanted[text] for text in counts):
        return 0.0
    cells = [(counts.get(text, 0), p * total) for text, p in wanted.items() if p * total >= 5]
    rest = total - sum(n for n, _ in cells), total - sum(n for _, n in cells)
    cells += [rest] if rest[1] > 1 else []
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    return float(torch.special.gammaincc(*(torch.tensor([len(cells) - 1, statistic], dtype=torch.float64) / 2)))


def sizes(*counts: int) -> Any:
    """Fewer texts in the quick suite."""
    return pytest.mark.parametrize("count", [counts[0], pytest.param(counts[1], marks=SLOW)])


WAYS = [
    ("2x2", "few_draft"),
    pytest.param("chain:2", "few_draft", marks=SLOW),
    pytest.param("0-0-1", "self", marks=SLOW),
    ("chain:2", "text"),
    ("chain:2", "jacobi"),
]


@sizes(10_000, 100_000)
@pytest.mark.parametrize(("shape", "draft"), WAYS)
@pytest.mark.parametrize("params", [{}, {"temperature": 0.7, "top_k": 3}], ids=["warm", "top-k"])
def test_texts_have_the_model_s_distribution(shape: str, draft: str, params: dict[str, Any], count: int) -> None:
    program = drafted("rejection", shape, draft)
    assert p_value(counted(program, count, **params), chances(**params)) > 1e-3


QUICK = "drafts by the noise of coins"  # validation sees the others
SEEN = [pytest.param(slip, marks=() if slip == QUICK else SLOW) for slip in SLIPS]


@pytest.mark.parametrize("slip", SEEN)
def test_slips_are_seen_in_the_texts(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would not tell much."""
    params = {"top_k": 3} if "top-k" in slip else {}
    assert p_value(counted(slipped(slip, monkeypatch), 10_000, **params), chances(**params)) < 1e-6


@pytest.mark.parametrize("rule", ["typical", pytest.param("grouped", marks=SLOW)])
def test_lossy_rules_have_another_distribution(rule: str) -> None:
    assert p_value(counted(drafted(rule, "chain:2"), 5000), chances()) < 1e-6


@pytest.mark.parametrize("rule", ACCEPT)
def test_choices_are_those_of_the_plain_loop(rule: str) -> None:
    """With temperature 0 chances are 0 and 1, and each rule accepts what the model itself picks."""
    prompts = [[1, 3], [2], [4, 0, 2, 1]]
    want = aropt.generate(captured(), prompts, 9, plain=True)
    assert aropt.generate(drafted(rule, "chain:2"), prompts, 9, plain=True) == want


def test_a_sequence_draws_the_same_in_any_batch() -> None:
    program, prompts = drafted("rejection", "2x2"), [[1, 3], [2], [4, 0, 2, 1], [3]]
    together = aropt.generate(program, prompts, 12, plain=True, seed=4, stop=[0], **DRAWN)
    alone = [aropt.generate(program, [p], 12, plain=True, seed=4, stop=[0], streams=[i], **DRAWN)[0]
             for i, p in enumerate(prompts)]  # fmt: skip
    assert together == alone and len(set(map(len, together))) > 1


def test_levels_are_those_of_the_rule() -> None:
    found = {rule: make("tree-draft", {"accept": rule}).contract for rule in ACCEPT}
    assert {n: c.level for n, c in found.items()} == {n: r.label for n, r in ACCEPT.items()}
    assert [n for n, c in found.items() if c.budget] == ["typical", "grouped"]
    assert pass_class("tree-draft").contract.level == "rounding"
    with pytest.raises(UsageError, match="no rule of acceptance") as caught:
        make("tree-draft", {"accept": "all"})
    assert "match, rejection, typical, grouped" in caught.value.hint


def test_what_a_loop_says_of_its_draws_is_kept_and_printed() -> None:
    program = drafted("rejection", "2x2")
    again = from_json(json.loads(json.dumps(to_json(program))), program.weights)
    assert again.control == program.control and drawn(program.control) == {"distribution"}
    assert "drawn distribution drafts %nodes %node_parents %origin %drafted_0 %drafted_1" in text(program)
    assert drawn(drafted("typical", "chain:2").control) == {"lossy"} and not drawn(drafted("match", "chain:2").control)


def test_what_rounds_draw_by_outlives_fusion() -> None:
    """Validation draws again from values that no graph needs as outputs."""
    fast = drafted("rejection", "2x2")
    for one in (make("fuse-sampler"), make("prune")):
        fast = one.run(fast)
    assert probes(fast) and not probes(with_probe(fast))


@SLOW
def test_rejection_in_onnx_runtime(tmp_path: Path) -> None:
    """Validated after lowering, and as one file: the ids are those of the program, as the noise is the same."""
    pytest.importorskip("onnxruntime")
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort import run_loop

    more = [make("fuse-sampler"), make("prune")]
    made = aropt.optimize(captured(), "onnxruntime", [*passes("rejection", "2x2", "few_draft"), *more], threads=1)
    assert made.report["verify"]["status"] == "pass" and made.report["verify"]["metrics"]["others"] <= 1
    export_program(made.program, tmp_path / "loop.onnx")
    assert run_loop.compare(tmp_path / "loop.onnx", made.program)["status"] == "pass"
