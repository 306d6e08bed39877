"""Every private or unstable name of torch that aropt uses, behind functions of our own (one test each)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree

from aropt.ir.dims import Dim, parse, resolve, symbols
from aropt.ir.program import Graph, Role, Spec
from aropt.ir.torch_rules import LARGEST, Copies, Rules, Unshared

# distinct sizes, so that equal hints mean equal symbols
HINTS = (3, 7, 13, 19, 29, 37, 43, 53, 61, 71, 79, 89, 101, 107, 113, 131)

SIZES = (2, 3, 64, 1000, 5)  # at which conditions on sizes are tried
PROPAGATED = "_aropt_propagated"  # an attribute of fx graphs
RULES: dict[tuple[str, ...], Rules] = {}  # by the symbolic sizes of inputs, in their order; the last one used is last
MOST = 32  # of these


def example_sizes(specs: Mapping[str, Spec]) -> dict[str, int]:
    """A distinct example size for each symbol that stands alone as a dim."""
    names = dict.fromkeys(symbol for s in specs.values() for d in s.dims for symbol in sorted(symbols(d)))
    if len(names) > len(HINTS):
        raise ValueError(f"a graph has at most {len(HINTS)} symbolic sizes, this one has {len(names)}")
    return dict(zip(names, HINTS, strict=False))


def examples(specs: Mapping[str, Spec]) -> dict[str, Tensor]:
    """Zero tensors of the specs' types, with example sizes."""
    sizes = example_sizes(specs)
    return {n: torch.zeros([resolve(d, sizes) for d in s.dims], dtype=s.dtype) for n, s in specs.items()}


def propagate(graph: fx.Graph, inputs: Mapping[str, Spec], weights: Mapping[str, Tensor]) -> dict[Any, str]:
    """Runs the graph on fake tensors, sets `meta["val"]` of each node, returns {symbol: its name in `inputs`}.

    Raises whatever an op's shape rule raises; the failing node is then in `error.aropt_node`. A graph that nobody has
    changed since keeps its values.
    """
    state, known = condition(graph, inputs, weights), getattr(graph, PROPAGATED, None)
    if known and known[0] == state and all(n.meta.get("val") is v for n, v in known[1].items()):
        return dict(known[2])
    values, names = run_on_fakes(graph, inputs, weights)
    for node, value in values.items():
        node.meta["val"] = value
    setattr(graph, PROPAGATED, (state, values, names))
    return dict(names)


def condition(graph: fx.Graph, inputs: Mapping[str, Spec], weights: Mapping[str, Tensor]) -> Any:
    """All that the values of its nodes follow from."""
    nodes = [(n, n.op, n.target, n.args, n.kwargs) for n in graph.nodes]
    read = sorted(weights_read(graph) & set(weights))
    types = {w: (weights[w].dtype, *weights[w].shape, *weights[w].stride()) for w in read}
    return nodes, list(inputs.items()), types


def run_on_fakes(
    graph: fx.Graph, inputs: Mapping[str, Spec], weights: Mapping[str, Tensor]
) -> tuple[dict[fx.Node, Any], dict[Any, str]]:
    """The value of each node on fake tensors, and {symbol: its name in `inputs`}."""
    dims = tuple(dict.fromkeys(d for s in inputs.values() for d in s.dims if isinstance(d, str)))
    rules = rules_for(dims)
    with contextlib.suppress(Unshared):
        found = rules.run(graph, inputs, weights)
        fakes, names, mode = fake_inputs(inputs)
        copies = Copies(mode, same_symbols(rules, inputs, fakes))
        return {n: fakes[n.name] if n.op == "placeholder" else copies.copy(v) for n, v in found.items()}, names
    if not rules.clean():
        del RULES[dims]
    return run_alone(graph, inputs, weights)


