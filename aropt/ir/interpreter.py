"""The reference interpreter: runs any Program eagerly, and is the semantics that everything is validated against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.control import Call, Control, If, Loop, Seq, calls
from aropt.ir.dims import resolve
from aropt.ir.executor import Executor, OnRound, Values
from aropt.ir.program import Program, sizes_of

Watch = Callable[[Loop, Values], bool | None]  # sees a round's values, until it returns False


class Eager(Executor):
    """Executes graphs by calling their ATen ops one by one; pure, nothing is overwritten."""

    def __init__(self, program: Program) -> None:
        ops.load_all()
        self.program = program
        self.modules: dict[str, fx.GraphModule] = {}

    def call(self, graph: str, inputs: Values) -> Values:
        g = self.program.graphs[graph]
        if graph not in self.modules:
            self.modules[graph] = g.bind(self.program.weights)
        with torch.inference_mode():  # validation is a tenth faster than with no_grad
            results = self.modules[graph].forward(*[inputs[n] for n in g.inputs])  # a call costs more than most rules
        return dict(zip(g.outputs, results, strict=True))


def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    slots: int,
    executor: Executor | None = None,
    watch: Watch | None = None,
) -> Values:
    """Runs the control from `inputs`, with caches of `slots` slots. Returns all values at the end.

    `watch` sees the values after each round of each loop that is not internal, until it returns False.
    """
    sizes = sizes_of({n: i.spec for n, i in program.inputs.items()}, inputs) | {"S": slots}
    values: Values = dict(inputs)
    executor = executor or Eager(program)
    for name, state in program.state.items():
        if state.init is not None:
            values[name] = executor.create(name, state, sizes)

    def nothing(name: str) -> Tensor:
        """What a loop without rounds emits of a value."""
        specs = {v: program.graphs[c.graph].outputs[o] for c in calls(program.control) for o, v in c.writes.items()}
        first, *rest = [resolve(d, sizes) for d in specs[name].dims]
        return torch.zeros([first, 0, *rest], dtype=specs[name].dtype)

    step(program.control, values, executor, watch, nothing)
    return values


def step(
    control: Control,
    values: Values,
    executor: Executor,
    watch: Watch | None,
    nothing: Callable[[str], Tensor],
) -> None:
    """Executes one control node, updating `values`. `nothing(value)`: what a loop without rounds emits."""
    match control:
        case Call(graph, reads, writes):
            results = executor.call(graph, {name: values[value] for name, value in reads.items()})
            for output, value in writes.items():
                values[value] = results[output]
        case Seq(body):
            for part in body:
                step(part, values, executor, watch, nothing)
        case If(cond, then, orelse):
            step(then if bool(values[cond]) else orelse, values, executor, watch, nothing)
        case Loop() if executor.loop(control, values, watching(control, watch)):
            pass
        case Loop(_, until, body, emits):
            on_round = watching(control, watch)
            emitted: dict[str, list[Tensor]] = {name: [] for name in emits}
            most, done = most_rounds(values), 0
            while not bool(values[until]):
                if (done := done + 1) > most:
                    raise endless(control, most)
                step(body, values, executor, watch, nothing)
                for name, kept in emitted.items():
                    kept.append(values[name].clone())
                if on_round is not None and on_round(values) is False:
                    on_round = None
            for name, kept in emitted.items():
                values[emits[name]] = torch.stack(kept, 1) if kept else nothing(name)


def watching(loop: Loop, watch: Watch | None) -> OnRound | None:
    """What watches the rounds of this loop; None if nothing does."""
    return None if watch is None or loop.internal else functools.partial(watch, loop)


def most_rounds(values: Values) -> int:
    """More rounds than any loop of a generation takes, by the rows and rounds that were asked for."""
    asked = [int(values[n].amax()) for n in ("limit", "steps") if n in values]
    return 1024 + 16 * sum([*asked, *(values[n].shape[1] for n in ("prompt", "canvas") if n in values)])


def endless(control: Loop, most: int) -> Unsupported:
    return Unsupported(
        what="a loop of the program does not end",
        where=f"loop '{control.kind}', until '{control.until}'",
        why=f"it has run {most} rounds, more than what was asked for can take",
        hint="make the program again, or report the model and its rule",
    )
