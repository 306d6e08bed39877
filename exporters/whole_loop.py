"""A whole program as one ONNX graph: control nodes become `Loop` and `If`, graphs are inlined, state is carried.

Each control node has one lowering, whatever the model or the rule:

    Call  the graph's nodes, in place                      Seq  one after the other
    If    ONNX If; a value that only one branch writes     Loop  ONNX Loop; state is loop-carried, emitted values are
          passes through the other                               scan outputs

Inputs are the program's (those with a default may be left out), `chunk`, the most rounds of this call, and `resume`
with `state.*`, what an earlier call returned as `next.*`. Outputs: the program's, `counts` (tokens of each sequence),
`status` (0, or why nothing was generated: see STATUS) and `next.*`. Caches grow as they fill: GroupQueryAttention
appends to them; the standard operators write into slots, which are made when a loop is entered.

For ONNX Runtime's sake each graph has initializers of its own (`Writer.weight`), which share their data, and loops of
small models do several rounds a turn (`Writer.several`), then the last ones one by one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from aropt.errors import Unsupported
from aropt.exporters.onnx import OPSET, save, translate
from aropt.exporters.onnx_nodes import I64, Nodes
from aropt.exporters.unroll import unroll
from aropt.frontend.trace import capture_function
from aropt.ir import ops
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, loops, sequence, writes
from aropt.ir.dims import Dim, parse, symbols
from aropt.ir.program import Program, Spec, StateSpec
from aropt.loops.defaults import exported_defaults
from aropt.loops.guards import FOREVER
from aropt.loops.scheme import scheme_of
from aropt.loops.speculate import checks_drafts

ROUNDS = 8  # in a loop's body: what ONNX Runtime does for each turn of a Loop, and to end it, is shared among them
SMALL = 16 * 2**20  # bytes of weights that a round reads: of larger ones a Loop's turn is no part
PACKED = 4 * 2**30  # bytes of weights, of all graphs, that each graph may have for itself: memory for speed
MOVES = (torch.ops.aten.cat.default, torch.ops.aten.clone.default)  # of caches as they are: branches joined and parted


def export_program(
    program: Program, path: Path, contrib: bool = False, graphs: Callable[[str], Any] = lambda _: None
) -> Any:
    """Writes the program to `path` as one ONNX model; `contrib` allows ONNX Runtime's own operators.

    `graphs` may give models of graphs that are translated already, by name.
    Raises Unsupported for a graph (model or rule) without an ONNX form.
    """
    model = Writer(program, contrib, graphs).model()
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    return model


class Writer(Nodes):
    """Builds the graph; `values` in its methods are the program's values by name, as ONNX values."""

    def __init__(self, program: Program, contrib: bool, graphs: Callable[[str], Any]) -> None:
        super().__init__()
        self.program, self.contrib, self.graphs = program, contrib, graphs
        self.place: dict[Any, tuple[str, int]] = {}  # where a symbol's size is read from
        for name, given in program.inputs.items():
            for axis, dim in enumerate(given.spec.dims):
                self.place.setdefault(dim, (name, axis))
        self.models: dict[str, Any] = {}  # of graphs
        self.tensors: dict[Any, Any] = {}  # of weights, by content
        self.weights: dict[Any, Any] = {}  # initializers, by graph and content
        self.roomy: set[Any] = set()  # caches with slots for all that is to come
        sizes = {n: sum(program.weights[w].nbytes for w in g.weights()) for n, g in program.graphs.items()}
        # ONNX Runtime packs weights only where they are the node's own graph's, or of the one around it
        self.own = sum(sizes[call.graph] for call in calls(program.control)) <= PACKED
        self.usual = exported_defaults(program.meta)
        self.graph = self.ir.Graph([], [], nodes=[], name=program.name, opset_imports={"": OPSET, "com.microsoft": 1})

    # --- types and sizes ---------------------------------------------------------------------------------------------

    def spec(self, name: str) -> Spec:
        """The type of a value of the program."""
        if name in self.program.state:
            return self.program.state[name].spec
        if name in self.program.inputs:
            return self.program.inputs[name].spec
        return next(
            self.program.graphs[c.graph].outputs[o]
            for c in calls(self.program.control)
            for o, v in c.writes.items()
            if v == name
        )

    def size(self, graph: Any, values: Mapping[str, Any], dim: Dim) -> Any:
        """A dim of an initial state as int64 [1], by the sizes of inputs; there are no slots yet."""
        total = None
        for product, factor in parse(dim).subs({"S": 0}).terms or [((), 0)]:
            places = [self.place[symbol] for symbol in product]
            parts = [self.node(graph, "Shape", [values[n]], start=axis, end=axis + 1) for n, axis in places]
            parts = parts if parts and factor == 1 else [self.constant(graph, [factor]), *parts]
            one = functools.reduce(lambda a, b: self.node(graph, "Mul", [a, b]), parts)
            total = one if total is None else self.node(graph, "Add", [total, one])
        return total

    # --- control -----------------------------------------------------------------------------------------------------

    def lower(self, control: Control, graph: Any, values: dict[str, Any], nested: bool = False) -> None:
        """Appends a control node to a graph and updates `values`."""
        match control:
            case Call():
                self.call(control, graph, values)
            case Seq(body):
                for part in body:
                    self.lower(part, graph, values, nested)
            case If():
                self.branch(control, graph, values, nested)
            case Loop():
                self.loop(control, graph, values, nested)

    def call(self, control: Call, graph: Any, values: dict[str, Any]) -> None:
        """Inlines a graph."""
        part = self.program.graphs[control.graph]
        made = self.inline(self.translated(control.graph), control, graph, values)
        values.update({control.writes[o]: v for o, v in zip(part.outputs, made, strict=True)})

    def translated(self, name: str) -> Any:
        """A graph's model, whose nodes may be taken."""
        if name not in self.models:
            given = self.graphs(name)
            self.models[name] = given or translate(self.program.graphs[name], self.program.weights, self.contrib)
        return self.models[name].clone()

    def inline(self, model: Any, control: Call, graph: Any, values: Mapping[str, Any]) -> list[Any]:
        """Moves the nodes of the call's model into a graph; -> the model's outputs."""
        inner, part = model.graph, self.program.graphs[control.graph]
        prefix = self.name(control.graph)
        outputs = list(inner.outputs)
        given = {v: values[control.reads[i]] for i, v in zip(part.inputs, list(inner.inputs), strict=True)}
        given |= {v: self.weight(v.const_value, graph) for v in list(inner.initializers.values())}
        inner.outputs.clear()
        for old, new in given.items():
            self.ir.convenience.replace_all_uses_with(old, new)
        nodes = list(inner)
        inner.remove(nodes)
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}" if value.name else value.name
        graph.extend(nodes)
        return [given.get(v, v) for v in outputs]

    def weight(self, tensor: Any, graph: Any) -> Any:
        """The initializer of that content, of the graph itself where each has its own: the tensor is shared."""
        import hashlib

        array, home = tensor.numpy(), graph if self.own else self.graph
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        tensor = self.tensors.setdefault(key, self.ir.Tensor(array))
        if (home, key) not in self.weights:
            name = self.name("weight")
            value = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape)
            value.const_value = tensor
            self.weights[home, key] = home.initializers[name] = value
        return self.weights[home, key]

    def branch(self, control: If, graph: Any, values: dict[str, Any], nested: bool) -> None:
        """Two subgraphs with the same outputs."""
        both = writes(control, certain=True)
        names = sorted(n for n in writes(control) if n in values or n in both)
        subgraphs = []
        for part in (control.then, control.orelse):
            inner, kept = self.ir.Graph([], [], nodes=[], name=self.name("branch")), dict(values)
            self.lower(part, inner, kept, nested)
            self.close(inner, [kept[n] for n in names])
            subgraphs.append(inner)
        self.choose(graph, values, values[control.cond], names, *subgraphs)

    def loop(self, control: Loop, graph: Any, values: dict[str, Any], nested: bool) -> None:
        """A Loop of at most `chunk` rounds (inside another one: of any number), after one of several at a time."""
        self.make_room(control, graph, values)
        left = None if nested else values["chunk"]
        rows: dict[str, list[Any]] = {name: [] for name in control.emits}
        model = None if nested else self.several(control)
        if model is not None:
            number = self.constant(graph, [ROUNDS])
            emitted = self.rounds(control, graph, values, self.node(graph, "Div", [left, number]), ROUNDS, model)
            one = next(iter(emitted.values()))[0]
            done = self.node(graph, "Mul", [self.node(graph, "Shape", [one], start=0, end=1), number])
            left = self.node(graph, "Sub", [left, done])
            for name, versions in emitted.items():
                each = [self.node(graph, "Unsqueeze", [v, self.constant(graph, [1])]) for v in versions]
                rows[name].append(self.sized(graph, values, name, self.node(graph, "Concat", each, axis=1), done))
        for name, (stacked,) in self.rounds(control, graph, values, left).items():
            number = self.node(graph, "Shape", [stacked], start=0, end=1)
            rows[name].append(self.sized(graph, values, name, stacked, number) if self.known(name) else stacked)
        for name, parts in rows.items():
            both = self.node(graph, "Concat", parts, axis=0) if len(parts) > 1 else parts[0]
            order = [1, 0, *range(2, len(self.spec(name).dims) + 1)]
            values[control.emits[name]] = self.node(graph, "Transpose", [both], perm=order)

    def rounds(
        self, control: Loop, graph: Any, values: dict[str, Any], most: Any, number: int = 1, model: Any = None
    ) -> dict[str, list[Any]]:
        """The Loop node, whose body is so many rounds (in `model`, if several).

        -> what is emitted in each of these rounds, [times, ...].
        """
        carried = sorted(n for n in writes(control.body) if n in values)
        inputs = [self.typed(self.name("round"), Spec(I64)), self.typed(self.name("go"), Spec(torch.bool))]
        inputs += [self.typed(self.name(n), self.spec(n)) for n in carried]
        body = self.ir.Graph(inputs, [], nodes=[], name=self.name("body"))
        inner = values | dict(zip(carried, inputs[2:], strict=True))
        if model is None:
            self.lower(control.body, body, inner, nested=True)
            emitted = {n: [inner[n]] for n in control.emits}
        else:
            emitted = self.repeat(control, body, inner, number, model)
        on = self.goes_on(control, body, inner, number)
        self.close(body, [on, *(inner[n] for n in carried), *(v for n in emitted for v in emitted[n])])
        start = self.goes_on(control, graph, values, number)
        count = len(body.outputs) - 1
        made = self.node(graph, "Loop", [most, start, *(values[n] for n in carried)], count, body=body)
        made = made if isinstance(made, list) else [made]
        self.roomy |= {after for n, after in zip(carried, made, strict=False) if values[n] in self.roomy}
        values.update(zip(carried, made[: len(carried)], strict=True))
        rest = iter(made[len(carried) :])
        return {n: [next(rest) for _ in versions] for n, versions in emitted.items()}

    def goes_on(self, control: Loop, graph: Any, values: Mapping[str, Any], number: int) -> Any:
        """Whether the loop has not ended, and the limit is so many rounds away."""
        on = self.node(graph, "Not", [values[control.until]])
        if number == 1:
            return on
        left = self.node(graph, "Sub", [values[control.params["limit"]], values["count"]])
        return self.node(graph, "And", [on, self.node(graph, "GreaterOrEqual", [left, self.constant(graph, number)])])

    def several(self, control: Loop) -> Any:
        """The model of several rounds of a loop, or None: of a graph that is all of it and goes on in vain at its end.

        A few rounds after a sequence's last token change nothing that is read later; the limit is not passed.
        """
        call, until, params = control.body, control.until, control.params
        counted = until == "finished" and "limit" in params and "count" in writes(control.body)
        if not isinstance(call, Call) or not counted or checks_drafts(self.program.control):
            return None
        part = self.program.graphs[call.graph]
        ids = [self.spec(name).dtype == I64 and self.known(name) for name in control.emits]  # -1 after the end
        if not ids or not all(ids) or sum(self.program.weights[w].nbytes for w in part.weights()) > SMALL:
            return None
        try:
            return unroll(self.translated(call.graph), part, control, {}, ROUNDS)
        except Unsupported:  # rounds that can't be repeated run one by one
            return None

    def repeat(self, control: Loop, body: Any, values: dict[str, Any], number: int, model: Any) -> dict[str, list[Any]]:
        """Inlines the rounds; -> what each emits."""
        call = control.body
        assert isinstance(call, Call)
        for value in (v for node in model.graph for v in node.outputs):
            if value.shape is not None:  # caches that grow have a size each
                value.shape = self.ir.Shape([d if isinstance(d, int) else None for d in value.shape])
        made, emitted = iter(self.inline(model, call, body, values)), {}
        for output in self.program.graphs[call.graph].outputs:
            name = call.writes[output]
            versions = [next(made) for _ in range(number if name in control.emits else 1)]
            values[name] = versions[-1]
            if name in control.emits:
                emitted[name] = versions
        return {name: emitted[name] for name in control.emits}

    def known(self, name: str) -> bool:
        """Whether the sizes of a value follow from the inputs'."""
        dims = self.spec(name).dims
        return all(f.isdigit() or f in self.place for d in dims if isinstance(d, str) for f in d.split("*"))

    def sized(self, graph: Any, values: Mapping[str, Any], name: str, stacked: Any, number: Any) -> Any:
        """So many rows of a value that a loop emits: without rounds the other sizes are lost."""
        sizes = [self.size(graph, values, d) for d in self.spec(name).dims]
        return self.node(graph, "Reshape", [stacked, self.node(graph, "Concat", [number, *sizes], axis=0)], allowzero=1)

    def make_room(self, control: Loop, graph: Any, values: dict[str, Any]) -> None:
        """Slots for prompt and new tokens, in caches that the loop's operators write into and don't append to."""
        for name, state in self.program.state.items():
            if state.axis is None or state.spec.dims[state.axis] != "S":
                continue
            if name not in writes(control.body) or values[name] in self.roomy or self.appends(control, name):
                continue
            rank = len(state.spec.dims)
            prompt = self.node(graph, "Shape", [values["prompt"]], start=1, end=2)
            needed = self.node(graph, "Add", [prompt, values["limit"]])
            now = self.node(graph, "Shape", [values[name]], start=state.axis, end=state.axis + 1)
            missing = self.node(graph, "Max", [self.node(graph, "Sub", [needed, now]), self.constant(graph, [0])], 1)
            before, after = (self.constant(graph, [0] * n) for n in (rank + state.axis, rank - state.axis - 1))
            pads = self.node(graph, "Concat", [before, missing, after], axis=0)
            empty = self.constant(graph, float(state.init or 0.0), state.spec.dtype)
            values[name] = self.node(graph, "Pad", [values[name], pads, empty])
            self.roomy.add(values[name])

    def appends(self, control: Loop, name: str) -> bool:
        """Whether the operators in use append to this cache."""
        drafts = checks_drafts(self.program.control) and control.until != "begun"
        if not self.contrib or drafts:  # what was appended could not be taken back
            return False
        for call in calls(control.body):
            graph = self.program.graphs[call.graph]
            for value, result in zip(call.writes.values(), graph.results(), strict=True):
                if value == name and ops.updated(result)[0] is None and result.target not in MOVES:
                    return False
        return True

    # --- the program -------------------------------------------------------------------------------------------------

    def model(self) -> Any:
        """The whole program."""
        program, graph = self.program, self.graph
        values: dict[str, Any] = {n: self.input(n, i.spec, i.default) for n, i in program.inputs.items()}
        values["chunk"], resume = self.input("chunk", Spec(I64), FOREVER), self.input("resume", Spec(torch.bool), False)
        given = {n: self.input(f"state.{n}", s.spec, 0) for n, s in program.state.items()}
        body = sequence(program.control)
        first = next((i for i, part in enumerate(body) if not isinstance(part, Call)), len(body))
        names = list(program.state)
        kept = self.ir.Graph([], [], nodes=[], name="resumed")
        self.close(kept, [given[n] for n in names])
        fresh = self.ir.Graph([], [], nodes=[], name="started")
        inner = values | {n: self.initial(s, fresh, values) for n, s in program.state.items()}
        self.lower(Seq(body[:first]), fresh, inner)
        self.close(fresh, [inner[n] for n in names])
        self.choose(graph, values, resume, names, kept, fresh)
        status = self.guard(graph, values)
        for part in body[first:]:
            self.lower(part, graph, values)
        self.outputs(values, status)
        return self.ir.Model(graph, ir_version=10, producer_name="aropt")

    def input(self, name: str, spec: Spec, default: Any) -> Any:
        """A graph input; with a default it is an initializer too, so that a caller may leave it out."""
        value = self.typed(name, spec, shaped=True)
        self.graph.inputs.append(value)
        default = self.usual.get(name, default)
        if default is not None:
            state = name.startswith("state.")
            dims = [d if isinstance(d, int) else 0 if state else 1 for d in spec.dims]
            fill = torch.as_tensor(default, dtype=spec.dtype)
            fill = fill if fill.dim() else fill.expand(dims).contiguous()
            value.const_value = self.ir.tensor(fill.numpy(), name=name)
            self.graph.initializers[name] = value
        return value

    def initial(self, state: StateSpec, graph: Any, values: Mapping[str, Any]) -> Any:
        """The state before the program starts; empty where a graph writes it first."""
        used = set().union(*(symbols(d) for d in state.spec.dims))
        known = used <= {"S", *self.place}
        sizes = [self.size(graph, values, d if known else 0) for d in state.spec.dims]
        if not sizes:
            return self.constant(graph, state.init or 0, state.spec.dtype)
        shape = sizes[0] if len(sizes) == 1 else self.node(graph, "Concat", sizes, axis=0)
        fill = self.ir.tensor(torch.full((1,), state.init or 0, dtype=state.spec.dtype).numpy())
        return self.node(graph, "ConstantOfShape", [shape], value=fill)

    def guard(self, graph: Any, values: dict[str, Any]) -> Any:
        """Nothing is generated from what the program can't take; the status says why."""
        guard = scheme_of(self.program).guard(self.program)
        if guard is None or not all(n in values for n in guard.reads):
            return self.constant(graph, 0)
        made = capture_function("guard", guard.function, {n: self.spec(n) for n in guard.reads}, guard.writes)
        self.program = self.program.replace(graphs={**self.program.graphs, "guard": made})
        self.call(Call("guard", {n: n for n in guard.reads}, {n: n for n in guard.writes}), graph, values)
        return values["status"]

    def outputs(self, values: dict[str, Any], status: Any) -> None:
        graph = self.graph
        for name in self.program.outputs:
            self.output(name, values[name], self.spec_of_output(name))
        self.output("status", status, Spec(I64))
        for name, state in self.program.state.items():
            self.output(f"next.{name}", values[name], state.spec)
        axes = self.spec_of_output(self.program.outputs[0]).dims
        if axes[:2] != ("B", "N"):
            return
        there = self.node(graph, "GreaterOrEqual", [values[self.program.outputs[0]], self.constant(graph, 0)])
        there = self.node(graph, "Cast", [there], to=7)
        counts = self.node(graph, "ReduceSum", [there, self.constant(graph, list(range(1, len(axes))))], keepdims=0)
        self.output("counts", counts, Spec(I64, ("B",)))

    def spec_of_output(self, name: str) -> Spec:
        """The type of what a loop emits over its rounds, or of a plain value."""
        emitted = [n for loop in loops(self.program.control) for n, target in loop.emits.items() if target == name]
        if not emitted:
            return self.spec(name)
        first, *rest = self.spec(emitted[0]).dims
        return Spec(self.spec(emitted[0]).dtype, (first, "N", *rest))

    def output(self, name: str, value: Any, spec: Spec) -> None:
        made = self.node(self.graph, "Identity", [value])
        typed = self.typed(name, spec)
        made.name, made.type, made.shape = name, typed.type, typed.shape
        self.graph.outputs.append(made)