def rules_for(dims: tuple[str, ...]) -> Rules:
    """The shape rules for graphs whose inputs have these sizes."""
    rules = RULES.pop(dims, None)
    if rules is None or len(rules.answers) > LARGEST:
        fakes, _, mode = fake_inputs({f"input_{i}": Spec(torch.float32, (d,)) for i, d in enumerate(dims)})
        rules = Rules(mode, {d: fake.shape[0] for d, fake in zip(dims, fakes.values(), strict=True)})
    RULES[dims] = rules
    while len(RULES) > MOST:
        RULES.pop(next(iter(RULES)))  # the one that was not needed for longest
    return rules


def same_symbols(rules: Rules, inputs: Mapping[str, Spec], fakes: Mapping[str, Tensor]) -> dict[Any, Any]:
    """The graph's symbols by those of the rules."""
    found: dict[Any, Any] = {}
    for name, spec in inputs.items():
        for dim, size in zip(spec.dims, fakes[name].shape, strict=True):
            if isinstance(dim, str) and isinstance(size, torch.SymInt):
                found[rules.sizes[dim].node.expr] = size.node.expr
    return found


def run_alone(
    graph: fx.Graph, inputs: Mapping[str, Spec], weights: Mapping[str, Tensor]
) -> tuple[dict[fx.Node, Any], dict[Any, str]]:
    """As `run_on_fakes`, in a mode that nothing else knows."""
    fakes, names, mode = fake_inputs(inputs)
    values: dict[fx.Node, Any] = {}
    read = {n: mode.from_tensor(weights[n], static_shapes=True) for n in weights_read(graph)}
    with mode, torch.no_grad(), enable_python_dispatcher():  # in C++ some ops fix symbolic sizes
        for node in graph.nodes:
            if node.op == "placeholder":
                values[node] = fakes[node.name]
            elif node.op == "get_attr":
                values[node] = read[str(node.target)]
            elif node.op == "call_function":
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
                try:
                    values[node] = node.target(*args, **kwargs)
                except Exception as error:  # it goes on, with the node at which it was raised
                    error.aropt_node = node  # type: ignore[attr-defined]
                    raise
    return values, names


def weights_read(graph: fx.Graph) -> set[str]:
    """Names of the weights that the graph reads."""
    return {str(n.target) for n in graph.nodes if n.op == "get_attr"}


