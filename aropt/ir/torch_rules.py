"""What torch's shape rules say of an op, asked once a process for arguments of the same types.

A rule runs on fake tensors of a mode that no graph sees: what it assumes of sizes is forgotten, so that it says nothing
of other graphs, and each graph gets values in a mode of its own (`Copies`). Whatever can't be kept apart in this way
raises Unshared, and the graph is run alone: a rule that fixes a size or bounds it, sizes that only values tell, errors.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from aropt.ir.dims import Dim
from aropt.ir.program import Spec

SHARED = ("aten", "aropt")  # namespaces whose rules stay as they are while a process runs
LITERALS = (bool, int, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
LOGGER = logging.getLogger("torch._subclasses.fake_tensor")
LARGEST = 50_000  # answers that are kept for graphs with the same sizes


class Unshared(Exception):
    """A graph has something of its own that no other graph may see."""


@dataclass
class Rules:
    """Answers for graphs whose inputs have the same symbolic sizes, in the same order.

    Values of the same type are one object, so that an object stands for its type.
    """

    mode: FakeTensorMode
    sizes: Mapping[str, Any]  # by their text in specs
    types: dict[Any, Any] = field(default_factory=dict)  # what tells values apart -> the value
    given: dict[Any, Tensor] = field(default_factory=dict)  # the same for inputs and weights
    known: dict[int, Any] = field(default_factory=dict)  # id -> value
    answers: dict[Any, Any] = field(default_factory=dict)  # call -> value
    bounds: Any = None

    def __post_init__(self) -> None:
        self.bounds = dict(self.mode.shape_env.var_to_range)  # type: ignore[union-attr]

    def run(self, graph: fx.Graph, inputs: Mapping[str, Spec], weights: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
        """The value of each node. Raises Unshared."""
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                spec = inputs[node.name]
                values[node] = self.contiguous(spec.dtype, spec.dims)
            elif node.op == "get_attr":
                values[node] = self.weight(weights[str(node.target)])
            elif node.op == "call_function":
                values[node] = self.call(node, values)
        return values

    def contiguous(self, dtype: torch.dtype, dims: tuple[Dim, ...]) -> Tensor:
        key = (dtype, *dims)
        if key not in self.given:
            shape = [self.sizes[d] if isinstance(d, str) else d for d in dims]
            with self.mode, torch.no_grad():
                self.given[key] = self.one(torch.empty(shape, dtype=dtype))
        return self.given[key]

    def weight(self, weight: Tensor) -> Tensor:
        if type(weight) not in (Tensor, torch.nn.Parameter) or weight.layout != torch.strided or weight.is_quantized:
            raise Unshared("a weight of a kind of its own")
        if weight.device.type != "cpu" or weight.is_conj() or weight.is_neg():
            raise Unshared("a weight of a kind of its own")
        key = ("weight", weight.dtype, *weight.shape, *weight.stride())
        if key not in self.given:
            with self.mode, torch.no_grad():
                fake = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype)
            self.given[key] = self.one(fake)
        return self.given[key]

    def call(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        """What the rule of a call says; it runs if it was not asked before."""
        target: Any = node.target
        shared = target.namespace in SHARED if isinstance(target, torch._ops.OpOverload) else is_arithmetic(target)
        if not shared:
            raise Unshared(f"the rule of {target} may change")
        key = (target, self.mark(node.args, values), self.mark(node.kwargs, values))
        if key not in self.answers:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            try:
                with self.mode, torch.no_grad(), enable_python_dispatcher(), unlogged():
                    answer = target(*args, **kwargs)
            except Exception as error:  # it is raised again where the graph runs alone
                raise Unshared("the rule fails") from error
            self.forget()
            self.answers[key] = self.one(answer)
        return self.answers[key]

    def forget(self) -> None:
        """Drops what a rule assumed of sizes. Raises Unshared where that changed sizes, or made some."""
        env: Any = self.mode.shape_env
        if env.var_to_range != self.bounds and env.var_to_range.keys() == self.bounds.keys():
            env.var_to_range.update(self.bounds)  # a table was long enough: a size has no bound for that
            env._maybe_evaluate_static.cache_clear()
        if not self.clean():
            raise Unshared("the rule fixes a size, or makes one")
        if env.guards:
            env.guards.clear()
            env.axioms.clear()
            env.symbol_guard_counter.clear()
            env._version_counter += 1  # what was derived from them is kept by this number

    def clean(self) -> bool:
        """Whether all sizes are as they were at first."""
        env: Any = self.mode.shape_env
        made = env.unbacked_symint_counter or env.unbacked_symfloat_counter or env.deferred_runtime_asserts
        return not (made or env.replacements or env.divisible) and env.var_to_range == self.bounds

    def mark(self, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        """What tells an argument from others: all that a rule can see of it. Raises Unshared."""
        if isinstance(value, fx.Node):
            return self.mark(values[value], values)
        if id(value) in self.known:
            return ("value", id(value))
        if type(value) in (list, tuple, torch.Size, fx.immutable_collections.immutable_list):
            return ("list", *(self.mark(v, values) for v in value))
        if isinstance(value, dict):
            return ("dict", *((k, self.mark(v, values)) for k, v in value.items()))
        if type(value) in LITERALS:
            return (type(value), value)
        if type(value) is float:
            return (float, repr(value))  # 0.0 is not -0.0, and nan is itself
        raise Unshared(f"an argument of type {type(value).__name__}")

    def one(self, value: Any) -> Any:
        """The value that stands for all of its type. Raises Unshared."""
        if type(value) in (list, tuple):
            return type(value)(self.one(v) for v in value)
        if type(value) in (bool, int, float):
            return value
        key = type_key(value)
        if key not in self.types:
            self.types[key] = self.known[id(value)] = value
        return self.types[key]


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Leaves it to the graph's own run to say what fails."""
    before, LOGGER.disabled = LOGGER.disabled, True
    try:
        yield
    finally:
        LOGGER.disabled = before


