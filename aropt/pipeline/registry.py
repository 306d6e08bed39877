"""Which passes there are, in which order they run, and how one is made of text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from aropt.errors import UsageError
from aropt.rewriting.contract import Pass, broken

PASSES = {
    "token-shuffle": "token_shuffle",
    "canonicalize": "canonicalize",
    "int8-linears": "int8_linears",
    "cfg-eliminate": "cfg_eliminate",
    "cfg-interval": "cfg_interval",
    "cfg-batch": "cfg_batch",
    "kv-cache": "kv_cache",
    "prefix-cache": "prefix_cache",
    "dual-cache": "dual_cache",
    "free-cache": "free_cache",
    "dkv-cache": "dkv_cache",
    "vicinity": "vicinity",
    "block-cache": "block_cache",
    "guide-cache": "guide_cache",
    "token-shuffle-fusion": "token_shuffle_fusion",
    "merge-linears": "merge_linears",
    "fuse-attention": "fuse_attention",
    "ngram-draft": "ngram_draft",
    "int8-draft": "int8_draft",
    "fuse-canvas": "fuse_canvas",
    "fuse-rules": "fuse_rules",
    "fuse-sampler": "fuse_sampler",
    "prune": "prune",
}  # name -> module, in pipeline order
# Only where --pass names them: lossy or retrained ones, and those that give something up for what the caller knows of.
ASKED = (
    "token-shuffle", "int8-linears", "cfg-eliminate", "cfg-interval",
    "prefix-cache", "dual-cache", "free-cache", "dkv-cache", "vicinity", "ngram-draft",
    "int8-draft", "fuse-rules",
)  # fmt: skip
# Of these, applied too where that is found to be faster (aropt.pipeline.autotune), in one of these ways.
TRIED: dict[str, list[dict[str, str]]] = {"int8-draft": [{"drafts": "8"}, {"drafts": "16"}], "ngram-draft": [{}]}
REFRESHES = (16, 8, 4, 2)  # what is tried while the budget is missed; 1 would save nothing
PIPELINE = tuple(name for name in PASSES if name not in ASKED)


def pass_class(name: str) -> Any:
    """The pass of that name. Raises UsageError for an unknown one, and for a file that holds no pass."""
    if name not in PASSES:
        raise UsageError(what=f"unknown pass '{name}'", hint="aropt passes lists them: " + ", ".join(PASSES))
    try:
        found = import_module(f"aropt.passes.{PASSES[name]}").PASS
        lacking = [part for part in ("name", "contract", "plan", "run") if not hasattr(found, part)]
        if lacking or not dataclasses.is_dataclass(found):
            raise TypeError(f"PASS is no dataclass with {', '.join(lacking) or 'its options as fields'}")
    except Exception as error:  # whatever its author wrote
        raise broken(name, f"passes/{PASSES[name]}.py", error) from error
    return found


def make(name: str, options: dict[str, str] | None = None) -> Pass:
    """A pass with its options, given as text. Raises UsageError for an unknown option or a bad value."""
    cls = pass_class(name)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, text in (options or {}).items():
        if key not in fields:
            raise UsageError(
                what=f"the pass '{name}' has no option '{key}'", hint="its options: " + (", ".join(fields) or "none")
            )
        default: Any = fields[key].default
        try:
            values[key] = (
                {"true": True, "false": False}[text.lower()] if isinstance(default, bool) else type(default)(text)
            )
        except (ValueError, KeyError):
            raise UsageError(
                what=f"'{text}' is no value for {name}:{key}", hint=f"give a {type(default).__name__}, as {default}"
            ) from None
    made: Pass = cls(**values)
    return made


def parse(text: str) -> tuple[str, dict[str, str]]:
    """ "name:k=v,k=v" -> (name, options)."""
    name, _, rest = text.partition(":")
    pairs = [p.partition("=") for p in rest.split(",") if p]
    wrong = [k for k, eq, _ in pairs if not eq]
    if wrong:
        raise UsageError(
            what=f"'{wrong[0]}' is not an option", where=f"--pass {text}", hint="write NAME:option=value,option=value"
        )
    return name, {k: v for k, _, v in pairs}


def pipeline(chosen: Iterable[str] = (), dropped: Iterable[str] = ()) -> list[Pass]:
    """The default passes and those of `chosen` ("name:k=v"), without `dropped`, in the order of PASSES."""
    options = dict(parse(text) for text in chosen)
    dropped = set(dropped)
    for name in (*options, *dropped):
        pass_class(name)
    return [
        make(name, options.get(name))
        for name in PASSES
        if name not in dropped and (name in PIPELINE or name in options)
    ]


def untold(chosen: Iterable[str] = (), dropped: Iterable[str] = ()) -> list[list[Pass]]:
    """The passes of TRIED that the caller neither wants nor declines, each in its ways."""
    told = {parse(text)[0] for text in chosen} | set(dropped)
    return [[make(name, options) for options in ways] for name, ways in TRIED.items() if name not in told]
