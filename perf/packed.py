"""The nodes of a token tree on a model's state: by one call, one after the other, and path by path.

All are sessions of ONNX Runtime whose buffers are bound once, so that little but the model's work is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aropt.exporters.onnx import export
from aropt.ir.dims import resolve
from aropt.ir.edit import call_by_name, compose
from aropt.ir.program import Graph, Program, Spec, sizes_of
from aropt.loops.tree_control import general
from aropt.loops.trees import MOST, Shape
from aropt.passes.tree_draft import prepared
from aropt.restrict.all_rows import wide
from aropt.rewriting.tree import forms
from aropt.targets.ort.session import Session
from aropt.targets.scratch import Scratch

Run = Callable[[], None]
ONE, SETTLED = "one call", "one call, a path kept"
STEPS, PATHS, COPIED = "a step a node", "paths as a batch", "paths as a batch, their states copied"


@dataclass(frozen=True)
class Bound:
    """A session's call on buffers, which live as long as this."""

    run: Run
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]

    def __call__(self) -> None:
        self.run()


def bound(session: Session, values: Mapping[str, Tensor]) -> Bound:
    graph = session.graph
    given = {name: values[name] for name in graph.inputs}
    sizes = sizes_of(graph.inputs, given)
    made = {n: torch.empty([resolve(d, sizes) for d in s.dims], dtype=s.dtype) for n, s in graph.outputs.items()}
    binding, outputs, inputs = session.bind(given, made)
    return Bound(partial(session.session.run_with_iobinding, binding), inputs, outputs)


def rows(ids: Tensor, positions: Tensor, first: int) -> dict[str, Tensor]:
    """What the step reads of new rows, the first in slot `first`."""
    return {"ids": ids, "positions": positions, "slots": first + torch.arange(ids.shape[1])}


def one_after_the_other(calls: Sequence[Run]) -> None:
    for call in calls:
        call()


class Nodes:
    """A model's cached step as sessions: with the logits of all rows, for the nodes of a tree, and to keep a path.

    Each is built for its number of rows, as the rounds of tree-draft are.
    """

    def __init__(self, program: Program, shape: Shape, slots: int, threads: int) -> None:
        made = prepared(program)
        step, weights = made.graphs[general(made)[0].step.graph], dict(made.weights)
        verify, both = wide(step, weights), forms(step, weights, shape.rows(range(MOST)))
        assert verify is not None
        with Scratch() as folder:

            def session(graph: Graph, **known: int) -> Session:
                specs = {n: Spec(s.dtype, tuple(known.get(str(d), d) for d in s.dims)) for n, s in graph.inputs.items()}
                sized = compose("sized", [call_by_name(graph)], {graph.name: graph}, specs, weights)[0]
                path = Path(folder) / f"{graph.name}{sorted(known.items())}.onnx"
                export(sized, weights, path, contrib=True)
                return Session(sized, {}, path, threads)

            longest = shape.deepest + 1
            self.prompt, self.step, self.paths = (session(verify, **known) for known in ({}, {"R": 1}, {"R": longest}))
            self.tree, self.settle = session(both.tree), session(both.settle)
        self.shape, self.depth = shape, torch.tensor(shape.depth)
        self.state = {n: s.create({"B": 1, "S": slots}) for n, s in made.state.items() if n in both.settle.outputs}

    def ways(self, prompt: list[int], drafts: list[int]) -> tuple[dict[str, Run], Callable[[], float]]:
        """The calls on the state after a prompt, and how far apart their logits are once they ran."""
        size, ids = len(prompt), torch.tensor([drafts])
        begin = rows(torch.tensor([prompt]), torch.arange(size).unsqueeze(0), 0)
        state = self.state | {n: v for n, v in self.prompt.once(self.state | begin).items() if n in self.state}
        fed = {"ids": ids, "positions": (size + self.depth).unsqueeze(0)}
        tree = bound(self.tree, state | fed)
        start = torch.tensor([size])
        path = {"path": self.path(self.shape.nodes - 1).unsqueeze(0), "start": start, "origin": start}
        kept = bound(self.settle, state | tree.outputs | path)
        steps = self.steps(state, ids, size)
        batch, copied = self.batch(state, ids, size)

        def error() -> float:
            want = tree.outputs["logits"][0]
            found = [(want, torch.cat([one.outputs["logits"][0] for one in steps]))]
            for row, leaf in enumerate(self.leaves()):
                nodes = self.path(leaf)
                found.append((want[nodes], batch.outputs["logits"][row, : len(nodes)]))
            return max(float((a - b).abs().max()) for a, b in found)

        calls: dict[str, Run] = {
            ONE: tree, SETTLED: partial(one_after_the_other, [tree, kept]), STEPS: partial(one_after_the_other, steps),
            PATHS: batch, COPIED: partial(one_after_the_other, [copied, batch]),
        }  # fmt: skip
        return calls, error

    def steps(self, state: Mapping[str, Tensor], ids: Tensor, size: int) -> list[Bound]:
        """A step for each node, on the state that its parent's wrote."""
        found: list[Bound] = []
        for node, (parent, depth) in enumerate(zip(self.shape.parents, self.shape.depth, strict=True)):
            before = found[parent].outputs if parent >= 0 else {}
            row = rows(ids[:, node : node + 1], torch.tensor([[size + depth]]), size + depth)
            found.append(bound(self.step, {**state, **before, **row}))
        return found

    def batch(self, state: Mapping[str, Tensor], ids: Tensor, size: int) -> tuple[Bound, Run]:
        """A step whose sequences are the paths to all leaves, and what copies the state for each of them."""
        paths = [self.path(leaf) for leaf in self.leaves()]
        fed, positions = torch.zeros(2, len(paths), self.shape.deepest + 1, dtype=torch.int64)
        positions -= 1  # no row
        for row, nodes in enumerate(paths):
            fed[row, : len(nodes)], positions[row, : len(nodes)] = ids[0, nodes], size + self.depth[nodes]
        states = {n: v.repeat_interleave(len(paths), 0) for n, v in state.items()}
        made = bound(self.paths, states | rows(fed, positions, size))

        def copy() -> None:
            for name, value in state.items():
                made.inputs[name].copy_(value.expand_as(made.inputs[name]))

        return made, copy

    def path(self, node: int) -> Tensor:
        """The nodes from the root to this one."""
        return self.shape.pairs[node].nonzero().flatten()

    def leaves(self) -> list[int]:
        return [node for node in range(self.shape.nodes) if node not in self.shape.parents]
