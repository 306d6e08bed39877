"""What `aropt optimize` is asked for, checked before a model is loaded: names that there are, files that are there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from aropt.errors import UsageError
from aropt.frontend.directory import no_model
from aropt.frontend.sources import findable
from aropt.loops.rules import PROCESSORS
from aropt.loops.scheme import kinds
from aropt.loops.unmask import commit
from aropt.pipeline.registry import pass_class
from aropt.targets import check_target


def check_names(target: str, loop: str | None, rules: Iterable[str], guide: str | None, printed: Iterable[str]) -> None:
    """Raises UsageError for a name that there is not. `printed`: passes after which the program is shown, or "all"."""
    rule_names = (*PROCESSORS, *commit.KNOWN)
    check_target(target)
    for kind, option, given, known in (
        ("rule", "--rule", rules, rule_names), ("loop", "--loop", [loop] if loop else [], kinds()),
    ):  # fmt: skip
        for name in given:
            if name not in known:
                raise UsageError(what=f"unknown {kind} '{name}'", where=option, hint="choose from " + ", ".join(known))
    for name in set(printed) - {"all"}:
        pass_class(name)
    if guide is not None and not findable(guide):
        raise no_model(guide)


def check_paths(examples: Path | None, prompts: Path | None, dump_dir: Path | None) -> None:
    """Raises UsageError for a file that is not there, and for a folder that is a file."""
    for option, path in (("--examples", examples), ("--prompts", prompts)):
        if path is not None and not path.is_file():
            raise UsageError(what=f"no file '{path}'", where=option, hint="give a file with one JSON value a line")
    if dump_dir is not None and dump_dir.exists() and not dump_dir.is_dir():
        raise UsageError(what=f"'{dump_dir}' is no folder", where="--dump-dir", hint="give a folder's path")
