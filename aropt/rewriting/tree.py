"""A step whose rows are the nodes of a token tree, and what takes one of its paths into the state (STree, Wu et al.
2025, section 4; for slots, Miao et al. 2024, section 4.2).

    tree(ids[B, R], positions[B, R], pairs[B, R, R], slot_positions, k_0, state_1, ..)
        -> logits[B, R, V], k_0_rows, state_1_x, ..
    settle(path[B, P], start[B], origin[B], slot_positions, k_0, state_1, .., k_0_rows, state_1_x, ..)
        -> slot_positions, k_0, state_1, ..

The tree's step reads the state and writes none. `pairs` says which nodes are above a node or the node itself: of new
rows a row sees these alone, and of what is stored what it sees anyway. Of a tree that is always the same they are a
constant of the graph (see `Nodes`). The stash is what the rows would have written: keys and values, and what
recurrences were given. `settle` writes that of the path's nodes (-1: none), the first to slot `start` of its sequence
with position `origin`. Of a recurrence it computes the state after the path: by the mixer's `commit`, or by running it
once more over the path alone.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.calls import bind, op_name
from aropt.ir.dims import Dim
from aropt.ir.edit import copied, inline, trim
from aropt.ir.opdef import Mixer
from aropt.ir.program import Graph, Spec, StateSpec
from aropt.ir.torch_compat import build
from aropt.restrict.all_rows import wide
from aropt.restrict.mixers import mixer_of, tensors
from aropt.rewriting.int8 import EightBits

aten = torch.ops.aten
I64, BOOL = torch.int64, torch.bool
STORED = "aten::index_copy"


class NoTree(Exception):
    """Why a step can't be computed for the nodes of a tree."""


@dataclass(frozen=True)
class Nodes:
    """What is known of the rows of a step that are nodes: how many, how many a path has, and which are above which.

    `chain`: each node comes after the one before it, as the step's own rows do. `pairs` bool [R, R]: of a tree that is
    always the same; where it is None, `pairs` bool [B, R, R] is an input. `ahead`: a node may see others at later
    positions, where the pairs say so; no recurrence computes such rows.
    """

    rows: Dim = "R"
    path: Dim = "P"
    chain: bool = False
    pairs: Tensor | None = None
    ahead: bool = False


@dataclass(frozen=True)
class Forms:
    """The graphs "tree" and "settle" of a step."""

    tree: Graph
    settle: Graph


@dataclass
class Kept:
    """What a state gets from the rows of a step; of a recurrence its op, and the arguments that were its own."""

    rows: dict[str, tuple[fx.Node, int]]  # of the stash, with the axis of rows
    op: Any = None
    mixer: Mixer | None = None
    given: dict[str, Any] = field(default_factory=dict)
    first: int = 1  # which of the op's results is the first of the state


def forms(step: Graph, weights: MutableMapping[str, Tensor], nodes: Nodes = Nodes(), name: str = "tree") -> Forms:
    """Both forms of a step [B, R] that was derived by `restrict`. Raises NoTree.

    The first graph is called `name`; pairs that are always the same are added to the weights.
    """
    verify = wide(step, weights)
    if verify is None:
        raise NoTree("the step's last rows can't be computed alone")
    graph = copied(verify.fx)
    placed = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    held, pairs = f"{name}.pairs", None
    if not nodes.chain:
        with graph.inserting_before(next(n for n in graph.nodes if n.op != "placeholder")):
            pairs = graph.placeholder("pairs") if nodes.pairs is None else graph.get_attr(held)
    if nodes.pairs is not None:
        weights[held] = nodes.pairs.unsqueeze(0).contiguous()
    kept = stashed_slots(graph, placed, pairs, verify.inputs) if "slots" in placed else {}
    if nodes.ahead:
        see_ahead(graph, placed, pairs)
    kept |= stashed_recurrences(graph, placed, pairs)
    missing = set(verify.outputs) - {"logits", "slot_positions", *(s for one in kept for s in one.split())}
    if missing:
        raise NoTree(f"nothing is known of its state {', '.join(sorted(missing))}")
    tree = tree_of(verify, graph, kept, weights, nodes, name)
    settle = settle_of(verify, tree, kept, weights, nodes, held)
    return Forms(trim(tree, {"logits", *settle.inputs} & set(tree.outputs), weights), settle)


