"""Sizes as text: parsed, printed and evaluated as Python and sympy would."""

from __future__ import annotations

import re
from typing import Any

import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aropt.ir.dims import Dim, Expression, ordered, parse, resolve, solved, symbols
from aropt.ir.torch_onnx import replaced_in

NAMES = st.sampled_from(["B", "T", "s10", "s2", "u_0"])
PRODUCTS = st.lists(NAMES, max_size=3).map(lambda names: tuple(sorted(names)))
EXPRESSIONS = st.dictionaries(PRODUCTS, st.integers(-99, 99), max_size=4).map(ordered)
FACTORS = st.one_of(st.integers(0, 99).map(str), NAMES, st.builds("{}**{}".format, NAMES, st.integers(1, 3)))
TERMS = st.lists(FACTORS, min_size=1, max_size=3).map("*".join)
TEXTS = st.builds(
    lambda sign, first, rest: sign + first + "".join(a + b for a, b in rest),
    st.sampled_from(["", "-"]),
    TERMS,
    st.lists(st.tuples(st.sampled_from(["+", "-", " + ", " - "]), TERMS), max_size=3),
)
SIZES = st.fixed_dictionaries({name: st.integers(0, 99) for name in ("B", "T", "s10", "s2", "u_0")})


@settings(deadline=None)
@given(EXPRESSIONS)
def test_what_is_printed_is_read_again(one: Expression) -> None:
    assert parse(str(one)) == parse(one.dim()) == one
    assert isinstance(one.dim(), int) == (not one.symbols())


@settings(deadline=None)
@given(EXPRESSIONS)
def test_the_text_is_that_of_sympy(one: Expression) -> None:
    """Programs that were saved have it, as torch's sizes are sympy's. Only "1-B" is "-B+1" here, which no size is."""
    assume(len(one.terms) != 2 or one.terms[0][1] > 0 or one.terms[1][0])
    value = one.at({s: sympy.Symbol(s, integer=True) for s in one.symbols()})
    assert str(one) == str(value).replace(" ", "")


@settings(deadline=None)
@given(TEXTS, SIZES)
def test_the_value_is_that_of_python(text: str, sizes: dict[str, int]) -> None:
    assert resolve(text, sizes) == parse(text).at(sizes) == eval(text, {}, dict(sizes))
    assert symbols(text) <= set(re.findall(r"[A-Za-z_]\w*", text))


@settings(deadline=None)
@given(EXPRESSIONS, st.dictionaries(NAMES, EXPRESSIONS.map(Expression.dim), max_size=2), SIZES)
def test_symbols_replaced_then_resolved(one: Expression, given: dict[str, Dim], sizes: dict[str, int]) -> None:
    inner = {name: resolve(other, sizes) for name, other in given.items()}
    made = one.subs(given)
    assert made.at(sizes) == one.at(sizes | inner) and parse(made.dim()) == made


@settings(deadline=None)
@given(NAMES, st.integers(1, 9), st.integers(-9, 9), st.integers(0, 99))
def test_the_symbol_of_a_known_size(name: str, factor: int, offset: int, value: int) -> None:
    one = ordered({(name,): factor, (): offset})
    assert solved(one.dim(), one.at({name: value})) == {name: value}
    assert solved("B*T", 4) == solved("B+T", 4) == solved("B**2", 4) == solved(4, 4) == {}


@settings(deadline=None, max_examples=40)
@given(st.text("BT01+-*/(), _.é\n", max_size=12) | st.text(max_size=8))
def test_text_is_read_or_refused(text: str) -> None:
    try:
        one = parse(text)
    except ValueError:
        return
    assert (parse(str(one)) == one and text.isascii()) or "(" in text


BAD = ["", "4*", "B B", "2B", "B**B", "B**10", "++B", "((B)", "B)", "1e5", "é", "Bé", "B/2", "*B", "9" * 30, "B+", "07"]


@pytest.mark.parametrize("text", [*BAD, "B\n"])
def test_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no size"):
        parse(text)


def test_what_stands_in_brackets_is_one_symbol() -> None:
    assert symbols("2*(T//2)+Max(1, T - 1)") == {"(T//2)", "Max(1,T-1)"}
    assert resolve("2*(T//2)+1", {"(T//2)": 4}) == 9
    with pytest.raises(KeyError):
        resolve("2*(T//2)", {"T": 4})


def test_onnx_shapes_get_other_sizes() -> None:
    ir = pytest.importorskip("onnx_ir")
    shape = replaced_in(ir.Shape([3, "s1", "2*s1 + 1", None, "s1/2"]), {"s1": "R"})
    assert [d if isinstance(d, int) else d.value for d in shape] == [3, "R", "2*R+1", None, "s1/2"]
    assert list(replaced_in(shape, {"R": 1}))[:3] == [3, 1, 3]


def test_long_text_takes_no_recursion() -> None:
    assert symbols("(" * 5000 + ")" * 5000 + "+B" * 5000) > {"B"}


def test_torch_export_takes_multiples_and_sums() -> None:
    known: dict[str, Any] = {}
    shapes = {0: parse("B").to_export(known), 1: parse("2*T+1").to_export(known)}

    class Sums(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 1::2] + x[:, :-1:2]

    exported = torch.export.export(Sums(), (torch.zeros(3, 9),), dynamic_shapes=(shapes,))
    given = next(n for n in exported.graph.nodes if n.op == "placeholder").meta["val"].shape
    assert re.fullmatch(r"\w+ 2\*\w+ \+ 1", " ".join(map(str, given)))
    assert set(known) == {"B", "T"} and parse("T").to_export(known) is known["T"]
