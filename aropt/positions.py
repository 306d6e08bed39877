"""The position-only half of a graph: values that depend on where a token is, not on what it is.

Position ids, rotary angles, masks and biases are computed from `arange`, so they can be evaluated at capture time.
Evaluating them answers the legality questions of design section 4: does a mask hide the future, and does a value
depend on the total length (then no cache is exact).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from aropt.axes import op_name
from aropt.errors import Unsupported
from aropt.torch_compat import named_expression, symbol_named

SHAPE_ONLY = {"aten::sym_size", "aten::sym_numel", "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty"}
LIKE = {"aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::empty_like", "aten::rand_like", "aten::randn_like"}
RANDOM = {"aten::rand", "aten::randn", "aten::bernoulli", "aten::rand_like", "aten::randn_like", "aten::multinomial"}
HIDDEN_BELOW = -1e4  # exp(x - max) is exactly zero in fp32 for any score a trained model has


def content_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that depend on token values."""
    content: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            content.add(node)
        elif node.op in ("call_function", "output"):
            if isinstance(node.meta.get("val"), (torch.SymInt, int)):
                continue  # a size
            name = op_name(node)
            sources = node.all_input_nodes
            if name in SHAPE_ONLY or (name in LIKE and all(s.op == "placeholder" for s in sources)):
                continue
            if any(s in content for s in sources):
                content.add(node)
    return content


class Positions:
    """Evaluates position-only nodes at any length, and checks that they are stable as the length grows."""

    def __init__(self, weights: Mapping[str, Tensor], names: Mapping[Any, str], capacity: int) -> None:
        self.weights, self.capacity = weights, capacity
        self.names = {symbol: named_expression(name) for symbol, name in names.items()}
        self.memo: dict[tuple[int, int], dict[fx.Node, Any]] = {}

    def dims(self, node: fx.Node, value: Any = None) -> tuple[int | str, ...]:
        """The node's dims as ints or text over B and T."""
        value = node.meta["val"] if value is None else value
        return tuple(self.dim(s) for s in value.shape)

    def dim(self, size: Any) -> int | str:
        if isinstance(size, int):
            return size
        expr = size.node.expr.subs(self.names)
        return int(expr) if expr.is_number else str(expr).replace(" ", "")

    def value(self, node: fx.Node, length: int, batch: int = 1) -> Any:
        """The node's value for sequences of `length` tokens. Needs no token values."""
        memo = self.memo.setdefault((length, batch), {})
        pending = [node]
        while pending:
            current = pending[-1]
            if current in memo:
                pending.pop()
                continue
            missing = [] if self.is_size(current) or op_name(current) in SHAPE_ONLY else [
                n for n in current.all_input_nodes if n not in memo]  # fmt: skip
            if op_name(current) in SHAPE_ONLY:
                missing = [n for n in current.all_input_nodes if n not in memo and self.is_size(n)]
            if missing:
                pending.extend(missing)
                continue
            memo[current] = self.evaluate(current, length, batch, memo)
            pending.pop()
        return memo[node]

    @staticmethod
    def is_size(node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), (torch.SymInt, int)) and not isinstance(node.meta.get("val"), bool)

    def evaluate(self, node: fx.Node, length: int, batch: int, memo: Mapping[fx.Node, Any]) -> Any:
        if self.is_size(node):
            value = node.meta["val"]
            if isinstance(value, int):
                return value
            return int(value.node.expr.subs(self.names).subs({symbol_named("T"): length, symbol_named("B"): batch}))
        if node.op == "get_attr":
            return self.weights[str(node.target)]
        if node.op == "placeholder":
            return torch.zeros(batch, length, dtype=torch.int64)
        if op_name(node) in RANDOM:
            raise refusal(node, "the forward draws random numbers", "remove dropout or noise, or call model.eval()")

        def lookup(n: fx.Node) -> Any:
            if n in memo:
                return memo[n]
            return torch.zeros((), dtype=n.meta["val"].dtype)  # only its dtype matters (new_zeros and kin)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lookup)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def table(self, node: fx.Node) -> Tensor:
        """The node's value at full capacity, batch 1. Raises Unsupported when it isn't a function of position alone."""
        try:
            full = self.value(node, self.capacity)
        except (IndexError, RuntimeError) as error:
            raise refusal(node, f"no position table for {self.capacity} tokens: {str(error).splitlines()[0]}",
                          "give the longest length that the model takes (--capacity)") from error  # fmt: skip
        for length in {min(5, self.capacity), min(12, self.capacity)}:
            short = self.value(node, length, batch=2)
            self.check_stable(node, full, short)
        return full  # type: ignore[no-any-return]

    def check_stable(self, node: fx.Node, full: Any, short: Any) -> None:
        """Raises Unsupported unless `short` is a prefix of `full` and the same for each sequence."""
        if not isinstance(full, Tensor):
            if full != short:
                raise refusal(node, "a number depends on the total length", "pass it as a constant, or per position")
            return
        expected = full
        for axis, dim in enumerate(self.dims(node)):
            if isinstance(dim, str) and "T" in dim:
                expected = expected.narrow(axis, 0, short.shape[axis])
            elif isinstance(dim, str) and "B" in dim and expected.shape[axis] == 1:
                expected = expected.expand(*(-1 if i != axis else short.shape[axis] for i in range(expected.dim())))
        if expected.shape != short.shape:
            return  # an axis such as B*H: the consumer decides
        if not torch.allclose(expected.double(), short.double(), rtol=1e-5, atol=1e-6, equal_nan=True):
            raise refusal(node, "a position value changes with the total length (such as dynamic rotary scaling)",
                          "use a fixed scaling; no cache is exact when the past is re-scaled")  # fmt: skip


def hidden_by(table: Tensor, rows: int, columns: int, above: bool | None = None) -> Tensor:
    """[n, n] bool, True where no head lets row i see column j.

    `table` is a float bias (hidden below -1e4), or a bool whose value `above` means hidden.
    """
    hidden = table <= HIDDEN_BELOW if above is None else table == above
    hidden = hidden.movedim((rows, columns), (-2, -1))
    return hidden.reshape(-1, *hidden.shape[-2:]).all(0)


def classify(hidden: Tensor) -> tuple[str, int]:
    """("causal", 0), ("window", w) or ("table", 0) for a [n, n] hidden matrix."""
    n = hidden.shape[0]
    i, j = torch.arange(n)[:, None], torch.arange(n)[None]
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
