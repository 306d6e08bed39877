"""What a loop, a graph or a value means is data: code outside loops/ does not tell them apart by their names.

Loops' kinds are asked for nowhere, names of graphs and values in loops/ and targets/ alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.support.layout import modules

KINDS = {"unmask", "speculate", "draft", "positions"}


def outside(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Modules that are not in these folders, and their syntax."""
    for module, file in modules().items():
        if not module.startswith(folders):
            yield module, ast.parse(file.read_text())


def strings(node: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def kinds_asked(tree: ast.AST) -> list[str]:
    """Where a loop's kind is compared, looked for or read from meta."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and any(ends_in(n, "kind") for n in ast.walk(node)):
            found += strings(node) & KINDS
        if isinstance(node, ast.Call) and ends_in(node.func, "loops"):
            found += [str(n.value) for n in node.args[1:] if isinstance(n, ast.Constant)]
        if isinstance(node, ast.Call) and ends_in(node.func, "Loop"):
            found += strings(node) & KINDS
        if isinstance(node, ast.Subscript) and "loop" in strings(node.slice):
            found.append("loop")
        if isinstance(node, ast.Call) and ends_in(node.func, "get") and node.args and strings(node.args[0]) == {"loop"}:
            found.append("loop")
    return found


def ends_in(node: ast.AST, name: str) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == name) or (isinstance(node, ast.Name) and node.id == name)


def graphs_asked(tree: ast.AST) -> int:
    """Comparisons of a call's graph, and look-ups of a graph, by a name that stands there."""
    compared = [n for n in ast.walk(tree) if isinstance(n, ast.Compare) and strings(n)
                and any(ends_in(x, "graph") for x in ast.walk(n))]  # fmt: skip
    looked_up = [n for n in ast.walk(tree) if isinstance(n, ast.Subscript) and ends_in(n.value, "graphs")
                 and isinstance(n.slice, ast.Constant)]  # fmt: skip
    return len(compared) + len(looked_up)


def values_asked(tree: ast.AST) -> int:
    """Tests whether a program has an input, a state or a value of a name that stands there."""
    held = ("inputs", "values", "state", "outputs")
    return sum(
        isinstance(n, ast.Compare) and isinstance(n.ops[0], (ast.In, ast.NotIn)) and isinstance(n.left, ast.Constant)
        and any(ends_in(n.comparators[0], name) for name in held) for n in ast.walk(tree)
    )  # fmt: skip


def test_nobody_outside_asks_for_a_kind_of_loop() -> None:
    known = {"ir.limits": "it checks that what is read there is a name"}
    found = {module: kinds for module, tree in outside("loops") if (kinds := kinds_asked(tree))}
    assert found.keys() - known.keys() == set(), found


def test_nobody_outside_asks_for_a_graph_or_a_value_by_name() -> None:
    found = {m: (graphs_asked(tree), values_asked(tree)) for m, tree in outside("loops", "targets")}
    assert {module: counts for module, counts in found.items() if any(counts)} == {}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ('loop.kind == "unmask"', 1), ('loops(program.control, "speculate")', 1), ('meta.get("loop")', 1),
        ('Loop("draft", until, body)', 1), ('program.meta["loop"]', 1), ("loops(program.control)", 0),
        ('state.kind in ("append-kv",)', 0),
    ],
)  # fmt: skip
def test_it_sees_what_it_looks_for(text: str, asked: int) -> None:
    assert len(kinds_asked(ast.parse(text))) == asked