def stashed_slots(
    graph: fx.Graph, placed: Mapping[str, fx.Node], pairs: fx.Node | None, specs: Mapping[str, Spec]
) -> dict[str, Kept]:
    """Reads new rows beside what is stored, in place of writing them there; a row sees those that `pairs` says."""
    found = {}
    writes = [n for n in graph.nodes if op_name(n) == STORED]
    for node in sorted(writes, key=lambda n: n.args[0] is placed["slot_positions"]):  # that one last
        store, axis, slots, rows = node.args
        if slots is not placed["slots"] or store.op != "placeholder" or specs[store.name].dims[0] != "B":
            raise NoTree(f"its state {store.name} is not one of slots for each sequence")
        with graph.inserting_before(node):
            both = graph.call_function(aten.cat.default, ([store, rows], axis))
        both.meta = dict(node.meta)
        node.replace_all_uses_with(both)
        graph.erase_node(node)
        if store is placed["slot_positions"]:
            own_slots(graph, placed, both)
            if pairs is not None:
                hide_others(graph, placed, both, pairs)
        else:
            found[store.name] = Kept({f"{store.name}_rows": (rows, axis)})
    return found


def own_slots(graph: fx.Graph, placed: Mapping[str, fx.Node], columns: fx.Node) -> None:
    """New rows come after all slots."""
    call = graph.call_function
    with graph.inserting_before(columns.next):
        stored, rows = (call(aten.sym_size.int, (placed[n], 1)) for n in ("slot_positions", "positions"))
        count = call(aten.arange.default, (rows,), {"device": torch.device("cpu")})
        places = call(aten.add.Tensor, (count, stored))
    placed["slots"].replace_all_uses_with(places)


def hide_others(graph: fx.Graph, placed: Mapping[str, fx.Node], columns: fx.Node, pairs: fx.Node) -> None:
    """Where the step asks which slots are filled, it asks of new rows whether they are on the same path."""
    call = graph.call_function
    for node in [n for u in columns.users if op_name(u) == "aten::unsqueeze" for n in u.users if is_filled(n)]:
        with graph.inserting_before(node.next):
            stored, rows = (
                call(aten.ge.Scalar, (call(aten.unsqueeze.default, (placed[name], at)), -1))
                for name, at in (("slot_positions", 1), ("positions", 2))
            )
            every = call(aten.logical_or.default, (stored, rows))  # [B, R, S]: of what is stored, all
            sizes = (call(aten.sym_size.int, (every, 0)), -1, -1)
            allowed = call(aten.cat.default, ([every, call(aten.expand.default, (pairs, sizes))], 2))
            seen = call(aten.logical_and.default, (node, allowed))
        for user in [user for user in node.users if user is not seen]:
            user.replace_input_with(node, seen)


def see_ahead(graph: fx.Graph, placed: Mapping[str, fx.Node], pairs: fx.Node | None) -> None:
    """Where the step asks which rows stand before a row, it asks of new rows what `pairs` says. Raises NoTree."""
    mixers = [mixer for n in graph.nodes if n.op == "call_function" and (mixer := mixer_of(n)) is not None]
    asked = [n for n in graph.nodes if n.target is aten.le.Tensor and is_before(n, placed["positions"])]
    if pairs is None or not asked or any(mixer.state for mixer in mixers):
        raise NoTree("nothing is known of rows that see later ones")
    call = graph.call_function
    for node in asked:
        with graph.inserting_before(node.next):
            stored = call(aten.unsqueeze.default, (call(aten.lt.Scalar, (placed["slot_positions"], -1)), 1))
            none = call(aten.expand.default, (stored, [-1, call(aten.sym_size.int, (placed["positions"], 1)), -1]))
            own = call(aten.expand.default, (pairs, [call(aten.sym_size.int, (none, 0)), -1, -1]))
            seen = call(aten.logical_or.default, (node, call(aten.cat.default, ([none, own], 2))))
        for user in [user for user in node.users if user is not seen]:
            user.replace_input_with(node, seen)


