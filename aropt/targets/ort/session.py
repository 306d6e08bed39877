"""One graph as a session of ONNX Runtime: inputs and outputs are torch buffers that it reads and writes directly.

An aliased output (a cache update) is bound to its input's own buffer, which the operator then doesn't copy. Other
outputs alternate between two sets of buffers, which are kept for the next generation of the same shape: then nothing
is bound again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aropt.ir.dims import resolve
from aropt.ir.executor import Values
from aropt.ir.program import Graph, Spec, own_sizes, sizes_of
from aropt.targets.ort.threads import options

KEPT = 64  # bindings kept a graph
SHAPES = 2  # shapes of generations whose buffers are kept: each holds caches


class Session:
    """One graph's session and its bindings.

    Of several rounds it may have more outputs than the graph: an earlier round's, as `<output>@<round>`.
    `turns`: other sessions run between its calls (see `aropt.targets.ort.threads`).
    """

    def __init__(self, graph: Graph, aliases: dict[str, str], path: Path, threads: int, turns: bool = False) -> None:
        import onnxruntime as ort

        made = options(threads, turns)
        self.session = ort.InferenceSession(str(path), made, providers=["CPUExecutionProvider"])
        self.taken = {i.name for i in self.session.get_inputs()}
        base = {n: n.partition("@")[0] for n in (o.name.removeprefix("out.") for o in self.session.get_outputs())}
        self.graph = replace(graph, outputs={name: graph.outputs[output] for name, output in base.items()})
        self.aliases = {name: aliases[output] for name, output in base.items() if output in aliases}
        self.rounds = 1 + max((int(n.partition("@")[2]) + 1 for n in base if "@" in n), default=0)
        self.types = {name: numpy_type(spec) for name, spec in {**self.graph.outputs, **graph.inputs}.items()}
        self.names = list(graph.inputs)
        self.bindings: dict[tuple[Any, ...], tuple[Any, Values, Values]] = {}
        self.turn = 0
        self.own_sizes = bool(own_sizes(graph))
        self.buffers: dict[tuple[Any, ...], Tensor] = {}
        self.entries: dict[tuple[Any, ...], Values] = {}
        self.turns: dict[tuple[int, ...], Any] = {}

    def call(self, inputs: Values) -> Values:
        """A round; its results stay as they are until the one after the next."""
        if self.own_sizes:
            return {n: self.buffer(n, r.shape, r.dtype).copy_(r) for n, r in self.once(inputs).items()}
        inputs = {n: inputs[n].contiguous() for n in self.names}
        key = (self.turn, *[(t.data_ptr(), t.shape) for t in inputs.values()])
        found = self.bindings.get(key)
        if found is None:
            if len(self.bindings) >= KEPT:
                self.bindings.clear()
            found = self.bindings[key] = self.bind(inputs)
        self.turn ^= 1
        binding, outputs, _ = found
        self.session.run_with_iobinding(binding)
        return dict(outputs)

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Where a result goes in this turn: the same place each time, so that its readers need no new binding."""
        key = (self.turn, name, *shape)
        if key not in self.buffers:
            if len(self.buffers) >= KEPT * len(self.types):
                self.buffers.clear()
            self.buffers[key] = torch.empty(tuple(shape), dtype=dtype)
        return self.buffers[key]

    def entry(self, inputs: Values, own: Collection[str] = ()) -> Values:
        """The values in buffers that are the same each time, so that a generation like an earlier one binds nothing.

        `own`: inputs whose buffers are the same each time already, and may be kept.
        """
        key = tuple(t.shape for t in inputs.values())
        if key not in self.entries:
            if len(self.entries) >= SHAPES:  # caches are large, and bindings and turns hold them too
                for kept_values in (self.entries, self.bindings, self.turns, self.buffers):
                    kept_values.clear()
            self.entries[key] = {n: t if n in own else torch.empty_like(t) for n, t in inputs.items()}
        for name, kept in self.entries[key].items():
            if kept is not inputs[name]:
                kept.copy_(inputs[name])
        self.turn = 0
        return dict(self.entries[key])

    def once(self, inputs: Values) -> Values:
        """A call without bindings, for what runs once a generation: its buffers never come back."""
        feeds = {n: v.numpy() for n, v in inputs.items() if n in self.taken}
        results = self.session.run(None, feeds)
        return {n: torch.from_numpy(r) for n, r in zip(self.graph.outputs, results, strict=True)}

    def bind(self, inputs: Values, given: Values | None = None) -> tuple[Any, Values, Values]:
        """A binding for these buffers, and the outputs' buffers: those given, else new ones."""
        binding = self.session.io_binding()
        inputs = {n: t.contiguous() for n, t in inputs.items()}
        sizes = sizes_of(self.graph.inputs, inputs)
        outputs: Values = {}
        for name, value in inputs.items():
            if name in self.taken:
                binding.bind_input(name, "cpu", 0, self.types[name], tuple(value.shape), pointer(value))
        for name, spec in self.graph.outputs.items():
            alias = self.aliases.get(name)
            shape = [resolve(d, sizes) for d in spec.dims]
            known = inputs[alias] if alias else (given or {}).get(name)
            value = self.buffer(name, shape, spec.dtype) if known is None else known
            binding.bind_output("out." + name, "cpu", 0, self.types[name], tuple(value.shape), pointer(value))
            outputs[name] = value
        return binding, outputs, inputs  # the inputs stay alive as long as their binding


def pointer(value: Tensor) -> int:
    return value.data_ptr() or torch.empty(1).data_ptr()


def numpy_type(spec: Spec) -> Any:
    import numpy as np

    return np.dtype(str(spec.dtype).removeprefix("torch.").replace("bool", "bool_"))
