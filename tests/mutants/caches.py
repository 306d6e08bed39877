"""Cache rows: dropped, shifted, swapped, stale."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, fx

from aropt.ir.program import Program
from tests.mutants.surgery import (
    BOTH,
    aten,
    edited,
    inner,
    mutant,
    reads,
    recall,
    swap,
    then,
)


@mutant(*BOTH, at=("attn.0",))
def cache_row_dropped(p: Program) -> Program:
    """The first row of the prompt is not written to layer 0's keys."""

    def write(store: Tensor, axis: int, slots: Tensor, rows: Tensor) -> Tensor:
        first = min(1, len(slots) - 1)
        return store.index_copy(axis, slots[first:], rows.narrow(axis, first, len(slots) - first))

    return swap(p, aten.index_copy.default, write, reads("k_0", 0))


@mutant(*BOTH, at=("attn.1",))
def cache_shifted(p: Program) -> Program:
    """Layer 1's values are written one slot too late."""
    return swap(p, aten.index_copy.default, lambda s, axis, at, rows: s.index_copy(axis, at + 1, rows), reads("v_1", 0))


@mutant(*BOTH, at=("attn.0",))
def decode_overwrites(p: Program) -> Program:
    """A decoded row is written over the row before."""
    return then(p, "slots", lambda slots, filled: (slots - (filled > 0).long()).clamp(min=0), "filled")


@mutant("rotary", at=("attn.0",))
def slots_wrap(p: Program) -> Program:
    """Slots start over after 16: only long sequences show it."""
    return then(p, "slots", lambda slots: slots % 16)


@mutant(*BOTH, "guided", at=("attn.0",))
def keys_and_values_swapped(p: Program) -> Program:
    """The next round reads keys as values."""
    return recall(p, {"k_0": "v_0", "v_0": "k_0"})


@mutant(*BOTH, at=("attn.0",))
def layers_swapped(p: Program) -> Program:
    """The next round reads the other layer's cache."""
    return recall(p, {"k_0": "k_1", "v_0": "v_1", "k_1": "k_0", "v_1": "v_0"})


@mutant("rotary", at=("attn.1",))
def one_state_swapped(p: Program) -> Program:
    """Layer 1 reads layer 0's keys."""
    return recall(p, {"k_1": "k_0"})


def stale(program: Program, name: str) -> Program:
    """The graph returns the state as it came in."""

    def change(graph: str, part: fx.Graph) -> int:
        if name not in program.graphs[graph].outputs or name not in program.graphs[graph].inputs:
            return 0
        results = list(next(n for n in part.nodes if n.op == "output").args[0])
        results[list(program.graphs[graph].outputs).index(name)] = next(n for n in part.nodes if n.name == name)
        part.erase_node(next(n for n in part.nodes if n.op == "output"))
        part.output(tuple(results))
        return 1

    return edited(program, inner(program), change)


@mutant(*BOTH, at=("attn.0",))
def stale_keys(p: Program) -> Program:
    """Layer 0's keys leave the graph as they came in."""
    return stale(p, "k_0")


@mutant("rotary", at=("attn.0",))
def stale_slot_positions(p: Program) -> Program:
    """The record of which slots are filled leaves the graph as it came in."""
    return stale(p, "slot_positions")


@mutant(*BOTH, at=("attn.1",))
def live_state_pruned(p: Program) -> Program:
    """Pruning took the write of layer 1's values for dead."""
    return recall(p, drop="v_1")


@mutant(*BOTH, at=("attn.0",))
def filled_pruned(p: Program) -> Program:
    """Pruning took the count of filled slots for dead."""
    return recall(p, drop="filled")


@mutant("rotary", at=("attn.0",))
def filled_by_one(p: Program) -> Program:
    """After the prompt, one slot counts as filled."""
    return then(p, "filled", lambda _, before: before + 1, "filled")


@mutant("rotary", at=("attn.0",))
def empty_slots_at_position_0(p: Program) -> Program:
    """Slots start out as if they held position 0."""
    spec = replace(p.state["slot_positions"], init=0)
    return p.replace(state={**p.state, "slot_positions": spec})


@mutant("rotary", "guided", at=("attn.0",))
def cache_rows_of_the_neighbour(p: Program) -> Program:
    """Keys go to the next sequence's cache: a batch of one hides it."""
    return swap(
        p, aten.index_copy.default, lambda s, axis, at, rows: s.index_copy(axis, at, rows.roll(1, 0)), reads("k_0", 0)
    )
