"""What a pass may know of the target: what its runtime can do, in words that runtimes' documentation uses."""

from __future__ import annotations

from dataclasses import dataclass

CAPABILITIES = {
    "autotuning": "ways to generate are timed while a program is made, and the fastest is kept",
    "batched-chunks": "several new rows of each of several sequences attend to their caches in one call",
    "grouped-query-attention": "rotary embedding, cache update and attention of new rows are one kernel",
    "int8-weights": "products read weights of eight bits and make no floats of all of them",
    "int8-drafts": "a step with weights of eight bits costs less than one with floats, and checks of its rows pay",
    "multi-head-attention": "attention of chosen rows with a mask is one kernel",
}


@dataclass(frozen=True)
class Target:
    """A target by its name, as `--target` takes it; `called`: its runtime in sentences for people."""

    name: str
    called: str
    capabilities: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if unknown := self.capabilities - CAPABILITIES.keys():
            raise ValueError(f"the target {self.name} has capabilities that there are not: {sorted(unknown)}")

    def has(self, capability: str) -> bool:
        """Whether the runtime can do it. Raises ValueError for a word that is not in CAPABILITIES."""
        if capability not in CAPABILITIES:
            raise ValueError(f"there is no capability '{capability}'")
        return capability in self.capabilities

    def __str__(self) -> str:
        return self.name