def is_before(node: fx.Node, positions: fx.Node) -> bool:
    """Whether a comparison is columns [B, 1, S] <= rows' positions [B, R, 1]."""
    columns, rows = (n for n in node.args if isinstance(n, fx.Node))
    shaped = all(op_name(n) == "aten::unsqueeze" and n.args[1] == at for n, at in ((columns, 1), (rows, 2)))
    return shaped and rows.args[0] is positions


def is_filled(node: fx.Node) -> bool:
    return node.target is aten.ge.Scalar and bool(node.args[1] == 0)


def stashed_recurrences(graph: fx.Graph, placed: Mapping[str, fx.Node], pairs: fx.Node | None) -> dict[str, Kept]:
    """Computes recurrences for the nodes of a tree; {names of the state, with spaces: what becomes of it}."""
    found = {}
    for node in list(graph.nodes):
        mixer = mixer_of(node) if node.op == "call_function" else None
        if mixer is None or not mixer.state:
            continue
        given = bind(node)
        if (pairs is not None and not mixer.tree) or given[mixer.positions] is not placed["positions"]:
            raise NoTree(f"{op_name(node)} has no form for trees")
        names = [one.name for name in mixer.state for one in tensors(given[name])]
        if pairs is not None:
            on_tree(graph, node, mixer, pairs)
        else:  # padding comes after all other rows, whose results it can't change
            places = [argument.name for argument in node.target._schema.arguments]
            node.update_arg(places.index(mixer.positions), None)
        rows = {
            stash: (value, axis + value.meta["val"].dim() if axis < 0 else axis)
            for argument, axis in mixer.rows.items()
            for stash, value in stashed(names[0], argument, given[argument]).items()
        }
        first = len(node.meta["val"]) - len(names)
        found[" ".join(names)] = Kept(rows, node.target, mixer, given, first)
    return found


def stashed(state: str, argument: str, value: Any) -> dict[str, fx.Node]:
    """An argument with rows, or each of a list, by its name in the stash."""
    several = isinstance(value, (list, tuple))
    return {f"{state}_{argument.lower()}" + f"_{i}" * several: one for i, one in enumerate(tensors(value))}


def on_tree(graph: fx.Graph, node: fx.Node, mixer: Mixer, pairs: fx.Node) -> None:
    """The recurrence's rows as nodes, in the place of rows one after the other."""
    given = bind(node)
    with graph.inserting_before(node):
        made = graph.call_function(
            ops.load(mixer.tree).overload, tuple(pairs if n == mixer.positions else v for n, v in given.items())
        )
    made.meta = dict(node.meta)
    for replaced in [node] if mixer.initial else [u for u in node.users if u.args[1] == 0]:
        replaced.replace_all_uses_with(made)


def tree_of(
    step: Graph, graph: fx.Graph, kept: Mapping[str, Kept], weights: Mapping[str, Tensor], nodes: Nodes, name: str
) -> Graph:
    """The step for nodes: its logits, and the stash."""
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    results: Any = output.args[0]
    logits = results[list(step.outputs).index("logits")]
    stash = {name: rows for one in kept.values() for name, (rows, _) in one.rows.items()}
    output.args = ((logits, *stash.values()),)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    specs = {**step.inputs, "pairs": Spec(BOOL, ("B", "R", "R"))}
    for node in [n for n in graph.nodes if n.op == "placeholder" and not n.users]:
        graph.erase_node(node)
    inputs = {
        n.name: replace(specs[n.name], dims=tuple(nodes.rows if d == "R" else d for d in specs[n.name].dims))
        for n in graph.nodes
        if n.op == "placeholder"
    }
    return build(name, graph, inputs, ["logits", *stash], weights)


