"""The position-only half of a graph: values that depend on where a token is, not on what it is.

Position ids, rotary angles, masks and biases are computed from `arange`, so they can be evaluated at capture time.
Evaluating them answers the legality questions of design section 4: does a mask hide the future, and does a value
depend on the total length (then no cache is exact).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from aropt.errors import Unsupported
from aropt.ir.calls import draws, op_name
from aropt.ir.torch_compat import named_expression, symbol_named
from aropt.restrict.dims import Axes, Dims, NotRowwise
from aropt.restrict.excluded import settled

SHAPE_ONLY = {
    "aten::sym_size", "aten::sym_numel", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty",
}  # fmt: skip
LIKE = {"aten::zeros_like", "aten::ones_like", "aten::full_like"}
EMPTY = {"aten::empty", "aten::new_empty"}  # any values will do
HINT = "write it with ops on each position alone, or as masked attention; or go without a cache: --no-pass kv-cache"
UNSTEADY = "use a fixed scaling; no cache is exact when the past is re-scaled"
HIDES = 5e3  # a bias at least this negative is a mask
LIMIT = 1500.0  # scores before masking are assumed to lie within +-LIMIT
NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)


def is_number(node: fx.Node) -> bool:
    """Whether the node is a size or computed from sizes."""
    return isinstance(node.meta.get("val"), NUMBERS)


def content_nodes(graph: fx.Graph, names: Mapping[Any, str], never: Sequence[int] = ()) -> set[fx.Node]:
    """Nodes that depend on token values; of ids that are in no text (`never`), comparisons don't."""
    content: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            content.add(node)
        elif node.op in ("call_function", "output"):
            value, name = node.meta.get("val"), op_name(node)
            if isinstance(value, torch.SymInt) and value.node.expr.free_symbols <= names.keys():
                continue  # a size, and not one that the tokens' values decide
            sources = node.all_input_nodes
            if name in SHAPE_ONLY or (name in LIKE and all(s.op == "placeholder" for s in sources)):
                continue
            if settled(node, never):
                continue
            if any(s in content for s in sources):
                content.add(node)
    return content


@dataclass(frozen=True, eq=False)
class Table:
    """A position-only value at full capacity. `keys` name its dims: "r", "c", or (axis from the right, factor).

    Dims along which the value is constant are left out, so a value that is the same everywhere has no dims.
    """

    value: Tensor
    keys: tuple[Any, ...]

    def matrix(self, n: int) -> Tensor:
        """The value as [..., rows, columns]."""
        value, keys = self.value, list(self.keys)
        for key in "rc":
            if key not in keys:
                value = value.unsqueeze(-1).expand(*value.shape, n)
                keys.append(key)
        return value.movedim((keys.index("r"), keys.index("c")), (-2, -1))


