"""`aropt::scan`: anyone's own recurrence, a body that is run row by row (`torch._higher_order_ops.scan`, as captured).

    scan(body, init, xs, extra, state, positions) -> [*ys, *carry]

* `body`: text, one call a line: `v0 = aten.mul.Tensor(c0, 0.5)`, last `return [carry], [ys]`. It knows the carries
  `c0, c1, ..` [B, ...], a row of each of the xs `x0, ..` [B, ...], and `e0, ..`, what is the same for all rows.
* `xs` [B, R, ...], at least one; `extra` of any shape. `ys` [B, R, ...], what the body returns beside the carry.
* `init`: the carries before the first row, [B, ...], or [1, ...] where `state` gives the batch.
* `state`: empty, or the carries that earlier rows left behind. Then `init` may be empty, too; else one more value, bool
  [B], comes after the carries: whether there were earlier rows. Where there were none, `init` counts. It is returned as
  it is after the rows.
* `positions` int64 [B, R] or None: a row at -1 is padding, which leaves each carry as it is, and whose y is anything.

Bodies are data: calls of ATen ops and arithmetic of sizes, parsed and never evaluated as Python. Which ops they may
call is for `aropt.ir.verify` to say. In ONNX several rows are a Scan, and one row is the body alone.
"""

from __future__ import annotations

import ast
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from aropt.ir.opdef import Cost, Mixer, OpDef, onnx_rows, onnx_scan
from aropt.kernels.delay import padding

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Type = tuple[torch.dtype, tuple[int, ...]]
LONGEST = 100_000  # characters of a body
ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod", "neg")
KINDS = "cxe"
ONNX_KINDS = {"FLOAT": "float32", "DOUBLE": "float64", "INT64": "int64", "INT32": "int32", "BOOL": "bool"}
NUMBERS = itertools.count()  # of bodies in ONNX, whose values have names of their own
NAMED = {"inf": float("inf"), "nan": float("nan")}
DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
ALLOCATION = {"device", "layout", "pin_memory", "memory_format"}  # where a value lies is for the target to say


def written(graph: fx.Graph, carries: int) -> str:
    """The text of a graph with placeholders c0, .., x0, .., e0, .. that returns so many carries, then the ys.

    Raises ValueError for an argument that has no text.
    """
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = node.name
        elif node.op == "call_function":
            args = [text(a, names) for a in node.args]
            args += [f"{k}={text(v, names)}" for k, v in node.kwargs.items() if k not in ALLOCATION]
            names[node] = f"v{len(lines)}"
            known = isinstance(node.target, torch._ops.OpOverload)
            name = str(node.target) if known else f"operator.{getattr(node.target, '__name__', '?')}"
            lines.append(f"{names[node]} = {name}({', '.join(args)})")
        elif node.op == "output":
            results = [names[n] for n in node.args[0]]
            lines.append(f"return [{', '.join(results[:carries])}], [{', '.join(results[carries:])}]")
    return "\n".join(lines)


