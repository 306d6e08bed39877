"""The modules of aropt, and where they are."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def modules() -> dict[str, Path]:
    """{dotted name below aropt: file}."""
    files = {f for top in ("aropt", "passes", "kernels", "exporters") for f in (ROOT / top).rglob("*.py")}
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removeprefix("aropt.") for f in files}
    found = {name.removesuffix(".__init__"): f for f, name in names.items() if not f.is_symlink()}
    return {name: f for name, f in found.items() if name not in ("aropt", "__init__")}
