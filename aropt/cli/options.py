"""What `aropt optimize` is asked for: what to read, what to do, what to write; each field is an option."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from aropt.bench.timing import AGAINST
from aropt.targets import DEFAULT, TARGETS

SEEDS = 2**62 - 1  # the largest
TOKENS = 200  # new tokens of a benchmark, where the model has room
ORDER = (  # of --help
    "model out target draft passes budget examples prompts plugin no_pass rule capacity threads seed runs tokens "
    "against loop guide mask block shift force dry_run explain no_check thorough keep_going bisect print_after "
    "print_diff dump_dir trust_remote_code as_json verbose"
)
Option = typer.Option
Command = Callable[..., None]


def split(values: list[str] | None) -> list[str]:
    """Repeated and comma-separated values as one list."""
    return [part for value in values or [] for part in value.split(",") if part]


ModelArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="A reference model, a Hugging Face directory, file.py:factory or a .pt2.")
]
Remote = Annotated[
    bool, Option("--trust-remote-code", "--trust_remote_code", help="Run Python code that comes with the model.")
]


@dataclass(frozen=True)
class Reading:
    """The model, how it generates, and what comes with it."""

    model: ModelArg
    capacity: Annotated[int | None, Option(help="Tokens of a sequence at most.")] = None
    rule: Annotated[
        list[str] | None,
        Option(
            callback=split,
            help="What sampling can do: temperature, top-k, top-p, min-p, repetition-penalty, bias, guidance, "
            "guidance-interval, suppress-tokens, begin-suppress-tokens, min-new-tokens. "
            "Of a canvas, what a round writes: threshold, factor, segments, or uniform, cosine, "
            "shifted, doubling; probability, margin, entropy; eoser, credit, smooth, rcr, remask; and of a guide: "
            "guide-argmax, -top-k, -relative, -threshold.",
        ),
    ] = None
    loop: Annotated[
        str | None,
        Option(help="How the model generates: positions (one token after another), unmask (a canvas)."),
    ] = None
    guide: Annotated[
        str | None, Option(metavar="MODEL", help="A model that judges what a canvas's rounds would write.")
    ] = None
    mask: Annotated[int | None, Option(min=0, help="The mask id of a canvas, where the model does not say it.")] = None
    block: Annotated[
        int | None, Option(min=0, help="Rows of a block, where rows see their block and those before it; 0: all.")
    ] = None
    shift: Annotated[
        bool | None, Option("--shift/--no-shift", help="Row i of the logits predicts id i + 1 (of a canvas).")
    ] = None
    examples: Annotated[
        Path | None,
        Option(metavar="FILE", help="A task to measure quality on: JSON lines with prompt and answer, texts or ids."),
    ] = None
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="To time it, try drafts, measure drift on: a JSON text or ids a line.")
    ] = None
    trust_remote_code: Remote = False


@dataclass(frozen=True)
class Doing:
    """The passes and the target, how it is validated, and how it is timed."""

    target: Annotated[str, Option(help=", ".join(TARGETS))] = DEFAULT
    passes: Annotated[list[str] | None, Option("--pass", metavar="NAME[:k=v,..]", help="Options for a pass.")] = None
    draft: Annotated[
        str | None,
        Option(metavar="MODEL", help="A smaller model that drafts; kept where the answers come faster so."),
    ] = None
    budget: Annotated[
        str,
        Option(metavar="METRIC=BOUND,..", help="What lossy passes may lose: kl, kl_max, top1, agreement, quality."),
    ] = ""
    no_pass: Annotated[
        list[str] | None, Option("--no-pass", metavar="NAME", callback=split, help="Leave a pass out.")
    ] = None
    threads: Annotated[int | None, Option(min=1, max=1024, help="Threads of the result and of the timing.")] = None
    seed: Annotated[int, Option(min=0, max=SEEDS, help="Seed of the validation's inputs.")] = 0
    runs: Annotated[int, Option(min=0, help="Timed runs of each variant; 0 times nothing.")] = 5
    tokens: Annotated[int, Option(min=1, help="New tokens of a timed run.")] = TOKENS
    against: Annotated[list[str] | None, Option(callback=split, help=f"Time against: {', '.join(AGAINST)}.")] = None
    no_check: Annotated[bool, Option("--no-check", help="Do not validate; the report says so.")] = False
    thorough: Annotated[bool, Option("--thorough", help="Validate on several times as many requests.")] = False
    keep_going: Annotated[
        bool, Option("--keep-going", help="Write the rest where a pass fails (else an internal error).")
    ] = False
    measure: bool = False  # let the target choose by timing even if nothing else is timed


def timed(do: Doing) -> bool:
    """Whether passes and targets may choose by timing."""
    return do.runs > 0 or do.measure


@dataclass(frozen=True)
class Writing:
    """Where the result goes, and what is shown on the way."""

    out: Annotated[Path, Option("--out", "-o", help="The folder to write.")]
    force: Annotated[bool, Option("--force", help="Replace OUT.")] = False
    print_after: Annotated[
        list[str] | None,
        Option(metavar="NAME", callback=split, help="Print the program after a pass, or after all."),
    ] = None
    print_diff: Annotated[bool, Option("--print-diff", help="Print what each pass changed.")] = False
    dump_dir: Annotated[Path | None, Option(help="Write each stage and its diff here.")] = None
    say: Callable[[str], None] = lambda _: None
    show: Callable[[str], None] = lambda _: None


def spread(command: Command) -> Command:
    """The command with an option for each annotated field of the dataclasses that it takes, in ORDER."""
    hints = get_type_hints(command, include_extras=True)
    classes: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}
    found: dict[str, inspect.Parameter] = {}

    def add(name: str, kind: Any, default: Any) -> None:
        found[name] = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    for name, given in inspect.signature(command).parameters.items():
        if name not in classes:
            add(name, hints[name], given.default)
            continue
        kinds = get_type_hints(classes[name], include_extras=True)
        for field in fields(classes[name]):
            if hasattr(kinds[field.name], "__metadata__"):
                empty = inspect.Parameter.empty
                add(field.name, kinds[field.name], empty if field.default is MISSING else field.default)

    @functools.wraps(command)
    def called(**given: Any) -> None:
        parts = {
            name: kind(**{f.name: given.pop(f.name) for f in fields(kind) if f.name in given})
            for name, kind in classes.items()
        }
        command(**parts, **given)

    called.__signature__ = inspect.Signature([found[name] for name in sorted(found, key=ORDER.split().index)])  # type: ignore[attr-defined]
    called.__annotations__ = {name: one.annotation for name, one in found.items()}
    return called
