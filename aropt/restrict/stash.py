"""A step whose recurrent state is written afterwards, by those of its rows that count (STree, Wu et al. 2025, 4).

A step that checks drafts reads the state and gives, in place of the new one, what its recurrences were given for each
row: the stash. `replay` calls these ops alone on it, with rejected rows as padding, which changes no state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from aropt.ir.calls import bind, op_name
from aropt.ir.edit import copied, expose, trim
from aropt.ir.program import Graph, Spec
from aropt.ir.torch_compat import build
from aropt.restrict.mixers import mixer_of

COUNTS = "counts"  # int64 [B, R]: -1 where a row of the stash was rejected


def stashed(step: Graph, names: Sequence[str], weights: Mapping[str, Tensor]) -> tuple[Graph, Graph] | None:
    """The step without the new state called `names` but with a stash, and the graph "replay" that makes that state.

    Replay has the stash, the state, and COUNTS as inputs. None where the state is not an op's own.
    """
    results = dict(zip(step.outputs, step.results(), strict=True))
    if any(recurrence(results[name]) is None for name in names):
        return None
    stash: dict[str, fx.Node] = {}
    for name in first_of_each(names, results):
        stash |= {f"{name}_{argument.lower()}": node for argument, node in rows_given(results[name].args[0]).items()}
    kept = {*step.outputs, *stash} - set(names)
    check = trim(expose(step, stash), kept, weights)
    specs = {n: check.outputs[n] for n in stash}
    return check, replay(step, names, specs, weights)


def first_of_each(names: Sequence[str], results: Mapping[str, Any]) -> list[str]:
    """One state of each recurrence: some have several."""
    return list({recurrence(results[name]): name for name in reversed(names)}.values())


def recurrence(result: Any) -> Any:
    """The call of an op with state that a value is a result of; None if it is of something else."""
    call = result.args[0] if isinstance(result, fx.Node) and op_name(result) == "getitem" else None
    mixer = mixer_of(call) if isinstance(call, fx.Node) else None
    return call if mixer is not None and mixer.state and mixer.positions else None


def rows_given(call: Any) -> dict[str, fx.Node]:
    """The arguments of a recurrence that have rows."""
    mixer, given = mixer_of(call), bind(call)
    assert mixer is not None
    return {name: given[name] for name in mixer.rows if given[name] is not None}


def replay(step: Graph, names: Sequence[str], stash: Mapping[str, Spec], weights: Mapping[str, Tensor]) -> Graph:
    """The step's recurrences alone."""
    graph = copied(step.fx)
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    results = dict(zip(step.outputs, output.args[0], strict=True))
    with graph.inserting_before(next(iter(graph.nodes))):
        given = {name: graph.placeholder(name) for name in (*stash, COUNTS)}
    for name in first_of_each(names, results):
        call = recurrence(results[name])
        mixer = mixer_of(call)
        assert mixer is not None
        places = {argument.name: i for i, argument in enumerate(call.target._schema.arguments)}
        for argument in rows_given(call):
            call.update_arg(places[argument], given[f"{name}_{argument.lower()}"])
        call.update_arg(places[mixer.positions], given[COUNTS])
    output.args = (tuple(results[name] for name in names),)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    specs = {**stash, COUNTS: Spec(torch.int64, ("B", "R")), **step.inputs}
    inputs = {n.name: n for n in list(graph.nodes) if n.op == "placeholder"}
    for node in inputs.values():
        if not node.users:
            graph.erase_node(node)
    needed = {name: specs[name] for name, node in inputs.items() if node.users}
    return build("replay", graph, needed, list(names), weights, "bookkeeping")