def fake_inputs(
    inputs: Mapping[str, Spec], derived: bool = True
) -> tuple[dict[str, Tensor], dict[Any, str], FakeTensorMode]:
    """Fake tensors of the specs' types, {symbol: its name in `inputs`}, and the mode that they are of.

    `derived`: a size such as "2*B" is twice the symbol of B, if that is a size of its own. Otherwise it has a symbol
    too, which ops may find to be equal: what they say is then no other graph's.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    mode.cache_enabled = False  # its entries are of other symbols: half of the time for nothing
    plain = {d for s in inputs.values() for d in s.dims if isinstance(d, str) and symbols(d) == {d}}
    follow = {d for s in inputs.values() for d in s.dims if isinstance(d, str) and derived and symbols(d) <= plain}
    follow -= plain
    names: dict[Any, str] = {}
    sizes: dict[str, Any] = {}

    def known(example: Tensor, dims: tuple[Dim, ...]) -> Tensor:
        """The fake of a tensor; its sizes that are new get symbols."""
        dynamic = [DimDynamic.DUCK if isinstance(d, str) else DimDynamic.STATIC for d in dims]
        context: Any = StatelessSymbolicContext(dynamic_sizes=dynamic, constraint_sizes=[None] * len(dynamic))
        fake = mode.from_tensor(example, symbolic_context=context)
        for dim, size in zip(dims, fake.shape, strict=True):
            if isinstance(dim, str):
                sizes.setdefault(dim, size)
                if isinstance(size, torch.SymInt):
                    names.setdefault(size.node.expr, dim)
        return fake

    fakes: dict[str, Tensor] = {}
    for name, example in examples(inputs).items():
        dims = inputs[name].dims
        if not follow & set(dims):
            fakes[name] = known(example, dims)
            continue
        for dim in (d for d in dims if isinstance(d, str)):
            for symbol in sorted(symbols(dim)) if dim in follow else [dim]:
                if symbol not in sizes:
                    known(torch.zeros(resolve(symbol, example_sizes(inputs))), (symbol,))
        with mode, torch.no_grad():
            shape = [parse(d).at(sizes) if d in follow else sizes[d] if isinstance(d, str) else d for d in dims]
            fakes[name] = torch.empty(shape, dtype=example.dtype)
    return fakes, names, mode


def trace_function(function: Any, inputs: Mapping[str, Spec]) -> tuple[fx.Graph, str]:
    """The ATen ops that a function of tensors (by name) calls, and a condition on sizes that it relied on, or "".

    torch.export takes two to three times as long for the same ops.
    """
    fakes, names, mode = fake_inputs(inputs, derived=False)

    def by_place(*values: Tensor) -> Any:
        result = function(**dict(zip(inputs, values, strict=True)))
        return result if isinstance(result, tuple) else (result,)

    with torch.no_grad():
        graph = make_fx(by_place, tracing_mode="symbolic", pre_dispatch=True)(*fakes.values()).graph
    return graph, taken_for_granted(mode.shape_env, names)


def taken_for_granted(env: Any, names: Mapping[Any, str]) -> str:
    """A condition that tracing relied on and that is not so for all sizes above 1."""
    bases = sorted({name for dim in names.values() for name in symbols(dim)})
    for turn in range(len(SIZES)):
        sizes = {name: SIZES[(turn + i) % len(SIZES)] for i, name in enumerate(bases)}
        given = {symbol: resolve(dim, sizes) for symbol, dim in names.items()}
        for condition in [g.expr for g in env.guards]:
            if condition.free_symbols <= given.keys() and not bool(condition.subs(given)):
                return str(condition.subs({symbol: named_expression(dim) for symbol, dim in names.items()}))
    return ""


def dim_text(size: Any, names: Mapping[Any, str]) -> Dim:
    """A size as an int or as text over named symbols."""
    return size if isinstance(size, int) else written(size.node.expr, tuple(names.items()))


@functools.lru_cache(maxsize=2**16)
def written(expr: Any, names: tuple[tuple[Any, str], ...]) -> Dim:
    """An expression over symbols as an int or as text over their names."""
    return parse(str(expr.subs({symbol: named_expression(name) for symbol, name in names}))).dim()


def elements(value: Tensor) -> int:
    """How many a fake tensor has, at example sizes; a size that only values tell is the largest of these."""
    return math.prod(s if isinstance(s, int) else hinted(s) for s in value.shape)


def hinted(size: Any) -> int:
    """The size at example sizes."""
    if size.node.hint is not None:
        return int(size.node.hint)
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, HINTS[-1])))


def symbol_named(name: str) -> Any:
    """An integer symbol for sympy."""
    import sympy

    return sympy.Symbol(name, integer=True)


def named_expression(text: str) -> Any:
    """ "2*B" as a sympy expression over named symbols."""
    return parse(text).at({name: symbol_named(name) for name in symbols(text)})


def spec_of(value: Any, names: Mapping[Any, str]) -> Spec:
    """The Spec of a fake tensor."""
    return Spec(value.dtype, tuple(dim_text(s, names) for s in value.shape))


def build(
    name: str,
    graph: fx.Graph,
    inputs: dict[str, Spec],
    outputs: list[str],
    weights: Mapping[str, Tensor],
    role: Role | None = None,
) -> Graph:
    """A Graph from an fx graph whose output is a tuple: shapes re-derived, dead code removed, aliases found.

    Without a word on its role, a graph that reads weights is a forward, another one bookkeeping.
    """
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    names = propagate(graph, inputs, weights)
    results = list(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])
    specs = {o: spec_of(r.meta["val"], names) for o, r in zip(outputs, results, strict=True)}
    role = role or ("forward" if weights_read(graph) else "bookkeeping")
    return Graph(name, graph, dict(inputs), specs, aliases(graph, specs), role)


def aliases(graph: fx.Graph, outputs: Mapping[str, Spec]) -> dict[str, str]:
    """Outputs that are a row update of an input which nothing else reads: {output: input}."""
    from aropt.ir.ops import updated

    found = {}
    results = list(next(n for n in reversed(graph.nodes) if n.op == "output").args[0])
    for name, node in zip(outputs, results, strict=True):
        writer, source = (node, node.args[0]) if node.target is torch.ops.aten.index_copy.default else updated(node)
        if isinstance(source, fx.Node) and source.op == "placeholder" and set(source.users) == {writer}:
            found[name] = source.name
    return found


@contextlib.contextmanager
def looped_scans() -> Iterator[None]:
    """Runs torch's `scan` as a loop where nothing is exported: it would be compiled for each length, and in vain where
    a dispatch mode watches its ops."""
    scan: Any = importlib.import_module("torch._higher_order_ops.scan")  # its package has a function of this name
    before = scan._maybe_compile_and_run_fn

    def run(function: Any, *args: Any) -> Any:
        compiling = torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling()
        return before(function, *args) if compiling else loop(*args)

    def loop(combine: Any, init: Any, xs: Any) -> Any:
        carry, found = init, []
        for t in range(xs[0].shape[0]):
            carry, y = combine(*_pytree.tree_leaves(carry), *(x[t] for x in xs))
            found.append(y)
        return carry, _pytree.tree_map(lambda *rows: torch.stack(rows), *found)

    scan._maybe_compile_and_run_fn = run
    try:
        yield
    finally:
        scan._maybe_compile_and_run_fn = before


def size_conditions(exported: Any) -> list[Any]:
    """What torch.export assumed of the sizes of a program's one input [B, T, ...], as expressions over them."""
    known = {s.node.expr for s in input_sizes(exported)}
    found = []
    for node in exported.graph.nodes:
        if node.target is torch.ops.aten._assert_scalar.default and isinstance(node.args[0], fx.Node):
            expr = getattr(getattr(node.args[0].meta.get("val"), "node", None), "expr", None)
            if expr is not None and expr.free_symbols and expr.free_symbols <= known:
                found.append(expr)
    return found