def text(value: Any, names: Mapping[fx.Node, str]) -> str:
    """An argument as text."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        inner = [text(v, names) for v in value]
        return f"[{', '.join(inner)}]" if isinstance(value, list) else f"({', '.join(f'{i},' for i in inner)})"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return repr(value)
    raise ValueError(f"a {type(value).__name__} can't be an argument in the body of a scan")


@functools.lru_cache(maxsize=256)
def parsed(body: str, sizes: tuple[int, int, int]) -> fx.GraphModule:
    """The body as a module of so many carries, xs and extras: it returns the carries, then the ys.

    Nothing of the text is evaluated: targets are looked up among ATen's ops and the arithmetic of sizes. Raises
    ValueError.
    """
    graph = fx.Graph()
    nodes = {f"{k}{i}": graph.placeholder(f"{k}{i}") for k, n in zip(KINDS, sizes, strict=True) for i in range(n)}
    if len(body) > LONGEST:
        raise ValueError(f"the body of a scan has more than {LONGEST} characters")
    *calls, last = body.splitlines() or [""]
    try:
        for line in calls:
            name, _, call = line.partition(" = ")
            found = ast.parse(call, mode="eval").body
            if name != f"v{len(nodes) - sum(sizes)}" or not isinstance(found, ast.Call):
                raise ValueError(f"{line[:100]!r} is no call with its number")
            args = tuple(value_of(a, nodes) for a in found.args)
            kwargs = {str(k.arg): value_of(k.value, nodes) for k in found.keywords}
            nodes[name] = graph.call_function(target_of(found.func), args, kwargs)
        results: Any = value_of(ast.parse(last.removeprefix("return "), mode="eval").body, nodes)
        carries, ys = results
        made = [*carries, *ys]
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"the body of a scan can't be read: {error}") from error
    if len(carries) != sizes[0] or not ys or not all(isinstance(v, fx.Node) for v in made):
        raise ValueError(f"the body of a scan returns {last[:100]!r}, not {sizes[0]} carries and what rows give")
    graph.output(tuple(made))
    return fx.GraphModule({}, graph)


def target_of(found: ast.expr) -> Any:
    """The op of a call: aten.NAME.OVERLOAD, or operator.NAME."""
    path = ast.unparse(found).split(".")
    if len(path) == 2 and path[0] == "operator" and path[1] in (*ARITHMETIC, "getitem"):
        return getattr(operator, path[1])
    if len(path) == 3 and path[0] == "aten" and all(part.isidentifier() for part in path):
        target = getattr(getattr(torch.ops.aten, path[1], None), path[2], None)
        if isinstance(target, torch._ops.OpOverload):
            return target
    raise ValueError(f"{'.'.join(path)[:100]!r} is no op that the body of a scan may call")


def value_of(found: ast.expr, nodes: Mapping[str, fx.Node]) -> Any:
    """The argument that `text` wrote."""
    if isinstance(found, ast.Constant) and isinstance(found.value, (type(None), bool, int, float, str)):
        return found.value
    if isinstance(found, ast.Name) and (found.id in nodes or found.id in NAMED):
        return nodes.get(found.id, NAMED.get(found.id))
    if isinstance(found, (ast.List, ast.Tuple)):
        inner = [value_of(v, nodes) for v in found.elts]
        return inner if isinstance(found, ast.List) else tuple(inner)
    if isinstance(found, ast.UnaryOp) and isinstance(found.op, ast.USub):
        inner = value_of(found.operand, nodes)
        if type(inner) in (int, float):
            return -inner
    if isinstance(found, ast.Attribute) and ast.unparse(found) in DTYPES:
        return DTYPES[ast.unparse(found)]
    raise ValueError(f"{ast.unparse(found)[:100]!r} can't be an argument in the body of a scan")


def calls(body: Any, init: Any, xs: Any, extra: Any, state: Any, positions: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The calls in the body: target, arguments, keyword arguments. Raises ValueError where it can't be read."""
    if not isinstance(body, str) or not all(isinstance(x, (list, tuple)) for x in (init, xs, extra, state)):
        raise ValueError("a scan takes a text and lists")
    if not xs or (state and len(state) != (len(init) + 1 if init else len(state))):
        raise ValueError(f"a scan can't have {len(init)} initial carries, {len(xs)} xs and {len(state)} of state")
    module = parsed(body, (len(init) or len(state), len(xs), len(extra)))
    yield from ((n.target, n.args, n.kwargs) for n in module.graph.nodes if n.op == "call_function")


def beside(flag: Tensor, value: Tensor) -> Tensor:
    """[B] as [B, 1, ..] of the value's rank."""
    return flag.reshape(flag.shape[0], *[1] * (value.dim() - 1))


def begin(init: Sequence[Tensor], state: Sequence[Tensor]) -> list[Tensor]:
    """The carries before the rows at hand."""
    if not state or not init:
        return list(state or init)
    return [torch.where(beside(state[-1], s), s, i) for s, i in zip(state, init)]