def path_places(slots: bool, size: Dim) -> Graph:
    """Of a path's nodes: which rows of the stash, -1 where a row does not count, the last one, and where they go.

    What is no node is the first one again, so that it changes nothing.
    """

    def places(path: Tensor, start: Tensor, origin: Tensor, **stored: Tensor) -> tuple[Tensor, ...]:
        there, first = path >= 0, path[:, :1]
        index = torch.where(there, path, first).clamp(min=0)
        counts, leaf = torch.where(there, 0, -1), path.amax(1)  # a node comes after those above it
        if not slots:
            return index, counts, leaf
        ahead = torch.where(there, torch.arange(path.shape[1]), 0)
        at = (start.unsqueeze(1) + ahead).clamp(max=stored["slot_positions"].shape[1] - 1)
        return index, counts, leaf, at, torch.where(first >= 0, origin.unsqueeze(1) + ahead, -1)

    inputs = {**path_of(size), **({"slot_positions": Spec(I64, ("B", "S"))} if slots else {})}
    return capture_function("places", places, inputs, ["index", "counts", "leaf", *(["at", "rows"] if slots else [])])


def path_of(size: Dim) -> dict[str, Spec]:
    """What says which nodes count, and where they go."""
    return {"path": Spec(I64, ("B", size)), "start": Spec(I64, ("B",)), "origin": Spec(I64, ("B",))}


def settle_of(
    step: Graph, tree: Graph, kept: Mapping[str, Kept], weights: Mapping[str, Tensor], nodes: Nodes, held: str
) -> Graph:
    """The graph that takes a path's rows into the state; `held` is the name of pairs that are always the same."""
    states = {n: s for n, s in step.inputs.items() if n in step.outputs}
    slots = "slot_positions" in states
    stash = {n: tree.outputs[n] for one in kept.values() for n in one.rows}
    above = {} if nodes.chain or nodes.pairs is not None else {"pairs": Spec(BOOL, ("B", nodes.rows, nodes.rows))}
    inputs = path_of(nodes.path) | above | states | stash
    graph = fx.Graph()
    given: dict[str, Any] = {n: graph.placeholder(n) for n in inputs}
    placed = inline(graph, path_places(slots, nodes.path), given)
    if nodes.pairs is not None:
        given["pairs"] = graph.get_attr(held)
    write = ops.load("write_rows").overload
    made: dict[str, fx.Node] = {}
    if slots:
        made["slot_positions"] = graph.call_function(write, (given["slot_positions"], placed["at"], placed["rows"], 1))
    for names, one in kept.items():
        if (closed := commits(one, nodes.chain)) is not None:
            arguments = rerun(graph, names.split(), one, given) | {"pairs": given.get("pairs"), "leaf": placed["leaf"]}
            wanted = [arguments[a.name] for a in closed._schema.arguments]
            made[names] = graph.call_function(closed, tuple(wanted))
            continue
        rows = (
            given
            if nodes.chain and one.mixer
            else {n: on_path(graph, given[n], placed["index"], inputs[n], axis) for n, (_, axis) in one.rows.items()}
        )  # of a chain all rows: those that do not count change nothing
        if one.mixer is None:
            ((row, (_, axis)),) = one.rows.items()
            made[names] = graph.call_function(write, (given[names], placed["at"], rows[row], axis))
        else:
            arguments = rerun(graph, names.split(), one, {**given, **rows}) | {one.mixer.positions: placed["counts"]}
            call = graph.call_function(one.op, tuple(arguments.values()))
            state = enumerate(names.split(), one.first)
            made |= {n: graph.call_function(operator.getitem, (call, i)) for i, n in state}
    graph.output(tuple(made[n] for n in states))
    unread = {name for name, node in given.items() if not node.users}
    for name in unread:
        graph.erase_node(given[name])
    used = {n: s for n, s in inputs.items() if n not in unread}
    return build("settle", graph, used, list(states), weights, "bookkeeping")


