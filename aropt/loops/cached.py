"""New rows of a loop over positions, of one branch or of both of guidance: where they go, and which ones are fed.

enter   the prompt is fed first      place   slots and positions of what is fed
feed    then each new token          pend    a new token waits until its branch runs again
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from aropt.frontend.trace import capture_function
from aropt.ir.control import Call
from aropt.ir.program import Graph, Spec, StateSpec
from aropt.loops.guidance import rebatch

I64 = torch.int64


def of(state: StateSpec, prefix: str, batch: str) -> StateSpec:
    """The state of a branch; the unconditional one feeds a number of rows of its own."""
    spec = rebatch(state.spec, batch)
    return replace(state, spec=Spec(spec.dtype, tuple("Q" if d == "R" and prefix else d for d in spec.dims)))


def branch(graph: Graph, prefix: str, **given: str) -> Call:
    """A call on the state of one branch; `given` and what all branches share have their own names."""
    names = {n: n for n in ("prompt", "negative", "lengths", "token")} | given
    return Call(graph.name, {n: names.get(n, prefix + n) for n in graph.inputs}, {n: prefix + n for n in graph.outputs})


def enter(guided: bool, row: tuple[int, ...]) -> Graph:
    """Before the first round: feed the whole prompt; slots before a short prompt are padding."""

    def function(prompt: Tensor, lengths: Tensor, negative: Tensor | None = None) -> tuple[Tensor, ...]:
        pads = prompt.shape[1] - lengths
        feed, pads = (
            (prompt.clone(), pads) if negative is None else (torch.cat([prompt, negative]), torch.cat([pads, pads]))
        )
        return feed, torch.zeros((), dtype=I64), pads

    inputs = {"prompt": Spec(I64, ("B", "P", *row)), "lengths": Spec(I64, ("B",))}
    if guided:
        inputs["negative"] = Spec(I64, ("B", "P", *row))
    return capture_function("enter", function, inputs, ["feed", "filled", "pads"], "prologue")


def place(row: tuple[int, ...]) -> Graph:
    """Where the fed rows go: slots [R] after the filled ones, positions [B, R] counted from each prompt's start."""

    def function(feed: Tensor, filled: Tensor, pads: Tensor) -> tuple[Tensor, ...]:
        slots = filled + torch.arange(feed.shape[1])
        return slots, (slots - pads.unsqueeze(1)).clamp(min=-1), filled + feed.shape[1]

    inputs = {"feed": Spec(I64, ("B", "R", *row)), "filled": Spec(I64), "pads": Spec(I64, ("B",))}
    return capture_function("place", function, inputs, ["slots", "positions", "filled"])


def feed(name: str, guided: bool, row: tuple[int, ...]) -> Graph:
    """The next round feeds the new token."""
    return capture_function(
        name,
        lambda token: (torch.cat([token, token]) if guided else token).unsqueeze(1),
        {"token": Spec(I64, ("B", *row))},
        ["feed"],
    )


def pend(row: tuple[int, ...]) -> Graph:
    """A later round feeds the new token, after those that wait already."""
    inputs = {"feed": Spec(I64, ("B", "R", *row)), "token": Spec(I64, ("B", *row))}
    return capture_function("pend", lambda feed, token: torch.cat([feed, token.unsqueeze(1)], 1), inputs, ["feed"])
