"""What `aropt optimize` is asked for, checked before a model is loaded: names that there are, files that are there."""

from __future__ import annotations

from aropt.cli.drafts import asked_drafts
from aropt.cli.options import Doing, Reading, Writing
from aropt.errors import UsageError
from aropt.frontend.directory import no_model
from aropt.frontend.sources import findable
from aropt.loops.rules import PROCESSORS
from aropt.loops.scheme import kinds
from aropt.loops.unmask import commit
from aropt.pipeline.registry import pass_class
from aropt.targets import check_target


def check(read: Reading, do: Doing, write: Writing) -> None:
    """Raises UsageError for a name or a file that there is not, and for a folder that is a file."""
    check_target(do.target)
    for kind, option, given, known in (
        ("rule", "--rule", read.rule or [], (*PROCESSORS, *commit.KNOWN)),
        ("loop", "--loop", [read.loop] if read.loop else [], kinds()),
    ):
        for name in given:
            if name not in known:
                raise UsageError(what=f"unknown {kind} '{name}'", where=option, hint="choose from " + ", ".join(known))
    for name in set(write.print_after or ()) - {"all"}:
        pass_class(name)
    if read.guide is not None and not findable(read.guide):
        raise no_model(read.guide)
    for model in asked_drafts(do):
        if not findable(model):
            raise no_model(model)
    for option, path in (("--examples", read.examples), ("--prompts", read.prompts)):
        if path is not None and not path.is_file():
            raise UsageError(what=f"no file '{path}'", where=option, hint="give a file with one JSON value a line")
    if write.dump_dir is not None and write.dump_dir.exists() and not write.dump_dir.is_dir():
        raise UsageError(what=f"'{write.dump_dir}' is no folder", where="--dump-dir", hint="give a folder's path")
