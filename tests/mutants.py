"""Seeded miscompiles: each takes an optimized program that is right and makes one thing in it wrong.

The validator must catch all of them (`python -m tests.mutants` prints what it caught). A mutant is written once and
changes every graph that holds what it looks for, so that it applies to fused programs and to those with a graph a
step. `EQUIVALENT` are changes that can't be told from the outside: the validator must let those pass.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aropt.compose import inline
from aropt.loops import autoregressive
from aropt.passbase import loops, rewrite
from aropt.passes.canonicalize import Canonicalize
from aropt.passes.fuse_attention import FuseAttention
from aropt.passes.fuse_sampler import FuseSampler
from aropt.passes.kv_cache import KvCache
from aropt.passes.merge_linears import MergeLinears
from aropt.passes.prune import Prune
from aropt.program import Call, If, Program, Seq, calls
from aropt.trace import capture_model
from aropt.validate import Verdict, cases, validate, with_probe

aten = torch.ops.aten
VOCAB, CAPACITY, NULL = 23, 32, 5

# --- the models -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Grouped-query attention with biases, rotary angles or not."""

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = (nn.Linear(width, groups * self.size) for _ in range(2))

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, -1, self.size).transpose(1, 2) for f in (self.q, self.k, self.v))
        if angles is not None:
            q, k = (y * angles[0] + torch.cat((-y.chunk(2, -1)[1], y.chunk(2, -1)[0]), -1) * angles[1] for y in (q, k))
        if self.groups < self.heads:
            each = self.heads // self.groups
            k, v = (y.unsqueeze(2).expand(-1, -1, each, -1, -1).reshape(b, self.heads, t, -1) for y in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.o(mixed.transpose(1, 2).reshape(b, t, -1))


class Tiny(nn.Module):
    """A transformer: rotary, or with learned positions; causal, or with a sliding window in even layers."""

    def __init__(
        self, layers: int = 1, groups: int = 4, window: int = 0, learned: bool = False, width: int = 16
    ) -> None:
        super().__init__()
        self.window, self.size = window, width // 4
        self.emb, self.head = nn.Embedding(VOCAB, width), nn.Linear(width, VOCAB, bias=False)
        self.pos = nn.Embedding(CAPACITY, width) if learned else None
        self.attn = nn.ModuleList(Attention(width, 4, groups) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        for p in self.parameters():
            p.data.mul_(2)  # attention that is far from uniform, and logits that differ

    def forward(self, ids: Tensor) -> Tensor:
        x, at = self.emb(ids), torch.arange(ids.shape[1])
        angles = mask = None
        if self.pos is not None:
            x = x + self.pos(at)
        else:
            angle = (at[:, None] * 100.0 ** (-torch.arange(0, self.size, 2) / self.size)).repeat(1, 2)
            angles = angle.cos(), angle.sin()
        if self.window:
            mask = (at[None] <= at[:, None]) & (at[None] > at[:, None] - self.window)
        for i, (attn, up, down) in enumerate(zip(self.attn, self.up, self.down)):
            x = x + attn(self.norms[2 * i](x), angles, None if i % 2 else mask)
            x = x + down(F.silu(up(self.norms[2 * i + 1](x))))
        return self.head(self.norms[-1](x))


MODELS: dict[str, dict[str, Any]] = {
    "rotary": {"layers": 2, "groups": 2}, "guided": {"learned": True}, "window": {"layers": 2, "window": 4},
    "fused": {"layers": 2, "groups": 2, "width": 64},
}  # fmt: skip
RULES = {"rotary": ("temperature", "top-k", "top-p"), "guided": ("guidance", "repetition-penalty", "bias", "min-p")}


@functools.cache
def reference(model: str) -> Program:
    """The plain program of a model."""
    torch.manual_seed(1)
    graph, weights = capture_model(Tiny(**MODELS[model]), VOCAB, CAPACITY)
    if model not in RULES:  # the rules need not be captured again
        same = reference("rotary")
        return same.replace(graphs={**same.graphs, "model": graph}, weights=weights)
    return autoregressive(graph, weights, {"vocab": VOCAB, "capacity": CAPACITY, "null": NULL}, RULES[model])


@functools.cache
def optimized(base: str) -> Program:
    """The optimized program of a model, with its probe; "<model>-cached" is the one with kv-cache alone."""
    model, _, stage = base.partition("-")
    fused = model == "fused"
    program = KvCache().run(Canonicalize().run(reference(model)) if fused else reference(model))
    fusions = (MergeLinears(), FuseAttention()) if fused else ()
    for one in () if stage else (*fusions, FuseSampler(), Prune()):
        program = one.run(program)
    return with_probe(program)


# --- surgery --------------------------------------------------------------------------------------------------------

Change = Callable[[Program], Program]
Match = Callable[[fx.Node], bool]


def inner(program: Program) -> set[str]:
    """The graphs that a loop runs."""
    return {c.graph for loop in loops(program.control) for c in calls(loop.body)}


def edited(program: Program, graphs: set[str], change: Callable[[str, fx.Graph], int]) -> Program:
    """The program with copies of these graphs changed; `change` returns how many places it changed, one at least."""
    found, done = 0, dict(program.graphs)
    for name in graphs:
        graph, part = fx.Graph(), program.graphs[name]
        results = inline(graph, part, {n: graph.placeholder(n) for n in part.inputs})
        graph.output(tuple(results.values()))
        found += change(name, graph)
        done[name] = replace(part, fx=graph, aliases={})
    assert found, "the mutant does not apply"
    return program.replace(graphs=done)


def insert(graph: fx.Graph, after: fx.Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A node that calls a Python function."""

    def mutated(*values: Any, **options: Any) -> Any:  # fx needs a target with a plain name
        return function(*values, **options)

    mutated.__module__, mutated.__qualname__ = __name__, "mutated"
    with graph.inserting_after(after):
        return graph.call_function(mutated, args, kwargs)


def then(program: Program, value: str, function: Callable[..., Any], *reads: str, loop: bool = True) -> Program:
    """Makes the named value function(value, *inputs of its graph), in the loops or before them."""
    graphs = inner(program) if loop else set(program.graphs) - inner(program)

    def change(name: str, graph: fx.Graph) -> int:
        results = list(next(n for n in graph.nodes if n.op == "output").args[0])
        outputs = dict(zip(program.graphs[name].outputs, results))
        writes = {v: outputs[o] for c in calls(program.control) if c.graph == name for o, v in c.writes.items()}
        node = next((n for n in graph.nodes if n.meta.get("value") == value), writes.get(value))
        places = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        if node is None or not set(reads) <= set(places):
            return 0
        users = list(node.users)
        new = insert(graph, last_of(graph, node, *places.values()), function, node, *(places[r] for r in reads))
        new.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, new)
        return 1

    return edited(program, graphs, change)


def last_of(graph: fx.Graph, *nodes: fx.Node) -> fx.Node:
    """Whichever node of these comes last."""
    return [n for n in graph.nodes if n in nodes][-1]


def swap(
    program: Program, op: Any, function: Callable[..., Any], when: Match = lambda _: True, graph: str = ""
) -> Program:
    """Replaces an op by a Python function of the same arguments, where `when` holds."""

    def change(name: str, part: fx.Graph) -> int:
        found = [n for n in part.nodes if n.target is op and when(n)]
        for node in found:
            new = insert(part, node, function, *node.args, **node.kwargs)
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
            part.erase_node(node)
        return len(found)

    return edited(program, {graph} if graph else set(program.graphs), change)


def reads(name: str, at: int | None = None) -> Match:
    """Matches nodes that read an input of that name (as argument `at`)."""
    return lambda n: any(
        getattr(x, "target", None) == name for x in (n.all_input_nodes if at is None else [n.args[at]])
    )


def follows(op: Any, at: int = 0) -> Match:
    """Matches nodes whose argument `at` is that op."""
    return lambda n: getattr(n.args[at], "target", None) is op


def within(module: str) -> Match:
    return lambda n: n.meta.get("where") == module


def reweigh(program: Program, name: str, function: Callable[[Tensor], Tensor]) -> Program:
    """Changes the weights whose names contain `name`."""
    found = [w for w in program.weights if name in w]
    assert found, f"no weight named {name}"
    return program.replace(weights={**program.weights, **{w: function(program.weights[w]) for w in found}})


def recall(program: Program, reads: dict[str, str] | None = None, drop: str = "") -> Program:
    """In the loops, lets calls read other values, or no longer write one."""
    reads, graphs = reads or {}, inner(program)

    def change(call: Call) -> list[Any]:
        if call.graph not in graphs:
            return [call]
        writes = {o: v for o, v in call.writes.items() if v != drop}
        return [Call(call.graph, {i: reads.get(v, v) for i, v in call.reads.items()}, writes)]

    return program.replace(control=rewrite(program.control, change))


# --- the registry ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant:
    """A change, the programs that it applies to, and the modules of which localisation may name one ("": outside)."""

    change: Change
    bases: tuple[str, ...]
    modules: tuple[str, ...]
    quick: bool = True  # whether the short list of cases, used after each pass, catches it too


MUTANTS: dict[str, Mutant] = {}
EQUIVALENT: dict[str, Mutant] = {}
OUTSIDE = ("",)


def mutant(
    *bases: str, at: tuple[str, ...] = OUTSIDE, quick: bool = True, equivalent: bool = False
) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        (EQUIVALENT if equivalent else MUTANTS)[change.__name__] = Mutant(change, bases, at, quick)
        return change

    return register


BOTH = ("rotary", "rotary-cached")

# --- caches ---------------------------------------------------------------------------------------------------------


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


# --- positions ------------------------------------------------------------------------------------------------------


@mutant("guided", "guided-cached", at=("model", "pos"))
def position_plus_one(p: Program) -> Program:
    """Learned positions are one too high. (Rotary ones would not show it.)"""
    return then(p, "positions", lambda at: torch.where((at >= 0) & (at < CAPACITY - 1), at + 1, at))


@mutant("rotary", at=("attn.0",))
def position_plus_one_in_decode(p: Program) -> Program:
    """Decoded rows are one position too far from the prompt."""
    return then(p, "positions", lambda at, filled: (at + (filled > 0).long()).clamp(max=CAPACITY - 1), "filled")


@mutant("rotary", "guided", at=("attn.0", "model", "pos"))
def position_constant(p: Program) -> Program:
    """All rows are at position 0."""
    return then(p, "positions", lambda at: at.clamp(max=0))


@mutant("guided", "guided-cached", at=("model", "pos"))
def slots_as_positions(p: Program) -> Program:
    """Padding counts in the positions of the rows after it: only ragged batches show it."""
    return then(p, "positions", lambda at, pads: torch.where(at >= 0, at + pads[:, None], at), "pads")


@mutant("guided", at=("model", "pos"))
def padding_of_the_neighbour(p: Program) -> Program:
    """Each row takes the next one's padding."""
    return then(p, "pads", lambda pads: pads.roll(1), loop=False)


@mutant("rotary", at=("attn.0",))
def position_table_too_short(p: Program) -> Program:
    """The last position that the model takes has the angles of the one before."""
    return reweigh(p, "positions.", lambda table: torch.cat([table[:-1], table[-2:-1]]))


# --- masks ----------------------------------------------------------------------------------------------------------


@mutant(*BOTH, "window", at=("attn.0",))
def sees_a_later_row(p: Program) -> Program:
    """Rows see one row ahead."""
    return swap(p, aten.le.Tensor, lambda stored, rows: stored <= rows + 1)


@mutant(*BOTH, at=("attn.0",))
def sees_padding(p: Program) -> Program:
    """Padding is stored as position 0: only ragged batches show it."""
    return then(p, "positions", lambda at: at.clamp(min=0))


@mutant(*BOTH, "window", at=("attn.0",))
def sees_empty_slots(p: Program) -> Program:
    """Slots that nothing was written to are attended to."""
    return swap(p, aten.ge.Scalar, lambda stored, _: stored >= -1, lambda n: n.args[1] == 0)


@mutant("rotary", at=("attn.0",))
def first_token_hidden(p: Program) -> Program:
    """Rows do not see position 0."""
    return swap(p, aten.ge.Scalar, lambda stored, _: stored >= 1, lambda n: n.args[1] == 0)


@mutant("window", at=("attn.0",))
def window_too_wide(p: Program) -> Program:
    """The window holds one row more."""
    return swap(p, aten.gt.Tensor, lambda stored, oldest: stored >= oldest)


@mutant("window", at=("attn.0",))
def window_ignored(p: Program) -> Program:
    """The local layer has the global layer's mask."""
    return swap(p, aten.gt.Tensor, lambda stored, _: stored > -2)


@mutant("window", at=("attn.0",))
def window_too_narrow(p: Program) -> Program:
    """The window holds one row less."""
    return swap(p, aten.gt.Tensor, lambda stored, oldest: stored > oldest + 1)


@mutant("rotary", at=("attn.0",))
def own_slot_off_by_one(p: Program) -> Program:
    """A row sees the slot after its own."""
    return swap(p, aten.eq.Tensor, lambda all_slots, mine: all_slots == mine + 1, follows(aten.arange.default))


@mutant("rotary", at=("attn.0",))
def mask_of_the_neighbour(p: Program) -> Program:
    """Each row takes the next one's mask: only ragged batches show it."""
    return swap(p, aten.le.Tensor, lambda stored, rows: (stored <= rows).roll(1, 0))


# --- the model's arithmetic -----------------------------------------------------------------------------------------


@mutant("rotary", at=("attn.1",))
def wrong_scale(p: Program) -> Program:
    """Layer 1's attention divides by the head size, not its root."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=1 / q.shape[-1])

    return swap(p, aten.scaled_dot_product_attention.default, attend, within("attn.1"))


@mutant("rotary", at=("attn.0",))
def heads_mapped_wrong(p: Program) -> Program:
    """Query head h reads key head h % 2, not h // 2."""
    return swap(p, aten.expand.default, lambda x, shape: x.expand(shape).transpose(1, 2), within("attn.0"))


@mutant("rotary", at=("attn.0",))
def sine_flipped(p: Program) -> Program:
    """Rotary angles turn the other way."""
    return reweigh(p, "positions.sin", torch.neg)


@mutant("rotary", "window", at=("attn.0",))
def sine_table_shifted(p: Program) -> Program:
    """Sines are those of the position before."""
    return reweigh(p, "positions.sin", lambda table: table.roll(1, 0))


@mutant("rotary", "guided", at=("up.0",))
def one_weight_off(p: Program) -> Program:
    """One element of a weight is off by a thousandth."""

    def nudge(weight: Tensor) -> Tensor:
        weight = weight.clone()
        weight[3, 2] *= 1.001
        return weight

    return reweigh(p, "up.0.weight", nudge)


@mutant("rotary", at=("up.0",))
def layer_weights_swapped(p: Program) -> Program:
    """Layer 0 uses layer 1's weight, which has the same shape."""
    return reweigh(p, "up.0.weight", lambda _: p.weights["up.1.weight"])


@mutant("rotary", at=("down.0",))
def bias_dropped(p: Program) -> Program:
    """A linear layer without its bias."""
    return swap(p, aten.linear.default, lambda x, w, _: F.linear(x, w), within("down.0"))


@mutant("rotary", at=("norms.2",))
def wrong_epsilon(p: Program) -> Program:
    """A norm with a hundred times the epsilon."""
    return swap(p, aten.layer_norm.default, lambda x, shape, w, b, eps, _: F.layer_norm(x, shape, w, b, 100 * eps),
                within("norms.2"))  # fmt: skip


@mutant("rotary", at=("attn.0",))
def table_rounded(p: Program) -> Program:
    """A constant was folded in bfloat16."""
    return reweigh(p, "positions.cos", lambda table: table.bfloat16().float())


@mutant("guided", at=("head",))
def weight_rounded(p: Program) -> Program:
    """The head was stored in float16."""
    return reweigh(p, "head.weight", lambda w: w.half().float())


def second_last(x: Tensor, axis: int, *_: int) -> Tensor:
    return x.narrow(axis, max(x.shape[axis] - 2, 0), 1)


@mutant(*BOTH, at=("attn.1", "model"))
def last_row_off_by_one(p: Program) -> Program:
    """The logits are those of the row before the last."""
    return swap(p, aten.slice.Tensor, second_last, lambda n: n.args[2] == -1)


@mutant(*BOTH, "guided")
def logits_of_the_neighbour(p: Program) -> Program:
    """The rule sees the next sequence's logits."""
    return then(p, "row", lambda row: row.roll(1, 0))


# --- the loop -------------------------------------------------------------------------------------------------------


@mutant(*BOTH)
def limit_plus_one(p: Program) -> Program:
    """One token too many."""
    return swap(p, aten.ge.Tensor, lambda count, limit: count >= limit + 1, reads("limit"))


@mutant("rotary")
def limit_minus_one(p: Program) -> Program:
    """One token too few."""
    return swap(p, aten.ge.Tensor, lambda count, limit: count >= limit - 1, reads("limit"))


@mutant(*BOTH)
def limit_ignored(p: Program) -> Program:
    """Without a stop token the loop never ends."""
    return swap(p, aten.ge.Tensor, lambda count, _: count < 0, reads("limit"))


@mutant("rotary")
def one_token_for_none(p: Program) -> Program:
    """A limit of 0 still gives a token."""
    return then(p, "finished", torch.zeros_like, loop=False)


@mutant(*BOTH)
def stop_ignored(p: Program) -> Program:
    """Stop tokens end nothing."""
    return swap(p, aten.any.dim, lambda x, _: torch.zeros_like(x[:, 0]), follows(aten.eq.Tensor))


@mutant("rotary")
def stop_ignored_when_sampling(p: Program) -> Program:
    """Stop tokens end nothing in the sampled loop."""
    return swap(p, aten.any.dim, lambda x, _: torch.zeros_like(x[:, 0]), follows(aten.eq.Tensor), graph="step_sample")


@mutant("rotary")
def stop_of_the_neighbour(p: Program) -> Program:
    """A stop token ends the next row."""
    return swap(p, aten.any.dim, lambda x, axis: x.any(axis).roll(1), follows(aten.eq.Tensor))


@mutant("rotary")
def first_stop_only(p: Program) -> Program:
    """Only the first of the stop tokens counts."""
    return swap(p, aten.eq.Tensor, lambda token, stop: token == stop[:1], reads("stop", 1))


@mutant("rotary")
def one_end_ends_all(p: Program) -> Program:
    """The batch ends with its first row."""
    return swap(p, aten.all.default, torch.any)


@mutant(*BOTH)
def emits_after_the_end(p: Program) -> Program:
    """Tokens follow the stop token."""
    return swap(p, aten.where.ScalarSelf, lambda done, none, token: token)


@mutant("rotary")
def stop_token_swallowed(p: Program) -> Program:
    """The stop token itself is not emitted."""
    return then(p, "emitted", lambda x, stop: torch.where((x[:, None] == stop).any(1), -1, x), "stop")


@mutant("rotary")
def end_forgotten(p: Program) -> Program:
    """A row that ended goes on a round later."""
    return swap(p, aten.__or__.Tensor, lambda _, now: now, reads("done", 0))


@mutant(*BOTH)
def end_pruned(p: Program) -> Program:
    """Pruning took the flag of ended rows for dead."""
    return recall(p, drop="done")


@mutant("rotary", "guided", at=("emb",))
def feeds_the_neighbour(p: Program) -> Program:
    """Each row continues with the next one's token: a batch of one hides it."""
    return then(p, "feed", lambda feed: feed.roll(1, 0))


@mutant("rotary", "guided", at=("emb",))
def first_decode_repeats(p: Program) -> Program:
    """The round after the prompt feeds the prompt's last token again."""
    return then(p, "feed", lambda new, fed: fed[:, -1:] if fed.shape[1] > 1 else new, "feed")


@mutant("rotary", at=("emb",))
def prompt_loses_its_last_token(p: Program) -> Program:
    """The last token of the prompt is fed as the one before it."""
    return then(p, "feed", lambda x: torch.cat([x[:, :-1], x[:, -2:][:, :1]], 1), loop=False)


@mutant(*BOTH)
def branches_of_if_swapped(p: Program) -> Program:
    """Greedy generation runs the sampled loop."""
    assert isinstance(p.control, Seq)
    parts = (If(c.cond, c.orelse, c.then) if isinstance(c, If) else c for c in p.control.body)
    return p.replace(control=Seq(tuple(parts)))


# --- the rule -------------------------------------------------------------------------------------------------------


def noise(program: Program, change: Callable[..., tuple[Any, ...]]) -> Program:
    """The noise of other seeds, streams or positions."""
    return swap(program, torch.ops.aropt.noise.default, lambda *a: torch.ops.aropt.noise(*change(*a)))


@mutant(*BOTH, "guided")
def noise_ignored(p: Program) -> Program:
    """All uniform numbers are a half."""
    return swap(p, torch.ops.aropt.noise.default, lambda seed, streams, _, n: torch.full((len(streams), n), 0.5))


@mutant("rotary", "guided")
def noise_of_one_stream(p: Program) -> Program:
    """All rows draw alike."""
    return noise(p, lambda seed, streams, at, n: (seed, torch.zeros_like(streams), at, n))


@mutant("rotary")
def noise_by_row(p: Program) -> Program:
    """Noise depends on the row of the batch, not on the stream."""
    return noise(p, lambda seed, streams, at, n: (seed, torch.arange(len(streams)), at, n))


@mutant("rotary", "guided")
def noise_without_position(p: Program) -> Program:
    """Each round draws alike."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, torch.zeros_like(at), n))


@mutant("rotary")
def noise_position_plus_one(p: Program) -> Program:
    """The noise is that of the next token."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, at + 1, n))


@mutant("rotary")
def noise_by_slot(p: Program) -> Program:
    """Noise depends on the padded position: only ragged batches show it."""
    return noise(p, lambda seed, streams, at, n: (seed, streams, at.max().expand_as(at), n))


@mutant(*BOTH)
def seed_ignored(p: Program) -> Program:
    """All seeds are 0."""
    return noise(p, lambda seed, streams, at, n: (torch.zeros_like(seed), streams, at, n))


@mutant("rotary", quick=False)
def seed_of_32_bits(p: Program) -> Program:
    """Large seeds lose their high bits."""
    return noise(p, lambda seed, streams, at, n: (seed % 2**32, streams, at, n))


@mutant("rotary")
def gumbel_sign(p: Program) -> Program:
    """Noise is added with the wrong sign."""
    return swap(p, aten.sub.Tensor, lambda logits, g: logits + g, follows(aten.log.default, 1))


@mutant(*BOTH)
def top_k_plus_one(p: Program) -> Program:
    """One token more is kept."""
    return swap(p, aten.clamp.default, lambda k, low, high: (k + 1).clamp(low, high), reads("top_k", 0))


@mutant("rotary")
def top_k_minus_one(p: Program) -> Program:
    """One token less is kept."""
    return swap(p, aten.clamp.default, lambda k, low, high: (k - 1).clamp(low, high), reads("top_k", 0))


@mutant("rotary")
def top_p_excludes_the_last(p: Program) -> Program:
    """The token that reaches p is left out."""
    return swap(p, aten.sub.Tensor, lambda total, _: total, follows(aten.cumsum.default))


@mutant("rotary")
def top_p_one_more(p: Program) -> Program:
    """The token after the one that reaches p is kept."""
    return swap(p, aten.clamp.default, lambda count, low: (count + 1).clamp(low, VOCAB), follows(aten.sum.dim_IntList))


@mutant("rotary")
def top_p_ignored(p: Program) -> Program:
    """All tokens are kept."""
    return swap(p, aten.ge.Scalar, lambda value, _: value >= 0, reads("top_p", 0))


@mutant("rotary", "guided")
def temperature_ignored(p: Program) -> Program:
    """The temperature is 1."""
    return swap(p, aten.clamp.default, lambda t, _: torch.ones_like(t), reads("temperature", 0))


@mutant("guided")
def min_p_squared(p: Program) -> Program:
    """The threshold is p squared."""
    return swap(p, aten.log.default, lambda p: 2 * p.log(), reads("min_p", 0))


@mutant("guided", "guided-cached")
def penalty_forgets_the_prompt(p: Program) -> Program:
    """Only generated tokens are penalized."""
    return then(p, "seen", torch.zeros_like, loop=False)


@mutant("guided", "guided-cached")
def penalty_forgets_the_generated(p: Program) -> Program:
    """Only the prompt's tokens are penalized."""
    return then(p, "seen", lambda _, before: before, "seen")


@mutant("guided")
def penalty_counts_padding(p: Program) -> Program:
    """The padding token counts as seen: only ragged batches show it."""
    return swap(p, aten.ge.Tensor, lambda at, first: at >= first - CAPACITY, graph="begin")


@mutant("guided")
def penalty_rewards_negatives(p: Program) -> Program:
    """Negative logits are divided too, which makes them likelier."""
    return swap(p, aten.mul.Tensor, lambda x, penalty: x / penalty, reads("repetition_penalty", 1))


@mutant("guided", "guided-cached")
def guidance_branches_swapped(p: Program) -> Program:
    """The unconditional branch is taken for the conditional one."""
    return swap(p, aten.select.int, lambda x, axis, i: x.select(axis, 1 - i), lambda n: n.args[1] == 0)


@mutant("guided")
def guidance_scale_off(p: Program) -> Program:
    """The guidance scale is a tenth too large."""
    return swap(p, aten.mul.Tensor, lambda scale, x: 1.1 * scale * x, reads("guidance", 0))


@mutant("guided", at=("emb",))
def negative_prompt_ignored(p: Program) -> Program:
    """Both branches get the prompt."""
    return swap(
        p,
        aten.cat.default,
        lambda x: torch.cat([x[0], x[0]]),
        reads("negative"),
        graph="begin" if "begin" in p.graphs else "enter",
    )


@mutant("guided")
def bias_ignored(p: Program) -> Program:
    """The bias over the vocabulary is not added."""
    return swap(p, aten.add.Tensor, lambda x, _: x, reads("bias", 1))


# --- changes that nothing can tell ----------------------------------------------------------------------------------


@mutant("rotary", equivalent=True)
def own_slot_rule_dropped(p: Program) -> Program:
    """Rows of padding see nothing: SDPA gives zeros for them, and nobody reads those."""
    return swap(p, aten.eq.Tensor, lambda all_slots, mine: (all_slots == mine) & False, follows(aten.arange.default))


@mutant("rotary", "window", equivalent=True)
def strictly_earlier(p: Program) -> Program:
    """Rows see strictly earlier positions, and their own by the own-slot rule."""
    return swap(p, aten.le.Tensor, lambda stored, rows: stored < rows)


@mutant("rotary", equivalent=True)
def states_renamed(p: Program) -> Program:
    """Two states of the same type change names, where read and where written."""
    names = {"k_0": "k_1", "k_1": "k_0"}

    def change(call: Call) -> list[Any]:
        return [Call(call.graph, *({i: names.get(v, v) for i, v in d.items()} for d in (call.reads, call.writes)))]

    return p.replace(control=rewrite(p.control, change))


@mutant("rotary", equivalent=True)
def logits_rounded_elsewhere(p: Program) -> Program:
    """The attention sums in another order."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        return scores.softmax(-1).nan_to_num() @ v

    return swap(p, aten.scaled_dot_product_attention.default, attend)


# --- running them ---------------------------------------------------------------------------------------------------


def check(name: str, base: str, quick: bool = False, explain: bool = True) -> Verdict:
    """Validates a mutant of an optimized program."""
    one = MUTANTS.get(name) or EQUIVALENT[name]
    plain = reference(base.partition("-")[0])
    return validate(plain, one.change(optimized(base)), chosen=cases(plain, quick=quick), explain=explain)


def main() -> int:
    """Prints which case caught each mutant and where it was found, what the short list misses, and `caught K/N`."""
    start, caught, total, only_full = time.perf_counter(), 0, 0, []
    for name, base in ((name, base) for name, one in MUTANTS.items() for base in one.bases):
        verdict = check(name, base)
        total, caught = total + 1, caught + (not verdict.passed)
        if check(name, base, quick=True, explain=False).passed:
            only_full.append(f"{name} ({base})")
        failed = verdict.outcomes[-1]
        found = (verdict.diverges or {}).get("module") or "outside"
        line = "MISSED" if verdict.passed else f"{failed.case.name:16} {found:8} {failed.problem}"
        print(f"{name:30} {base:14} {line}"[:150], flush=True)
    print(f"only the full list of cases catches: {', '.join(only_full) or 'none'}")
    print(f"{len(MUTANTS)} kinds, {time.perf_counter() - start:.0f} s")
    print(f"caught {caught}/{total}")
    return int(caught < total)


if __name__ == "__main__":
    from tests import mutants, mutants_fused  # noqa: F401  (as modules: the other files register in the former)

    sys.exit(mutants.main())
