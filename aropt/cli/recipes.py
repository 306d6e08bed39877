"""aropt recipes: lists the recipes with what was measured of each, and runs one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Annotated, Any

import typer

from aropt.cli.console import Progress
from aropt.errors import VerificationFailed

HEAD = ("claim", "measured", "on", "holds")
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="More detail; -vv shows tracebacks.")]

app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@app.callback()
def listed(context: typer.Context, as_json: Json = False, verbose: Verbose = 0) -> None:
    """List systems of the literature in small, with what was measured of each; `run NAME` measures one."""
    if context.invoked_subcommand is not None:
        return
    found = list(known())
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for one in found:
        show(f"{one['name']}: {one['title']}", f"{one['paper']}. {one['runs']}.", one["rows"])


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of those that `aropt recipes` lists.")],
    quick: Annotated[bool, typer.Option("--quick", help="Measure on fewer examples.")] = False,
    as_json: Json = False,
    verbose: Verbose = 0,
) -> None:
    """Measure what a recipe claims; exits with 3 where a claim does not hold."""
    from aropt.recipes import recipe

    one, rows = recipe(name), list[dict[str, Any]]()
    with Progress() as progress:
        for row in one.check(progress, quick):
            progress(f"{len(rows) + 1} measured: {row.claim}")
            rows.append(asdict(row))
    if as_json:
        print(json.dumps({"name": name, "rows": rows}, indent=1))
    else:
        show(f"{name}: {one.title}", one.paper, rows)
    if wrong := [row["claim"] for row in rows if not row["holds"]]:
        raise VerificationFailed(f"{name} does not do what it claims", why="\n".join(wrong))


def known() -> Iterator[dict[str, Any]]:
    """What there is to say of each recipe; its rows are those of the committed results."""
    from aropt.recipes import names, recipe, results

    measured = results()
    for name in names():
        one, found = recipe(name), measured.get(name, {"versions": {}, "rows": []})
        yield {"name": name, "title": one.title, "paper": one.paper, "runs": one.runs, "proxy": one.proxy, **found}


def show(title: str, below: str, rows: list[dict[str, Any]]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption="" if rows else "not measured yet", title_justify="left")
    for head in HEAD:
        table.add_column(head, ratio=3 if head in HEAD[:2] else 1)
    for row in rows:
        table.add_row(row["claim"], row["measured"], f"{row['n']} {row['of']}", "yes" if row["holds"] else "NO")
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(below + "\n")
