"""The page of all systems, docs/systems.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aropt.recipes import FOLDER, names, recipe

PAGE = FOLDER.parent.parent / "docs" / "systems.md"
HEAD = """# Systems

Each section is a system of the literature in small: a file of `aropt/recipes/`, plain PyTorch, with a check that
measures what is claimed. `aropt recipes` lists them, `aropt recipes run NAME` measures one again. Models and data are
proxies, as each section says: what is measured of mechanisms (equal ids, ids a forward) is of these models alone, and
says nothing of the quality or the speed of the paper's. This page is written by `python -m aropt.recipes` from the
committed results.
"""


def page(found: Mapping[str, Any]) -> str:
    """Markdown, from the results of `aropt.recipes.results`."""
    parts = [HEAD]
    for name in names():
        one = recipe(name)
        parts.append(f"## {name}: {one.title}\n\n{one.paper}. {one.runs}.\n\nProxy: {one.proxy}\n")
        parts.append(table(found[name]) if name in found else "Not measured yet.\n")
    return "\n".join(parts)


def table(result: Mapping[str, Any]) -> str:
    lines = ["| claim | measured | on | holds |", "| --- | --- | --- | --- |"]
    for row in result["rows"]:
        cells = (row["claim"], row["measured"], f"{row['n']} {row['of']}", "yes" if row["holds"] else "**no**")
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    return "\n".join(lines) + f"\n\nMeasured with {versions}.\n"
