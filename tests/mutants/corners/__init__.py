"""Slips that show in a corner: programs that are wrong for some batches, lengths, parameters or canvases only.

Each names its family and its base, and holds a request that it answers otherwise than the right program; so it is no
equivalent one. They were written before the cases of validation that have to find them.
"""

from tests.mutants.corners import (
    batches,
    canvases,
    drafts,
    draws,
    edits,
    lengths,
    requests,
    stops,
    translations,
)  # they register themselves
from tests.mutants.corners.slips import SLIPS, Slip, answers, problem

__all__ = [
    "SLIPS", "Slip", "answers", "batches", "canvases", "drafts", "draws", "edits", "lengths", "problem", "requests",
    "stops", "translations",
]  # fmt: skip
