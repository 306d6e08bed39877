"""The table of rules against the ops themselves: which rows move if one is poisoned, and what some rows alone give."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from aropt.ir.calls import bind
from aropt.restrict.dims import Axes, NotRowwise, check
from aropt.restrict.info import Info
from aropt.restrict.rewrite import Restriction
from aropt.restrict.rules import RULES, rule_for
from tests.support.op_calls import SAMPLES, pointwise
from tests.support.op_values import SIZES, Call, Draw, Value, dims, factor_sizes, mapped

EXAMPLES = 25
SILENT = {"aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::fill"}  # no value of theirs gets through
SELDOM = 8  # an op takes at least one call in so many, and one in so many of these shows the poison
REFUSED = re.compile("equal$|frexp$")  # tagged pointwise; their results are a number, and two tensors
WHOLE = re.compile("bitwise|shift|xor|gcd|lcm")  # of integers
REFUSALS = (NotRowwise, IndexError, TypeError, ValueError, KeyError, AttributeError, AssertionError)  # as classify's


# --- a call as the analysis sees it ----------------------------------------------------------------------------------


def values(call: Call) -> list[Value]:
    found: list[Value] = []
    mapped((call.args, *call.kwargs.values()), lambda v: found.append(v))
    return found


def node_of(call: Call) -> tuple[fx.Node, dict[fx.Node, Value]]:
    graph, given = fx.Graph(), {}
    for i, one in enumerate(values(call)):
        node = graph.placeholder(f"x{i}")
        node.meta["val"], given[one] = one.tensor, node
    args = mapped(call.args, given.__getitem__)
    return graph.call_function(call.target, args, call.kwargs), {node: one for one, node in given.items()}


def run(call: Call, change: Callable[[Value], Tensor]) -> list[Tensor]:
    result = call.target(*mapped(call.args, change), **call.kwargs)
    return list(result) if isinstance(result, (list, tuple)) else [result]


def has_several(target: Any) -> bool:
    """Whether the op has several results, or a list of them."""
    returned = target._schema.returns
    return len(returned) > 1 or str(returned[0].type).startswith("List")


def claim(call: Call, results: list[Tensor]) -> list[Axes] | None:
    """What the rule says about the results; None: it refuses."""
    node, given = node_of(call)
    rule, several = rule_for(node), has_several(call.target)
    assert rule is not None
    try:
        bound = fx.node.map_arg(bind(node), lambda n: given[n].axes)
        sizes = [dims(r) for r in results]
        found = rule(bound, sizes if several else sizes[0])
        for axes, own in zip(found if several else [found], sizes, strict=True):
            check(axes, own)
    except REFUSALS as reason:
        note(f"refused: {reason}")
        return None
    return list(found) if several else [found]


# --- what is done to rows --------------------------------------------------------------------------------------------


def factor(axes: Axes, kind: str) -> int | None:
    """Which factor is of the kind."""
    kinds = [k for axis in axes for k, _ in axis]
    return kinds.index(kind) if kind in kinds else None


def poisoned(one: Value, kind: str, at: int, nan: bool) -> Tensor:
    """The tensor with other values in one row."""
    parts = one.tensor.reshape(factor_sizes(one.axes)).clone()
    row = parts.select(factor(one.axes, kind), at)
    if row.dtype == torch.bool:
        row.logical_not_()
    elif row.dtype.is_floating_point or row.dtype.is_complex:
        row.copy_(torch.full_like(row, torch.nan) if nan else 3 - row * 5)
    else:
        row.copy_((row + 1) % one.below)
    return parts.reshape(one.tensor.shape)


def taken(tensor: Tensor, axes: Axes, rows: dict[str, list[int]]) -> Tensor:
    """The chosen rows and sequences of a tensor."""
    parts = tensor.reshape(factor_sizes(axes))
    for i, (kind, _) in enumerate(f for axis in axes for f in axis):
        parts = parts.index_select(i, torch.tensor(rows[kind])) if kind in rows else parts
    left = iter(parts.shape)
    return parts.reshape([math.prod(next(left) for _ in axis) for axis in axes])


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


def poison(call: Call, before: list[Tensor], claims: list[Axes], draw: Draw) -> bool:
    """Poisons a row of each input in turn: no other row of a result may move. Returns whether that row did."""
    moved = False
    for one in values(call):
        for kind in (k for k in "brc" if factor(one.axes, k) is not None):
            at, nan = draw(st.integers(0, SIZES[kind] - 1)), draw(st.booleans())
            after = run(call, lambda v: poisoned(v, kind, at, nan) if v is one else v.tensor)  # noqa: B023
            for old, new, axes in zip(before, after, claims, strict=True):
                i = factor(axes, kind)
                if i is not None:
                    old, new = (t.reshape(factor_sizes(axes)) for t in (old, new))
                    moved |= not same(old.select(i, at), new.select(i, at))
                    rest = torch.tensor([n for n in range(old.shape[i]) if n != at])
                    old, new = old.index_select(i, rest), new.index_select(i, rest)
                assert same(old, new), f"{kind} {at} moved others of {axes}"
    return moved


def some_rows(call: Call, full: list[Tensor], claims: list[Axes], draw: Draw) -> None:
    """The op as `restrict` writes it for some rows of some sequences: their part of the full result."""
    rows = {k: draw(st.lists(st.integers(0, SIZES[k] - 1), min_size=1, max_size=3)) for k in "br"}
    node, given = node_of(call)
    made = object.__new__(Restriction)
    made.out, made.memo, made.info = fx.Graph(), {}, {n: Info(v.axes) for n, v in given.items()}
    made.ids, made.columns = made.out.placeholder("ids"), made.out.placeholder("columns")
    new = {n: made.out.placeholder(n.name) for n in given}
    made.out.output(made.emit(node, new.__getitem__, claims if has_several(call.target) else claims[0], False))
    sizes = torch.zeros(len(rows["b"]), len(rows["r"])), torch.zeros(len(rows["b"]), SIZES["c"])
    result = fx.Interpreter(torch.nn.Module(), graph=made.out).run(
        *sizes, *(taken(v.tensor, v.axes, rows) for v in given.values())
    )
    found = list(result) if isinstance(result, (list, tuple)) else [result]
    for one, whole, axes in zip(found, full, claims, strict=True):
        assert same(one, taken(whole, axes, rows)), f"rows {rows} of {axes}: {list(one.shape)}"


def hold(sample: Callable[[Draw], Call], examples: int = EXAMPLES) -> Counter[str]:
    """Draws calls of an op and holds its rule to what it does. Returns how many the rule takes, and how many moved."""
    tally: Counter[str] = Counter()

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(data=st.data())
    def case(data: Any) -> None:
        call = sample(data.draw)
        note(f"{call.target} {mapped((call.args, call.kwargs), lambda v: v.axes)}")
        results = run(call, lambda v: v.tensor)
        claims = claim(call, results)
        tally["drawn"] += 1
        if claims is not None:
            tally["taken"] += 1
            tally["moved"] += poison(call, results, claims, data.draw)
            some_rows(call, results, claims, data.draw)

    case()
    return tally


def test_every_op_has_a_sample() -> None:
    assert set(SAMPLES) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_only_the_poisoned_row_moves(name: str) -> None:
    tally = hold(SAMPLES[name])
    assert SELDOM * tally["taken"] >= tally["drawn"], tally
    assert name in SILENT or SELDOM * tally["moved"] >= tally["taken"], tally


def elementwise() -> list[Any]:
    """All ops that torch tags as pointwise, that draw nothing, and that have one tensor as a result."""
    found = []
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            base, _, overload = name.removeprefix("aten::").partition(".")
            op = getattr(getattr(torch.ops.aten, base), overload or "default", None)
            pure = op is not None and torch.Tag.pointwise in op.tags and not op._schema.is_mutable
            if pure and torch.Tag.nondeterministic_seeded not in op.tags and not REFUSED.match(base):
                found.append(op)
    return sorted(found, key=str)


def elementwise_call(draw: Draw, op: Any) -> Call:
    return pointwise(draw, op, "int" if WHOLE.search(op._opname) else "float")


def test_pointwise_ops_move_no_other_row() -> None:
    every = elementwise()
    tally = hold(lambda draw: elementwise_call(draw, draw(st.sampled_from(every))), 80)
    assert 2 * tally["taken"] > tally["drawn"], tally


@pytest.mark.exhaustive
@pytest.mark.parametrize("op", elementwise(), ids=str)
def test_each_pointwise_op_moves_no_other_row(op: Any) -> None:
    assert hold(lambda draw: elementwise_call(draw, op))["taken"]
