"""The programs that mutants change, how they change them, and the registry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from aropt.frontend.trace import capture_model
from aropt.ir.control import Call, calls, loops, rewrite
from aropt.ir.edit import inline
from aropt.ir.program import Program
from aropt.loops.positions import autoregressive
from aropt.passes.canonicalize import Canonicalize
from aropt.passes.cfg_batch import CfgBatch
from aropt.passes.cfg_interval import CfgInterval
from aropt.passes.fuse_attention import FuseAttention
from aropt.passes.fuse_sampler import FuseSampler
from aropt.passes.kv_cache import KvCache
from aropt.passes.merge_linears import MergeLinears
from aropt.passes.prune import Prune
from aropt.rewriting.contract import Pass
from aropt.validate.compare import Verdict, cases, validate, with_probe

aten = torch.ops.aten
VOCAB, CAPACITY, NULL = 23, 32, 5


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
        self,
        layers: int = 1,
        groups: int = 4,
        window: int = 0,
        learned: bool = False,
        width: int = 16,
        vocab: int = VOCAB,
        capacity: int = CAPACITY,
        scale: float = 2.0,
    ) -> None:
        super().__init__()
        self.window, self.size = window, width // 4
        self.emb, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.pos = nn.Embedding(capacity, width) if learned else None
        self.attn = nn.ModuleList(Attention(width, 4, groups) for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        for p in self.parameters():
            p.data.mul_(scale)  # attention that is far from uniform, and logits that differ

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
    "rotary": {"layers": 2, "groups": 2}, "guided": {"learned": True}, "interval": {},
    "window": {"layers": 2, "window": 4},
    "fused": {"layers": 2, "groups": 2, "width": 64},
}  # fmt: skip
RULES = {
    "rotary": ("temperature", "top-k", "top-p"), "guided": ("guidance", "repetition-penalty", "bias", "min-p"),
    "interval": ("guidance-interval",),
}  # fmt: skip
BEFORE: dict[str, tuple[Pass, ...]] = {
    "guided": (CfgBatch(),), "interval": (CfgInterval(),), "fused": (Canonicalize(),),
}  # fmt: skip


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
    program = reference(model)
    fusions = (MergeLinears(), FuseAttention()) if model == "fused" else ()
    passes: tuple[Pass, ...] = () if stage else (*fusions, FuseSampler(), Prune())
    for one in (*BEFORE.get(model, ()), KvCache(), *passes):
        program = one.run(program)
    return with_probe(program)


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
        return [replace(call, reads={i: reads.get(v, v) for i, v in call.reads.items()}, writes=writes)]

    return program.replace(control=rewrite(program.control, change))


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


# --- running them ---------------------------------------------------------------------------------------------------


def check(name: str, base: str, quick: bool = False, explain: bool = True) -> Verdict:
    """Validates a mutant of an optimized program."""
    one = MUTANTS.get(name) or EQUIVALENT[name]
    plain = reference(base.partition("-")[0])
    return validate(plain, one.change(optimized(base)), chosen=cases(plain, quick=quick), explain=explain)