def is_arithmetic(target: Any) -> bool:
    """Whether it is one of Python's operators."""
    return getattr(operator, getattr(target, "__name__", ""), None) is target


def type_key(value: Any) -> Any:
    """All that a rule can see of a fake value. Raises Unshared."""
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if type(value) is not FakeTensor or value.constant is not None or value.layout != torch.strided:
        raise Unshared(f"a value of type {type(value).__name__}")
    sizes = (*value.shape, *value.stride(), value.storage_offset(), value.untyped_storage().nbytes())
    numbers = (size if isinstance(size, int) else size.node.expr for size in sizes)
    flags = (value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference(), value.is_quantized)
    return (value.dtype, value.device, flags, value.dim(), *numbers)


@dataclass
class Copies:
    """Values of `Rules` in a graph's own mode."""

    mode: FakeTensorMode
    symbols: Mapping[Any, Any]  # of the rules -> the graph's
    sizes: dict[Any, Any] = field(default_factory=dict)
    made: dict[int, Any] = field(default_factory=dict)

    def copy(self, value: Any) -> Any:
        """The value; those of one type are one object."""
        if type(value) in (list, tuple):
            return type(value)(self.copy(v) for v in value)
        if isinstance(value, torch.SymInt):
            return self.size(value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.made:
            shape, strides = [self.size(s) for s in value.shape], [self.size(s) for s in value.stride()]
            meta = torch.empty_strided(shape, strides, dtype=value.dtype, device="meta")
            self.made[id(value)] = FakeTensor(self.mode, meta, value.device)
        return self.made[id(value)]

    def size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        expr = size.node.expr
        if expr not in self.sizes:
            env: Any = self.mode.shape_env
            self.sizes[expr] = env.create_symintnode(expr.xreplace(self.symbols), hint=size.node.hint)
        return self.sizes[expr]