class Positions:
    """Evaluates position-only nodes at any length, and checks that they are stable as the length grows."""

    def __init__(
        self, weights: Mapping[str, Tensor], names: Mapping[Any, str], capacity: int, never: Sequence[int] = ()
    ) -> None:
        self.weights, self.capacity = weights, capacity
        self.some_id = next(i for i in range(len(never) + 1) if i not in never)
        self.symbols = {symbol: named_expression(name) for symbol, name in names.items()}
        self.memo: dict[tuple[int, int], dict[fx.Node, Any]] = {}
        self.tables: dict[tuple[fx.Node, Axes], Table] = {}

    def dims(self, node: fx.Node, value: Any = None) -> Dims:
        """The node's dims as ints or text over B and T."""
        value = node.meta["val"] if value is None else value
        return tuple(self.dim(s) for s in value.shape)

    def dim(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expr = size.node.expr.subs(self.symbols)
        if expr.is_number:
            return int(expr)
        text = str(expr).replace(" ", "")
        return self.clamped_dim(expr, text) if "M" in text else text

    def clamped_dim(self, expr: Any, text: str) -> int | str:
        """What a size with Max or Min in it is for lengths up to the capacity: "T", a number, or the text as it is."""
        steps = range(1, self.capacity + 1, max(1, self.capacity // 64))
        sizes = [expr.subs({symbol_named("T"): n, symbol_named("B"): 3}) for n in (*steps, self.capacity)]
        if all(size == n for size, n in zip(sizes, (*steps, self.capacity))):
            return "T"
        return int(sizes[0]) if all(size == sizes[0] for size in sizes) and not expr.has(symbol_named("B")) else text

    # --- evaluation --------------------------------------------------------------------------------------------------

    def value(self, node: fx.Node, length: int, batch: int = 1) -> Any:
        """The node's value for sequences of `length` tokens. Needs no token values."""
        memo = self.memo.setdefault((length, batch), {})
        pending = [node]
        while pending:
            current = pending[-1]
            missing = [] if current in memo else [n for n in self.needs(current) if n not in memo]
            if missing:
                pending.extend(missing)
                continue
            if current not in memo:
                memo[current] = self.evaluate(current, length, batch, memo)
            pending.pop()
        return memo[node]

    def needs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs whose values decide the node's value; new_zeros needs only sizes."""
        if isinstance(node.meta.get("val"), torch.SymInt):
            return []
        sources = node.all_input_nodes
        return [n for n in sources if is_number(n)] if op_name(node) in SHAPE_ONLY else sources

    def evaluate(self, node: fx.Node, length: int, batch: int, memo: Mapping[fx.Node, Any]) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes = {symbol_named("T"): length, symbol_named("B"): batch}
            return int(value.node.expr.subs(self.symbols).subs(sizes))
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node.op == "placeholder":
            return torch.full((batch, length), self.some_id)
        if draws(node):
            raise refusal(node, "the forward draws random numbers", "remove dropout or noise, or call model.eval()")

        def lookup(n: fx.Node) -> Any:  # without a value only the dtype matters (new_zeros and kin)
            return memo[n] if n in memo else torch.zeros((), dtype=n.meta["val"].dtype)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        try:
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
                return result.zero_() if op_name(node) in EMPTY else result
        except (IndexError, RuntimeError, ValueError) as error:
            raise refusal(node, f"no position values for {length} tokens: {str(error).splitlines()[0]}",
                          "give the longest length that the model takes (--capacity)") from error  # fmt: skip

    def number(self, node: fx.Node) -> Any:
        """The value of a number that depends on neither length nor batch; raises NotRowwise if it does."""
        values = {self.value(node, n, b) for n in (2, 3, 5, self.capacity) for b in (1, 2)}
        if len(values) > 1:
            raise NotRowwise("computes with the sequence length or the batch size as a number")
        return values.pop()

    def start(self, node: fx.Node) -> Tensor:
        """A value [1, ...] that is the same for each sequence of a batch and any length; raises NotRowwise if not."""
        values = [self.value(node, n, b) for n, b in ((1, 1), (2, 3), (self.capacity, 2))]
        first: Tensor = values[0][:1]
        if not all(torch.equal(value, first.expand_as(value)) for value in values):
            raise NotRowwise("starts from other values for other sequences or lengths")
        return first

    # --- tables ----------------------------------------------------------------------------------------------------

    def table(self, node: fx.Node, axes: Axes) -> Table:
        """The node's value at full capacity, its axes meaning `axes`.

        Raises Unsupported where the value changes with the total length or from sequence to sequence.
        """
        if (node, axes) in self.tables:
            return self.tables[node, axes]
        full = self.steady(node, axes, self.capacity)
        if full is None:
            most = self.longest(node, axes)
            why = "a position value changes with the total length (such as dynamic rotary scaling)"
            hint = f"it is steady up to {most} tokens: use --capacity {most} or less" if most > 1 else UNSTEADY
            raise refusal(node, why, hint)
        keys = [key for names in factor_keys(axes) for key in names]
        kept = [i for i, key in enumerate(keys) if key != "b" and not constant_along(full, i)]
        for i in reversed(range(full.dim())):
            full = full if i in kept else full.select(i, 0)
        result = self.tables[node, axes] = Table(full, tuple(keys[i] for i in kept))
        return result

    @staticmethod
    def split(value: Tensor, axes: Axes, length: int, batch: int) -> Tensor:
        """One dim for each factor of the axes (none for axes of size 1). Batch may be given as 1 for all sequences."""
        sizes = []
        for dim, axis in zip(value.shape, axes, strict=True):
            full = [{"b": batch, "r": length, "c": length + n}.get(kind, n) for kind, n in axis]
            whole = dim == math.prod(full)
            sizes += full if whole else [1 if kind == "b" else n for (kind, _), n in zip(axis, full)]
        return value.reshape(sizes)

    def steady(self, node: fx.Node, axes: Axes, length: int) -> Tensor | None:
        """The value for so many tokens, one dim a factor of the axes; None unless those of fewer are parts of it."""
        full = self.split(self.value(node, length), axes, length, 1)
        for n in sorted({min(n, length) for n in (1, 5, 12, length - 1) if n > 0}):
            if not begins(node, full, self.split(self.value(node, n, 2), axes, n, 2), axes):
                return None
        return full

    def longest(self, node: fx.Node, axes: Axes) -> int:
        """The most tokens for which the value is steady."""
        low, high = 1, self.capacity
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.steady(node, axes, middle) is None else (middle, high)
        return low


def begins(node: fx.Node, full: Tensor, short: Tensor, axes: Axes) -> bool:
    """Whether the value for fewer tokens is a prefix of the full one, and the same for each sequence."""
    expected = full
    for i, (kind, n) in enumerate([f for axis in axes for f in axis]):
        if kind in "rc" and n == 0:
            expected = expected.narrow(i, 0, short.shape[i])
        elif kind != "." and kind != "b":
            raise refusal(node, "a position value has appended columns", HINT)
    same_size = torch.broadcast_shapes(expected.shape, short.shape) == short.shape
    return same_size and close(expected, short)


def factor_keys(axes: Axes) -> list[list[Any]]:
    """A name for each factor of each axis: "b", "r", "c", or (axis from the right, factor)."""
    return [[f[0] if f[0] in "brc" else (i - len(axes), k) for k, f in enumerate(axis)] for i, axis in enumerate(axes)]


def constant_along(value: Tensor, dim: int) -> bool:
    """Whether all slices along `dim` are equal."""
    return value.shape[dim] == 1 or bool((value == value.narrow(dim, 0, 1)).all())


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tables are equal up to rounding."""
    kind = torch.complex128 if a.is_complex() else torch.float64
    return torch.allclose(a.to(kind), b.to(kind), rtol=1e-5, atol=1e-6, equal_nan=True)


def classify(hidden: Tensor) -> tuple[str, int]:
    """("all", 0), ("causal", 0), ("window", w) or ("table", 0) for a [n, n] matrix of hidden columns."""
    n = hidden.shape[0]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
    if not hidden.any():
        return "all", 0
    if torch.equal(hidden, j > i):
        return "causal", 0
    width = int((~hidden[-1]).sum())
    if width and torch.equal(hidden, (j > i) | (j <= i - width)):
        return "window", width
    return "table", 0


def hides_future(hidden: Tensor) -> bool:
    """Whether no row sees a later one."""
    n = hidden.shape[0]
    return bool(hidden[torch.ones(n, n, dtype=torch.bool).triu(1)].all())


def refusal(node: fx.Node, why: str, hint: str, what: str = "this model can't be cached exactly") -> Unsupported:
    """An Unsupported error that names node, op and module path."""
    where = node.meta.get("where") or "the model's top level"
    return Unsupported(what=what, where=f"{where}, node {node.name} ({op_name(node)})", why=why, hint=hint)
