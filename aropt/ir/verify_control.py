"""The control's rules: every value is there before it is read, on every path, with the type that its reader declares.

Types are followed along the control with a stand-in number for each symbol, so that "2*B" and "T+1" compare as numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch

from aropt.errors import VerificationFailed
from aropt.ir.control import Call, Control, If, Loop, Seq, calls, loops, writes
from aropt.ir.dims import Dim, resolve, symbols
from aropt.ir.program import ROLES, Program, Role, Spec, StateSpec

Type = tuple[torch.dtype, tuple[int | None, ...]]  # sizes are stand-ins for symbols; None: unknown
Env = dict[str, Type]  # the values that exist, with their types


def fail(rule: str, where: str, why: str) -> NoReturn:
    """Raises VerificationFailed."""
    raise VerificationFailed(what=f"the program is malformed (rule {rule})", where=where, why=why,
                             hint="the pass that made it is wrong; please report it")  # fmt: skip


def check_control(program: Program) -> None:
    """Raises VerificationFailed if the control is malformed; the graphs' declared types are trusted."""
    check_roles(program)
    ControlCheck(program).run()


def check_roles(program: Program) -> None:
    """What each graph says that it is for, against where it is called."""
    for name, graph in program.graphs.items():
        if graph.role not in ROLES:
            fail("graph-role", f"graph '{name}'", f"'{graph.role}' is no role")
    for loop in loops(program.control):
        if not loops(loop.body):  # in a nest, what begins an inner loop is in the outer one's rounds
            check_called(program, loop.body, ("prologue", "epilogue"), f"loop '{loop.kind}'", "its rounds call it")
    rounds = {call.graph for loop in loops(program.control) for call in calls(loop.body)}
    outside = Seq(tuple(call for call in calls(program.control) if call.graph not in rounds))
    check_called(program, outside, ("rule", "commit"), "control", "it is called in no loop's round")


def check_called(program: Program, control: Control, wrong: tuple[Role, ...], where: str, why: str) -> None:
    """No graph of the wrong roles is called there."""
    for call in calls(control):
        role = program.graphs[call.graph].role if call.graph in program.graphs else None
        if role in wrong:
            fail("graph-role", where, f"'{call.graph}' is a {role}, and {why}")