def reference(
    body: str, init: list[Tensor], xs: list[Tensor], extra: list[Tensor], state: list[Tensor], positions: Tensor | None
) -> list[Tensor]:
    """The definition, row by row."""
    carry = begin(init, state)
    count, step = len(carry), parsed(body, (len(carry), len(xs), len(extra)))
    valid = None if positions is None else positions >= 0
    rows: list[Sequence[Tensor]] = []
    for t in range(xs[0].shape[1]):
        new = step(*carry, *(x.select(1, t) for x in xs), *extra)
        rows.append(new[count:])
        pairs = zip(new[:count], carry)
        carry = [a if valid is None else torch.where(beside(valid[:, t], a), a, b) for a, b in pairs]
    found = [torch.stack(y, 1) for y in zip(*rows)] + carry
    if len(state) > count:
        found.append(state[-1] | (True if valid is None else valid.any(1)))
    return [x.clone(memory_format=torch.contiguous_format) for x in found]


def fake(
    body: str, init: list[Tensor], xs: list[Tensor], extra: list[Tensor], state: list[Tensor], positions: Any
) -> list[Tensor]:
    carry = [x.new_empty(x.shape) for x in begin(init, state)]
    ys = parsed(body, (len(carry), len(xs), len(extra)))(*carry, *a_row(xs), *extra)[len(carry) :]
    flags = [x.new_empty(x.shape) for x in state[len(carry) :]]
    return [y.new_empty((y.shape[0], xs[0].shape[1], *y.shape[1:])) for y in ys] + carry + flags


def a_row(xs: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], *x.shape[2:])) for x in xs]


def inside(body: str, init: list[Tensor], xs: list[Tensor], extra: list[Tensor], state: list[Tensor], _: Any) -> Any:
    """The value of each call of the body for a row; of fake values, fake ones."""
    carry, values = begin(init, state), dict[fx.Node, Any]()
    given = iter([*carry, *a_row(xs), *extra])
    for node in parsed(body, (len(carry), len(xs), len(extra))).graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)
    return [v for value in values.values() for v in (value if isinstance(value, (list, tuple)) else [value])]


def cost(body: str, init: Any, xs: list[Tensor], extra: list[Tensor], state: Any, *_: Any) -> Cost:
    """A product with each matrix of `extra` a row, an operation an element and call; all is read once, and written."""
    rows, carry = xs[0].shape[0] * xs[0].shape[1], begin(init, state)
    touched = sum(x.numel() for x in xs) + rows * sum(c[0].numel() for c in carry)
    flops = 2.0 * rows * sum(e.numel() for e in extra if e.dim() > 1) + float(touched * len(body.splitlines()))
    made = fake(body, init, xs, extra, state, None)
    return Cost(flops, float(sum(x.nbytes for x in (*xs, *extra, *carry, *made))))


@functools.lru_cache(maxsize=64)
def translated(body: str, sizes: tuple[int, int, int], given: tuple[Type, ...]) -> bytes:
    """The body as an ONNX model, its inputs in order; axis 0 of carries and xs is of any size."""
    module, moving = parsed(body, sizes).eval(), sizes[0] + sizes[1]
    values, batch = tuple(torch.zeros(shape, dtype=dtype) for dtype, shape in given), torch.export.Dim("batch")
    shapes = (*({0: batch} for _ in given[:moving]), *({} for _ in given[moving:]))
    made = torch.onnx.export(module, values, dynamo=True, opset_version=20, dynamic_shapes=shapes, verbose=False)
    assert made is not None
    found: bytes = made.model_proto.SerializeToString()
    return found


