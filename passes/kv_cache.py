"""kv-cache: compute only new tokens; keep the keys and values of earlier ones.

`restrict` derives the cached step from the plain forward. The loop then feeds the prompt in its first round (prefill)
and one token a round after that (decode); both are the same graph, with the number of rows symbolic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from aropt.errors import UsageError
from aropt.ir.control import Call, Control
from aropt.ir.program import Program, Spec, StateSpec
from aropt.ir.units import window
from aropt.loops.cached import branch, enter, feed, of, pend, place
from aropt.loops.guidance import GROWING, JOINED, NEW_ROWS, forwards, in_rounds, joining, named, parting
from aropt.restrict.rewrite import Restricted, restrict
from aropt.rewriting.contract import Applies, Contract, Skips
from aropt.rewriting.target import Target

I64 = torch.int64


@dataclass(frozen=True)
class KvCache:
    """Options: `rows`, "last" (logits of the last row only, default) or "all".

    `plan` raises Unsupported where no append cache is exact: skipping would hide that from whoever asked for speed.
    """

    rows: str = "last"
    name: ClassVar[str] = "kv-cache"
    contract: ClassVar[Contract] = Contract(
        "rounding",
        after=("canonicalize", "cfg-batch", "int8-linears"),
        requires=(GROWING,),
        establishes=(NEW_ROWS,),
    )

    def __post_init__(self) -> None:
        if self.rows not in ("last", "all"):
            raise UsageError(what=f"kv-cache:rows={self.rows}", why="it is last or all", hint="leave it out")

    def plan(self, program: Program, target: Target) -> Applies | Skips:
        found = self.restricted(program, next(iter(forwards(program).values())).graph)
        facts = found.facts
        parts = [f"{facts['attentions']} attentions, mask {', '.join(facts['masks'])}"] if facts["masks"] else []
        parts += [f"{facts['recurrences']} recurrences"] if facts["recurrences"] else []
        return Applies((", ".join(parts) or "no row sees another",), make=lambda: self.cached(program, found))

    def restricted(self, program: Program, model: str) -> Restricted:
        """The forward for new rows. Raises Unsupported."""
        capacity, never = program.meta["capacity"], program.meta.get("never", ())
        return restrict(program.graphs[model], program.weights, capacity, self.rows, never=never)

    def run(self, program: Program) -> Program:
        return self.cached(program, self.restricted(program, next(iter(forwards(program).values())).graph))

    def cached(self, program: Program, found: Restricted) -> Program:
        """The program with the restricted forward in place of the full one."""
        models = forwards(program)
        model, row = next(iter(models.values())).graph, window(program.meta)
        batches = {ids.removesuffix("tokens"): str(program.state[ids].spec.dims[0]) for ids in models}
        step, guided = replace(found.graph, name="step"), batches[""] != "B"
        entering, placing = enter(guided, row), place(row)
        made = [step, entering, placing, feed("feed", guided, row)]
        own = found.state | {
            "feed": StateSpec("tokens", Spec(I64, ("B", "R", *row))),
            "filled": StateSpec("counter", Spec(I64)),
            "pads": StateSpec("lengths", Spec(I64, ("B",))),
        }
        if len(models) > 1:
            made += [pend(row)]
        moved = {}  # the cache of branches goes where their tokens go
        if JOINED in batches:
            kept = {n: s.spec for n, s in own.items()}
            moved = {JOINED: joining("join_cache", kept), "": parting("part_cache", kept)}
            made += [*moved.values(), feed("feed_joined", True, row)]
        graphs = {n: g for n, g in program.graphs.items() if n != model} | {g.name: g for g in made}

        def change(call: Call, fed: set[str]) -> list[Control]:
            told, known = ([p for p in batches if p + "tokens" in side.values()] for side in (call.writes, call.reads))
            if told and not known:
                return [call, *(branch(entering, p, prompt="negative" if p else "prompt") for p in told)]
            if call.graph == model:
                prefix = call.reads["ids"].removesuffix("tokens")
                stepped = branch(step, prefix, ids=prefix + "feed")
                return [branch(placing, prefix), replace(stepped, writes={**stepped.writes, **call.writes})]
            if told != known:
                return [call, *(named(moved[p]) for p in told)]
            feeds = {p: "pend" if p + "tokens" not in fed else "feed_joined" if p == JOINED else "feed" for p in told}
            return [call, *(branch(graphs[name], p) for p, name in feeds.items())]

        return program.replace(
            graphs=graphs,
            state={**program.state, **{p + n: of(s, p, b) for p, b in batches.items() for n, s in own.items()}},
            control=in_rounds(program.control, model, change),
            weights={**program.weights, **found.constants},
            meta={**program.meta, "ragged": True, "masks": found.facts["masks"]},
        )


PASS = KvCache
