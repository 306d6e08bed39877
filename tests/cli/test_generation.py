"""Random small models from the grammar, end to end: whole generations equal the plain program's, token for token."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import aropt
from aropt.pipeline.checks import Instruments
from aropt.pipeline.manager import run_passes
from aropt.pipeline.registry import pipeline
from aropt.targets import lower
from aropt.validate.compare import Case, validate, with_probe
from tests.support.grammar import models

SLOW = settings(
    max_examples=4,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=3)


def compare(model: nn.Module, vocab: int, capacity: int, lengths: list[int], seed: int, target: str) -> None:
    """Greedy and sampled generations of a ragged batch, up to the model's capacity."""
    plain = aropt.capture(model, capacity=capacity)
    fast = run_passes(plain, pipeline(), "eager", Instruments(check=False)).program
    prompts = tuple(
        tuple((seed + 7 * i + 3 * j) % vocab for j in range(min(n, capacity))) for i, n in enumerate(lengths)
    )
    room = capacity - max(map(len, prompts)) + 1
    chosen = [
        Case(prompts, room, kind="ragged", name="greedy"),
        Case(prompts, min(room, 8), seed, (("temperature", 1.1), ("top_k", 5)), kind="ragged", name="sampled"),
    ]
    probed = with_probe(fast)
    verdict = validate(plain, probed, lower(probed, target), chosen)
    assert verdict.passed, [(o.problem, verdict.diverges) for o in verdict.outcomes if o.problem]


@pytest.mark.exhaustive
@SLOW
@given(models(), LENGTHS, st.integers(0, 99))
def test_random_models_generate_the_same_tokens(
    made: tuple[nn.Module, int, int, str], lengths: list[int], seed: int
) -> None:
    model, vocab, capacity, _ = made
    compare(model, vocab, capacity, lengths, seed, "eager")


@pytest.mark.slow
@settings(SLOW, max_examples=1)
@given(models(), LENGTHS, st.integers(0, 99))
def test_random_models_on_onnxruntime(made: tuple[nn.Module, int, int, str], lengths: list[int], seed: int) -> None:
    model, vocab, capacity, _ = made
    compare(model, vocab, capacity, lengths, seed, "onnxruntime")
