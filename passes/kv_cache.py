"""kv-cache: compute only new tokens; keep the keys and values of earlier ones.

`restrict` derives the cached step from the plain forward. The loop then feeds the prompt in its first round (prefill)
and one token a round after that (decode); both are the same graph, with the number of rows symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.passbase import Applies, Contract, Skips, loops, rewrite
from aropt.program import Call, Control, Graph, Program, Spec, StateSpec, calls
from aropt.restrict import restrict
from aropt.trace import capture_function
from aropt.units import window

I64 = torch.int64


@dataclass(frozen=True)
class KvCache:
    """Options: `rows`, "last" (logits of the last row only, default) or "all".

    `plan` raises Unsupported where no append cache is exact: skipping would hide that from whoever asked for speed.
    """

    rows: str = "last"
    name: ClassVar[str] = "kv-cache"
    contract: ClassVar[Contract] = Contract("rounding", ("full forward in a positions loop",), ("cached", "ragged"))

    def plan(self, program: Program, target: str) -> Applies | Skips:
        model = full_forward(program)
        if model is None:
            return Skips("no loop runs a full forward over growing tokens")
        facts = restrict(program.graphs[model.graph], program.weights, int(program.meta["capacity"]), self.rows).facts
        return Applies((f"{facts['attentions']} attentions, mask {', '.join(facts['masks'])}",))

    def run(self, program: Program) -> Program:
        model = full_forward(program)
        assert model is not None
        found = restrict(program.graphs[model.graph], program.weights, int(program.meta["capacity"]), self.rows)
        batch = str(program.state["tokens"].spec.dims[0])
        guided = batch != "B"
        step = replace(found.graph, name="step")
        graphs = {n: g for n, g in program.graphs.items() if n != model.graph}
        row = window(program.meta)
        graphs |= {"step": step, "enter": enter(guided, row), "place": place(row), "feed": feed(guided, row)}
        caches = {n: replace(s, spec=rebatch(s.spec, batch)) for n, s in found.state.items()}
        state = {
            **program.state,
            **caches,
            "feed": StateSpec("tokens", Spec(I64, (batch, "R", *row))),
            "filled": StateSpec("counter", Spec(I64)),
            "pads": StateSpec("lengths", Spec(I64, (batch,))),
        }

        def change(call: Call) -> list[Control]:
            if call.graph == "start":
                return [call, named(graphs["enter"])]
            if call.graph == model.graph:
                reads = {n: n for n in step.inputs} | {"ids": "feed"}
                return [named(graphs["place"]), Call("step", reads, {n: n for n in step.outputs})]
            return [call, named(graphs["feed"])] if call.graph == "append" else [call]

        weights = {**program.weights, **found.constants}
        return program.replace(
            graphs=graphs,
            state=state,
            control=rewrite(program.control, change),
            weights=weights,
            meta={**program.meta, "ragged": True, "masks": found.facts["masks"]},
        )


PASS = KvCache


def full_forward(program: Program) -> Call | None:
    """The call that runs the forward over all tokens, in a loop over positions."""
    for loop in loops(program.control, "positions"):
        for call in calls(loop.body):
            state = program.state.get(call.reads.get("ids", ""))
            if state is not None and state.kind == "tokens" and list(program.graphs[call.graph].inputs) == ["ids"]:
                return call
    return None


def named(graph: Graph) -> Call:
    """A call whose values are named as the graph's inputs and outputs."""
    return Call(graph.name, {n: n for n in graph.inputs}, {n: n for n in graph.outputs})


def rebatch(spec: Spec, batch: str) -> Spec:
    """The spec with the program's batch in place of the graph's B."""
    dims = tuple(
        "*".join(batch if p == "B" else p for p in d.split("*")) if isinstance(d, str) else d for d in spec.dims
    )
    return Spec(spec.dtype, dims)


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
    return capture_function("enter", function, inputs, ["feed", "filled", "pads"])


def place(row: tuple[int, ...]) -> Graph:
    """Where the fed rows go: slots [R] after the filled ones, positions [B, R] counted from each prompt's start."""

    def function(feed: Tensor, filled: Tensor, pads: Tensor) -> tuple[Tensor, ...]:
        slots = filled + torch.arange(feed.shape[1])
        positions = (slots - pads.unsqueeze(1)).clamp(min=-1)
        return slots, positions, filled + feed.shape[1]

    inputs = {"feed": Spec(I64, ("B", "R", *row)), "filled": Spec(I64), "pads": Spec(I64, ("B",))}
    return capture_function("place", function, inputs, ["slots", "positions", "filled"])


def feed(guided: bool, row: tuple[int, ...]) -> Graph:
    """The next round feeds the new token."""
    return capture_function(
        "feed",
        lambda token: (torch.cat([token, token]) if guided else token).unsqueeze(1),
        {"token": Spec(I64, ("B", *row))},
        ["feed"],
    )
