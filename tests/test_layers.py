"""Imports point to the left in LAYERS, also those inside functions, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx  # torch needs it

from tests.support.layout import modules

# A module stays in its folder or imports from one to the left; folders of one tuple do not import each other.
LAYERS = (
    ("errors",), ("ir.opdef",), ("kernels",), ("ir",), ("models",), ("restrict",), ("frontend",), ("rewriting",),
    ("loops",), ("passes", "exporters"), ("validate",), ("targets",), ("pipeline",), ("bench",), ("recipes",), ("cli",),
)  # fmt: skip
LEVEL = {folder: i for i, folders in enumerate(LAYERS) for folder in folders}
KERNELS = {"errors", "ir.opdef"}  # what a kernel may import besides kernels: it runs on a bare GPU machine


def imports(known: dict[str, Path]) -> Iterator[tuple[str, str]]:
    """(module, module that it imports), wherever the import stands; those for types alone too."""
    for module, file in known.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "aropt":
                base = (node.module or "").removeprefix("aropt").removeprefix(".")
                for alias in node.names:
                    full = f"{base}.{alias.name}".removeprefix(".")
                    yield module, full if full in known else base
            elif isinstance(node, ast.Import):
                yield from ((module, a.name.removeprefix("aropt.")) for a in node.names if a.name.startswith("aropt."))


def folder(module: str) -> str:
    """The entry of LAYERS that the module belongs to."""
    return module if module in LEVEL else module.split(".")[0]


def against(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Imports that point to the right, or aside."""
    found = set()
    for one, other in edges:
        here, there = folder(one), folder(other)
        if here != there and LEVEL[there] >= LEVEL[here]:
            found.add((one, other))
    return found


def circles(edges: set[tuple[str, str]]) -> set[str]:
    """Modules that import themselves over others."""
    return {m for group in nx.strongly_connected_components(nx.DiGraph(edges)) if len(group) > 1 for m in group}


def edges() -> set[tuple[str, str]]:
    known = modules()
    return {(a, b) for a, b in imports(known) if b in known}


def test_every_module_has_a_layer() -> None:
    assert {folder(m) for m in modules()} <= {*LEVEL, "__main__"}


def test_imports_point_to_the_left() -> None:
    assert against(edges()) == set(), "imports against the layers"


def test_kernels_import_opdef_alone() -> None:
    found = {(a, b) for a, b in edges() if a.startswith("kernels.") and not b.startswith("kernels")}
    assert {b for _, b in found} <= KERNELS


def test_no_circles() -> None:
    assert circles(edges()) == set()


def test_late_imports_and_circles_are_seen() -> None:
    assert against({("ir.a", "loops.b"), ("loops.b", "ir.a"), ("passes.a", "exporters.b")}) == {
        ("ir.a", "loops.b"), ("passes.a", "exporters.b"),
    }  # fmt: skip
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "a")}) == {"a", "b", "c"}
