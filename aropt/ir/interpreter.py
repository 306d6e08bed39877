"""The reference interpreter: runs any Program eagerly, and is the semantics that everything is validated against."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir import ops
from aropt.ir.control import Call, Control, If, Loop, Seq, calls
from aropt.ir.dims import resolve
from aropt.ir.executor import Executor, OnRound, Values
from aropt.ir.program import Program, sizes_of

DRAFT = "draft"  # a loop whose rounds are none of the generation


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
    on_round: OnRound | None = None,
) -> Values:
    """Runs the control from `inputs`, with caches of `slots` slots. Returns all values at the end.

    `on_round` sees the values after each round of a loop that is no DRAFT (for streaming and for
    validation), until it returns False.
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

    step(program.control, values, executor, on_round, nothing)
    return values


def step(
    control: Control,
    values: Values,
    executor: Executor,
    on_round: OnRound | None,
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
                step(part, values, executor, on_round, nothing)
        case If(cond, then, orelse):
            step(then if bool(values[cond]) else orelse, values, executor, on_round, nothing)
        case Loop(kind) if executor.loop(control, values, None if kind == DRAFT else on_round):
            pass
        case Loop(kind, until, body, emits):
            on_round = None if kind == DRAFT else on_round
            emitted: dict[str, list[Tensor]] = {name: [] for name in emits}
            most, done = most_rounds(values), 0
            while not bool(values[until]):
                if (done := done + 1) > most:
                    raise endless(control, most)
                step(body, values, executor, on_round, nothing)
                for name, kept in emitted.items():
                    kept.append(values[name].clone())
                if on_round is not None and on_round(values) is False:
                    on_round = None
            for name, kept in emitted.items():
                values[emits[name]] = torch.stack(kept, 1) if kept else nothing(name)


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