def placed(model: bytes, inputs: Sequence[Any]) -> list[Any]:
    """Adds the nodes of a translated body on these inputs; returns its results."""
    import onnx
    import onnx_ir as ir
    from onnxscript import evaluator

    graph, nodes = ir.from_proto(onnx.load_from_string(model)).graph, evaluator.default().nodes
    name = f"body_{next(NUMBERS)}"
    for value in graph.initializers.values():
        node = ir.Node("", "Constant", [], attributes=[ir.AttrTensor("value", value.const_value)])
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        nodes.append(node)
    for inner, outer in zip(graph.inputs, inputs, strict=True):
        ir.convenience.replace_all_uses_with(inner, outer)
    results = [dict(zip(graph.inputs, inputs)).get(v, v) for v in graph.outputs]
    for value in [v for node in ir.traversal.RecursiveGraphIterator(graph) for v in node.outputs]:
        value.name = f"{name}.{value.name}"
    inside = list(graph)
    graph.remove(inside)
    nodes.extend(inside)
    return results


def onnx_step(body: str, carried: Sequence[Any], xs: Sequence[Any], extra: Sequence[Any]) -> Callable[..., list[Any]]:
    """What writes the body on carries and a row of each of the xs; `carried` and `xs` say of what types these are."""
    from onnxscript import opset20 as op

    model = translated(body, (len(carried), len(xs), len(extra)), tuple(types(carried, xs, extra)))
    return lambda *given: [op.Identity(value) for value in placed(model, [*given, *extra])]


def onnx_wide(flag: Any, value: Any) -> Any:
    """[B] beside a value."""
    from onnxscript import opset20 as op

    axes = list(range(1, len(value.shape)))
    return op.Unsqueeze(flag, op.Constant(value_ints=axes)) if axes else flag


def onnx_begin(init: Sequence[Any], state: Sequence[Any]) -> list[Any]:
    """`begin` in ONNX ops."""
    from onnxscript import opset20 as op

    if not state or not init:
        return list(state or init)
    return [op.Where(onnx_wide(state[-1], s), s, i) for s, i in zip(state, init)]


def onnx(body, init, xs, extra, state, positions):  # type: ignore[no-untyped-def]
    """The same in standard ONNX ops: one row is the body, several are a Scan of it."""
    import onnx_ir as ir
    from onnxscript import opset20 as op

    carried = state[: len(init)] if init and state else state or init
    count, row, begun = len(carried), onnx_step(body, carried, xs, extra), onnx_begin(init, state)
    valid = [] if positions is None else [op.GreaterOrEqual(positions, op.Constant(value_int=0))]

    def step(*given: Any) -> tuple[Any, ...]:
        """Carries, a row of each of the xs, and whether it counts -> carries, ys."""
        new = row(*given[: count + len(xs)])
        for counts in given[count + len(xs) :]:
            kept = [op.Where(onnx_wide(counts, c), a, b) for a, b, c in zip(new, given, carried)]
            new = [*kept, *new[count:]]
        return tuple(new)

    def one() -> list[Any]:
        first = op.Constant(value_ints=[1])
        found = step(*begun, *(op.Squeeze(x, first) for x in (*xs, *valid)))
        return [*found[:count], *(op.Unsqueeze(y, first) for y in found[count:])]

    def several() -> list[Any]:
        kinds = [*(v.dtype for v in (*carried, *xs)), *(ir.DataType.BOOL for _ in valid)]
        return onnx_scan(step, begun, [*xs, *valid], 1, 1, kinds)

    found = list(onnx_rows(xs[0], 1, one, several))
    flags = state[count:]
    for some in [op.ReduceMax(op.Cast(v, to=7), op.Constant(value_ints=[1]), keepdims=0) for v in valid]:
        flags = [op.Or(flag, op.Cast(some, to=9)) for flag in flags]
    flags = flags if valid else [op.Or(flag, op.Not(flag)) for flag in flags]
    return [*found[count:], *found[:count], *flags]


def types(carried: Sequence[Any], xs: Sequence[Any], extra: Sequence[Any]) -> Iterator[Type]:
    """Of ONNX values: what the body is given, an example batch of two in the place of B."""
    for value, shape in (
        *((c, [2, *c.shape[1:]]) for c in carried),
        *((x, [2, *x.shape[2:]]) for x in xs),
        *((e, e.shape) for e in extra),
    ):
        yield DTYPES[f"torch.{ONNX_KINDS[value.dtype.name]}"], tuple(int(size) for size in shape)


