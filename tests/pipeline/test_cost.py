"""The bytes that a round touches, counted by hand for a tiny program."""

from __future__ import annotations

from aropt.ir.program import Program
from aropt.pipeline.cost import step_bytes
from tests.conftest import CAPACITY, VOCAB, WIDTH

FLOAT, INT = 4, 8
LAYERS = 2
MATRICES = LAYERS * 4 * WIDTH * WIDTH * FLOAT + VOCAB * WIDTH * FLOAT  # qkv and out of each layer, the head


def test_a_cached_round_reads_matrices_and_stored_rows(tiny_stages: dict[str, Program]) -> None:
    """The embedding is a table: a round looks up one row of it."""
    cached = tiny_stages["prune"]
    row = LAYERS * 2 * WIDTH * FLOAT + INT  # keys and values, and the position that a slot holds
    few, more = (step_bytes(cached, stored) for stored in (3, 10))
    assert more - few == 7 * row
    assert MATRICES < few - 3 * row < MATRICES + 100, "counters and flags are a few bytes"
    assert step_bytes(cached) == step_bytes(cached, CAPACITY // 2)
    assert few < step_bytes(tiny_stages["kv-cache"], 3), "prune drops tokens that nobody reads"


def test_a_full_forward_reads_and_writes_its_activations(tiny_program: Program) -> None:
    few, more = (step_bytes(tiny_program, rows) for rows in (3, 10))
    logits = 2 * VOCAB * FLOAT
    assert few > MATRICES and more - few > 7 * logits