class ControlCheck:
    """The rules for the control, by walking all its paths with the types of the values that exist."""

    def __init__(self, program: Program) -> None:
        self.program, self.state = program, program.state
        inputs = [d for i in program.inputs.values() for d in i.spec.dims]
        self.fixed = {"S"}.union(*(symbols(d) for d in inputs))  # symbols that stay the same during a generation
        known = [*inputs, *(d for s in program.state.values() for d in s.spec.dims)]
        names = sorted(self.fixed.union(*(symbols(d) for d in known)))
        self.sizes: dict[str, int | None] = {name: 1_000_003 + 10_007 * i for i, name in enumerate(names)}

    def run(self) -> None:
        env = {n: self.typed(i.spec) for n, i in self.program.inputs.items()}
        for name, state in self.state.items():
            self.check_state(name, state)
            if state.init is not None:
                env[name] = self.typed(state.spec)
        env = self.walk(self.program.control, env)
        for name in self.program.outputs:
            if name not in env:
                fail("program-outputs", f"output '{name}'", "it is not written on every path")

    def check_state(self, name: str, state: StateSpec) -> None:
        free = set().union(*(symbols(d) for d in state.spec.dims)) - self.fixed
        if state.init is not None and free:
            fail("state-init", f"state '{name}'", f"no input gives the size of {', '.join(sorted(free))}")
        if state.axis is not None and not 0 <= state.axis < len(state.spec.dims):
            fail("state-axis", f"state '{name}'", f"{state.spec} has no axis {state.axis}")

    def typed(self, spec: Spec, sizes: Mapping[str, int | None] | None = None) -> Type:
        return spec.dtype, tuple(size(d, self.sizes if sizes is None else sizes) for d in spec.dims)

    def walk(self, control: Control, env: Env) -> Env:
        """The values that exist after the node."""
        match control:
            case Call():
                return self.call(control, env)
            case Seq(body):
                for part in body:
                    env = self.walk(part, env)
                return env
            case If(cond, then, orelse):
                self.check_flag("if", cond, env)
                return merge(self.walk(then, env), self.walk(orelse, env))
            case Loop():
                return self.loop(control, env)

    def loop(self, loop: Loop, env: Env) -> Env:
        where = f"loop '{loop.kind}'"
        self.check_flag(where, loop.until, env)
        changed = writes(loop.body)
        if loop.until not in changed:
            fail("loop-until", where, f"its body never writes '{loop.until}'")
        # what a round hands to the next must be state, so that its type is known
        body = self.walk(loop.body, {n: t for n, t in env.items() if n in self.state or n not in changed})
        after = merge(env, env | body)  # there may be no round
        for name, target in loop.emits.items():
            if name not in writes(loop.body, certain=True):
                fail("loop-emits", where, f"it emits '{name}', which its body does not write on every path")
            dtype, dims = body[name]
            after[target] = self.stored(where, target, (dtype, (*dims[:1], None, *dims[1:])))
        certain = writes(loop.body, certain=True)
        for role in sorted(loop.roles):  # fused away, or written in each round
            if role in changed - certain:
                fail("loop-roles", where, f"it says what '{role}' means, which its body does not write on every path")
        return after

    def call(self, call: Call, env: Env) -> Env:
        where = f"call of '{call.graph}'"
        graph = self.program.graphs.get(call.graph)
        if graph is None:
            fail("call-graph", where, "there is no such graph")
        for kind, given, declared in (("reads", call.reads, graph.inputs), ("writes", call.writes, graph.outputs)):
            if set(given) != set(declared):
                fail("call-binds", where, f"it {kind} {sorted(given)}, the graph has {sorted(declared)}")
        if len(set(call.writes.values())) < len(call.writes):
            fail("call-binds", where, "it writes a value twice")
        sizes: dict[str, int | None] = {}
        types = {name: self.read(where, value, env) for name, value in call.reads.items()}
        for name, spec in graph.inputs.items():
            dims = types[name][1]
            alone = {d: n for d, n in zip(spec.dims, dims) if isinstance(d, str) and d.isidentifier()}
            sizes = alone | sizes
        for name, spec in graph.inputs.items():
            if not compatible(self.typed(spec, sizes), types[name]):
                value = f"'{call.reads[name]}': {self.show(types[name])}"
                fail("call-types", where, f"input '{name}' is {spec}, given {value}")
        return env | {v: self.stored(where, v, self.typed(graph.outputs[o], sizes)) for o, v in call.writes.items()}

    def read(self, where: str, value: str, env: Env) -> Type:
        if value not in env:
            carried = "it is not written before on every path; only state survives a round of a loop"
            fail("value-missing", where, f"it reads '{value}': {carried}")
        return env[value]

    def check_flag(self, where: str, value: str, env: Env) -> None:
        if self.read(where, value, env) != (torch.bool, ()):
            fail("condition-type", where, f"'{value}' is {self.show(env[value])}, not bool[]")

    def stored(self, where: str, value: str, given: Type) -> Type:
        """The type of a value after it is written: as declared if it is state."""
        if value not in self.state:
            return given
        spec = self.state[value].spec
        dtype, dims = self.typed(spec)
        fixed = tuple(n if isinstance(d, int) or symbols(d) <= self.fixed else None for d, n in zip(spec.dims, dims))
        if not compatible((dtype, fixed), given):
            fail("state-type", where, f"it writes {self.show(given)} to state '{value}': {spec}")
        return dtype, dims

    def show(self, given: Type) -> str:
        """A type with its symbols again where they stand alone."""
        names = {n: s for s, n in self.sizes.items()}
        return str(Spec(given[0], tuple("?" if n is None else names.get(n, n) for n in given[1])))


def size(dim: Dim, sizes: Mapping[str, int | None]) -> int | None:
    """A dim as a number; None if it can't be told."""
    try:
        return resolve(dim, sizes)  # type: ignore[arg-type]
    except (KeyError, TypeError):
        return None


def compatible(a: Type, b: Type) -> bool:
    return a[0] == b[0] and len(a[1]) == len(b[1]) and all(x == y or None in (x, y) for x, y in zip(a[1], b[1]))


def merge(a: Env, b: Env) -> Env:
    """The values that exist on both paths; sizes that differ are unknown."""
    both = {n: (a[n], b[n]) for n in a if n in b and a[n][0] == b[n][0] and len(a[n][1]) == len(b[n][1])}
    return {n: (x[0], tuple(i if i == j else None for i, j in zip(x[1], y[1]))) for n, (x, y) in both.items()}
