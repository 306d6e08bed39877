"""Sizes of axes: numbers, or whole-number polynomials over a graph's symbols, written as "B", "4*B" or "B*T+1".

A part in brackets, which torch writes for other functions of sizes, such as "(T//2)" or "Max(1,T)", is one symbol.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any

Dim = int | str  # a size as specs hold it: a number, or the text of an expression that is none

# Texts come from files that anybody may have written: numbers and powers are short, and nothing recurses.
TOKEN = re.compile(
    r" *(?:(?P<n>(?:0|[1-9]\d{0,17})(?!\w))|(?P<b>(?:[A-Za-z_]\w*)?\()|(?P<s>[A-Za-z_]\w*)"
    r"|\*\* *(?P<p>[1-9])(?!\w)|(?P<t>\*)|(?P<i>[+-])) *",
    re.ASCII,
)  # number, bracket, symbol, power, times, sign
SUM = re.compile(r"i?(n|sp?)(t(n|sp?))*(i(n|sp?)(t(n|sp?))*)*")


@dataclass(frozen=True)
class Expression:
    """A sum of products, in the order in which it is written: the symbols of each, sorted, and its factor."""

    terms: tuple[tuple[tuple[str, ...], int], ...]

    def symbols(self) -> set[str]:
        return {symbol for product, _ in self.terms for symbol in product}

    def at(self, values: Mapping[str, Any]) -> Any:
        """The value for values of the symbols: sizes, or what else can be added and multiplied (sympy's, torch's Dim).

        Raises KeyError for an unknown symbol.
        """
        total = None
        for product, factor in self.terms:
            value: Any = None if product and factor == 1 else factor
            for symbol in product:
                value = values[symbol] if value is None else value * values[symbol]
            total = value if total is None else total + value
        return 0 if total is None else total

    def subs(self, given: Mapping[str, Dim]) -> Expression:
        """The expression with expressions in place of symbols."""
        made: Counter[tuple[str, ...]] = Counter()
        for product, factor in self.terms:
            factors: Counter[tuple[str, ...]] = Counter({(): factor})
            for other in (parse(given.get(symbol, symbol)) for symbol in product):
                factors = times(factors, other)
            made.update(factors)
        return ordered(made)

    def to_export(self, known: dict[str, Any]) -> Any:
        """The size as torch.export's Dim, those of the symbols taken from `known`, or put there."""
        from torch.export import Dim

        for symbol in self.symbols() - known.keys():
            known[symbol] = Dim(symbol)
        return self.at(known)

    def dim(self) -> Dim:
        """The size as specs hold it; the text is ONNX's too."""
        return str(self) if self.symbols() else self.at({})

    def __str__(self) -> str:
        return "".join(map(written, self.terms)).removeprefix("+") or "0"


def written(term: tuple[tuple[str, ...], int]) -> str:
    """A product with its sign."""
    product, factor = term
    powers = [(symbol, len(list(same))) for symbol, same in groupby(product)]
    parts = [symbol if n == 1 else f"{symbol}**{n}" for symbol, n in powers]
    number = [str(abs(factor))] if abs(factor) != 1 or not parts else []
    return "-+"[factor > 0] + "*".join([*number, *parts])


def times(factors: Counter[tuple[str, ...]], other: Expression) -> Counter[tuple[str, ...]]:
    found: Counter[tuple[str, ...]] = Counter()
    for a, x in factors.items():
        for b, y in other.terms:
            found[tuple(sorted(a + b))] += x * y
    return found


def ordered(factors: Mapping[tuple[str, ...], int]) -> Expression:
    """The sum of products, high powers of the first symbols first, as sympy writes it."""
    names = sorted({symbol for product in factors for symbol in product})
    products = sorted((p for p, n in factors.items() if n), key=lambda p: [-p.count(name) for name in names])
    return Expression(tuple((p, factors[p]) for p in products))


@lru_cache(maxsize=4096)
def parse(dim: Dim) -> Expression:
    """The expression that a size is. Raises ValueError for text that is none."""
    if isinstance(dim, int):
        return ordered({(): dim})
    found = list(tokens(dim))
    if not SUM.fullmatch("".join(kind for kind, _ in found)):
        raise ValueError(f"'{dim}' is no size")
    terms: list[tuple[list[str], int]] = [] if found[0][0] == "i" else [([], 1)]
    for kind, text in found:
        match kind:
            case "i":
                terms.append(([], -1 if text == "-" else 1))
            case "n":
                terms[-1] = (terms[-1][0], terms[-1][1] * int(text))
            case "s":
                terms[-1][0].append(text)
            case "p":
                terms[-1][0].extend(terms[-1][0][-1:] * (int(text) - 1))
    factors: Counter[tuple[str, ...]] = Counter()
    for product, factor in terms:
        factors[tuple(sorted(product))] += factor
    return ordered(factors)


def tokens(text: str) -> Iterator[tuple[str, str]]:
    """The kinds and texts of a size's parts. Raises ValueError."""
    at = 0
    while at < len(text):
        token = TOKEN.match(text, at)
        if token is None:
            raise ValueError(f"'{text}' is no size")
        kind, found = next((k, v) for k, v in token.groupdict().items() if v)
        end = token.end()
        if kind == "b":
            kind, end = "s", closed(text, end)
            found = text[at:end].replace(" ", "")
        yield kind, found
        at = end


def closed(text: str, at: int) -> int:
    """Where the bracket that was opened before ends. Raises ValueError."""
    depth = 1
    while depth:
        if at == len(text):
            raise ValueError(f"'{text}' is no size: a bracket is open")
        depth += {"(": 1, ")": -1}.get(text[at], 0)
        at += 1
    return at


def resolve(dim: Dim, sizes: Mapping[str, int]) -> int:
    """The value of a size, e.g. resolve("4*B", {"B": 2}) == 8. Raises KeyError for an unknown symbol."""
    if isinstance(dim, int):
        return dim
    return sizes[dim] if dim in sizes else int(parse(dim).at(sizes))


def symbols(dim: Dim) -> set[str]:
    """The symbols of a size."""
    return parse(dim).symbols()


def replaced(dim: Dim, given: Mapping[str, Dim]) -> Dim:
    """The size with others in place of symbols."""
    return parse(dim).subs(given).dim()


def solved(dim: Dim, size: int) -> dict[str, int]:
    """What the symbol is of an expression such as "B", "2*B" or "T+1" that has that size; {} for other expressions."""
    (product, factor), *rest = parse(dim).terms or [((), 0)]
    offset = dict(rest).get((), 0)
    return {product[0]: (size - offset) // factor} if len(product) == 1 and len(rest) == (offset != 0) else {}
