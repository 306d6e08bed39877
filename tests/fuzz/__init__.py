"""Artifacts that are changed at random and read: `python -m tests.fuzz [N] [--seed S]`.

Each mutant is a small artifact with something of its structure changed and, mostly, its hashes written anew. A process
of its own reads it and generates. It may be refused, or generate the same, or other tokens where the change is of data
that nothing can check. What may not be: an internal error, a crash, a hang, memory of any size, code or writing.
"""

from tests.fuzz.reader import ALLOWED, Outcome, read
from tests.fuzz.structure import artifacts, mutate

__all__ = ["ALLOWED", "Outcome", "artifacts", "mutate", "read"]