def on_path(graph: fx.Graph, rows: fx.Node, index: fx.Node, spec: Spec, axis: int) -> fx.Node:
    """The path's rows of a stash."""
    for at in range(1, len(spec.dims)):
        if at != axis:
            index = graph.call_function(aten.unsqueeze.default, (index, at))
    sizes = [-1 if i in (0, axis) else size for i, size in enumerate(spec.dims)]
    return graph.call_function(
        aten.gather.default, (rows, axis, graph.call_function(aten.expand.default, (index, sizes)))
    )


def commits(one: Kept, chain: bool) -> Any:
    """The op that gives the state after a path in closed form, or None."""
    if one.mixer is None or not one.mixer.commit:
        return None
    closed = ops.load(one.mixer.commit).overload
    pairs = next(a for a in closed._schema.arguments if a.name == "pairs")
    return closed if not chain or str(pairs.type).startswith("Optional") else None


def rerun(graph: fx.Graph, names: list[str], one: Kept, given: Mapping[str, fx.Node]) -> dict[str, Any]:
    """The recurrence's arguments, of the stash and the state."""
    mixer = one.mixer
    assert mixer is not None
    arguments = dict(one.given)
    for argument in mixer.rows:
        rows = [given[n] for n in stashed(names[0], argument, one.given[argument])]
        arguments[argument] = alike(rows, one.given[argument])
    kept = iter([given[name] for name in names])
    for argument in mixer.state:
        arguments[argument] = alike([next(kept) for _ in tensors(one.given[argument])], one.given[argument])
    arguments[mixer.positions] = None
    here = (n for value in arguments.values() for n in tensors(value))
    done: dict[fx.Node, fx.Node] = {n: n for n in here if n.graph is graph}

    def held(node: fx.Node) -> fx.Node:
        """A weight, or what is made of weights alone."""
        if node not in done:
            done[node] = graph.node_copy(node, held)
        return done[node]

    return {name: fx.node.map_arg(value, held) for name, value in arguments.items()}


def alike(values: list[fx.Node], before: Any) -> Any:
    """The values as a list where the argument was one, else the one value; None where there was none."""
    return values if isinstance(before, (list, tuple)) else next(iter(values), None)


def sketches(step: Graph, weights: dict[str, Tensor], levels: Sequence[Nodes], owner: str) -> list[Graph]:
    """The step for nodes with weights of eight bits where that is worth it; nobody reads its stash."""
    bits, found = EightBits(128, 2**16, owner), []
    step = bits.changed(step, bits.layers(step, weights)[0], weights, "sketch")
    for depth, nodes in enumerate(levels):
        found.append(trim(forms(step, weights, nodes, f"sketch_{depth}").tree, {"logits"}, weights))
        for node in found[-1].fx.nodes:
            node.meta.pop("origin", None)  # nothing of the reference computes this
    return found


def bytes_aside(both: Forms, state: Mapping[str, StateSpec], nodes: int) -> dict[str, int]:
    """What a round of a sequence keeps aside, what says which nodes see which, and what the recurrent state of each
    node would take in place of these ("snapshots").
    """
    sizes = {"B": 1, "R": nodes, "P": nodes, "S": 1}
    specs = list(both.tree.outputs.values())[1:]  # but for the logits
    states = (state[name] for name in both.settle.outputs if not state[name].rewinds)
    aside = sum(StateSpec("", spec).nbytes(sizes) for spec in specs)
    return {"aside": aside, "pairs": nodes * nodes, "snapshots": nodes * sum(one.nbytes(sizes) for one in states)}


def kept_aside(found: Mapping[str, int]) -> str:
    """The same, in words."""
    each = found["snapshots"]
    beside = f", {each / 2**10:.0f} KiB if each node's state was kept" if each else ""
    return f"{found['aside'] / 2**10:.0f} KiB kept aside for each sequence{beside}"