def input_sizes(exported: Any) -> list[Any]:
    """The symbolic sizes B and T of a program's one input."""
    (name,) = exported.graph_signature.user_inputs
    node = next(n for n in exported.graph.nodes if n.name == name)
    return [s for s in node.meta["val"].shape[:2] if isinstance(s, torch.SymInt)]


def size_at(expr: Any, exported: Any, batch: int, length: int) -> Any:
    """The value of an expression over the sizes, or of a condition on them, for a batch and a length."""
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    sizes = dict(zip((s.node.expr for s in input_sizes(exported)), (batch, length), strict=True))
    return sympy_interp(PythonReferenceAnalysis, sizes, expr)


def settled_size(node: fx.Node, exported: Any, capacity: int) -> Any:
    """Which argument of a min or max of sizes it is at any length up to the capacity; None where that changes."""
    value = node.meta.get("val")
    known = {s.node.expr for s in input_sizes(exported)}
    if not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols <= known:
        return None
    given = [(b, n) for b in (1, 2, 5) for n in range(1, capacity + 1)]
    found = [size_at(value.node.expr, exported, *size) for size in given]
    for argument in node.args:
        expr = argument.meta["val"].node.expr if isinstance(argument, fx.Node) else argument
        sizes = [expr if isinstance(expr, int) else size_at(expr, exported, *size) for size in given]
        if sizes == found:
            return argument
    return None
