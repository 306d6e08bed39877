"""kv-cache: compute only new tokens; keep the keys and values of earlier ones.

`restrict` derives the cached step from the plain forward. The loop then feeds the prompt in its first round (prefill)
and one token a round after that (decode); both are the same graph, with the number of rows symbolic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from aropt.guidance import forwards
from aropt.passbase import Applies, Contract, Skips
from aropt.program import Call, Control, Graph, If, Loop, Program, Seq, Spec, StateSpec
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
        models = forwards(program)
        if not models:
            return Skips("no loop runs a full forward over growing tokens")
        model = next(iter(models.values()))
        facts = restrict(program.graphs[model.graph], program.weights, int(program.meta["capacity"]), self.rows).facts
        return Applies((f"{facts['attentions']} attentions, mask {', '.join(facts['masks'])}",))

    def run(self, program: Program) -> Program:
        models = forwards(program)
        model = next(iter(models.values())).graph
        found = restrict(program.graphs[model], program.weights, int(program.meta["capacity"]), self.rows)
        batch = str(program.state["tokens"].spec.dims[0])
        step = replace(found.graph, name="step")
        graphs, row = {n: g for n, g in program.graphs.items() if n != model}, window(program.meta)
        made = [step, enter(batch != "B", row), place(row), feed(batch != "B", row)]
        graphs |= {g.name: g for g in (*made, *([pend(row)] if len(models) > 1 else []))}
        own = {n: replace(s, spec=rebatch(s.spec, batch)) for n, s in found.state.items()} | {
            "feed": StateSpec("tokens", Spec(I64, (batch, "R", *row))),
            "filled": StateSpec("counter", Spec(I64)),
            "pads": StateSpec("lengths", Spec(I64, (batch,))),
        }
        branches = {
            ids: ids.removesuffix("tokens") for ids in models
        }  # of the forward's calls: prefixes of their state

        def change(call: Call, fed: set[str]) -> list[Control]:
            if call.graph == "start":
                return [
                    call,
                    *(branch(graphs["enter"], p, prompt="negative" if p else "prompt") for p in branches.values()),
                ]
            if call.graph == model:
                prefix = branches[call.reads["ids"]]
                stepped = branch(step, prefix, ids=prefix + "feed")
                return [branch(graphs["place"], prefix), replace(stepped, writes={**stepped.writes, **call.writes})]
            told = [ids for ids in branches if ids in call.writes.values()]
            return [call, *(branch(graphs["feed" if ids in fed else "pend"], branches[ids]) for ids in told)]

        weights = {**program.weights, **found.constants}
        return program.replace(
            graphs=graphs,
            state={**program.state, **{p + n: apart(s, p) for p in branches.values() for n, s in own.items()}},
            control=stepped(program.control, model, change),
            weights=weights,
            meta={**program.meta, "ragged": True, "masks": found.facts["masks"]},
        )


PASS = KvCache


def stepped(control: Control, model: str, change: Callable[[Call, set[str]], list[Control]]) -> Control:
    """The control with its calls changed; `change` is told whose tokens the forward reads in the same round."""
    match control:
        case If(cond, then, orelse):
            return If(cond, stepped(then, model, change), stepped(orelse, model, change))
        case Loop():
            return replace(control, body=stepped(control.body, model, change))
        case Seq(body):
            fed = {c.reads["ids"] for c in body if isinstance(c, Call) and c.graph == model}
            parts = [change(c, fed) if isinstance(c, Call) else [stepped(c, model, change)] for c in body]
            return Seq(tuple(part for run in parts for part in run))
        case Call():
            return Seq(tuple(change(control, set())))


def apart(state: StateSpec, prefix: str) -> StateSpec:
    """The state of a branch: the unconditional one feeds a number of rows of its own."""
    dims = tuple("Q" if d == "R" and prefix else d for d in state.spec.dims)
    return replace(state, spec=Spec(state.spec.dtype, dims))


def branch(graph: Graph, prefix: str, **given: str) -> Call:
    """A call on the state of one branch; `given` and what all branches share have their own names."""
    shared = {n: n for n in ("prompt", "negative", "lengths", "token")} | given
    return Call(
        graph.name, {n: shared.get(n, prefix + n) for n in graph.inputs}, {n: prefix + n for n in graph.outputs}
    )


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


def pend(row: tuple[int, ...]) -> Graph:
    """A later round feeds the new token, after those that wait already."""
    inputs = {"feed": Spec(I64, ("B", "R", *row)), "token": Spec(I64, ("B", *row))}
    return capture_function("pend", lambda feed, token: torch.cat([feed, token.unsqueeze(1)], 1), inputs, ["feed"])