# --- samples ---------------------------------------------------------------------------------------------------------

GATED = """v0 = aten.rsub.Scalar(x0, 1)
v1 = aten.mul.Tensor(v0, c0)
v2 = aten.mul.Tensor(x0, x1)
v3 = aten.add.Tensor(v1, v2)
return [v3], [v3]"""  # minGRU (Feng et al. 2024), x0 its gate
CELL = """v0 = aten.linear.default(c0, e0, e1)
v1 = aten.add.Tensor(x0, v0)
v2 = aten.split.Tensor(v1, WIDTH, -1)
v3 = operator.getitem(v2, 0)
v4 = operator.getitem(v2, 1)
v5 = aten.sigmoid.default(v3)
v6 = aten.mul.Tensor(v5, c1)
v7 = aten.tanh.default(v4)
v8 = aten.add.Tensor(v6, v7)
v9 = aten.tanh.default(v8)
return [v9, v8], [v9, v5]"""  # a short LSTM (Hochreiter & Schmidhuber 1997)
STABLE = """v0 = aten.add.Tensor(c1, x1)
v1 = aten.maximum.default(v0, x0)
v2 = aten.sub.Tensor(v0, v1)
v3 = aten.exp.default(v2)
v4 = aten.mul.Tensor(v3, c0)
v5 = aten.sub.Tensor(x0, v1)
v6 = aten.exp.default(v5)
v7 = aten.add.Tensor(v4, v6)
return [v7, v1], [v7]"""  # sums of exponentials with their largest apart, from -inf (xLSTM, Beck et al. 2024)


def samples(like: tuple[Any, ...] | None = None) -> SearchStrategy[tuple[Any, ...]]:
    """One carry and two, from initial ones, from earlier rows or from either, with padding or without."""
    from hypothesis import strategies as st

    @st.composite
    def build(draw: Any) -> tuple[Any, ...]:
        batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        width = like[2][-1].shape[-1] if like else draw(st.integers(1, 4))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        body = like[0] if like else draw(st.sampled_from((GATED, CELL, STABLE))).replace("WIDTH", str(width))
        cell, count = "linear" in body, 1 if "c1" not in body else 2
        width = width // 2 if like and cell else width

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        ways = [(True, False), (False, True), (True, True)]
        way = (bool(like[1]), bool(like[4])) if like else draw(st.sampled_from(ways))
        padded = like[5] is not None if like else draw(st.booleans())
        xs = [drawn(batch, rows, 2 * width)] if cell else [drawn(batch, rows, width) for _ in range(2)]
        extra = [drawn(2 * width, width), drawn(2 * width)] if cell else []
        init = [drawn(batch, width) for _ in range(count)]
        init[1:] = [torch.full_like(x, -torch.inf) for x in init[1:]] if body == STABLE else init[1:]
        state = [drawn(batch, width) for _ in range(count)]
        state += [torch.rand(batch, generator=generator) < 0.5] if way[0] else []
        positions = padding(batch, rows, generator) if padded else None
        return body, init if way[0] else [], xs, extra, state if way[1] else [], positions

    return build()


OP = OpDef(
    name="scan",
    schema="(str body, Tensor[] init, Tensor[] xs, Tensor[] extra, Tensor[] state, Tensor? positions) -> Tensor[]",
    reference=reference,
    fake=fake,
    cost=cost,
    samples=samples,
    onnx=onnx,
    calls=calls,
    inside=inside,
    fixed={"init": (1, 2, 3, 4), "xs": (2, 3, 4, 5), "extra": (0, 1, 2, 3), "state": (1, 2, 3, 4)},
    mixer=Mixer(rows={"xs": 1}, state=("state",), positions="positions", initial="init", tree="scan_tree"),
    tolerance={torch.float32: (1e-5, 1e-5)},
)
