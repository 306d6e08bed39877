"""torch.export of a model's forward for any length, and what it says where it fails, in words of the model's owner."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from aropt.errors import Unsupported
from aropt.frontend.decompositions import TABLE
from aropt.frontend.looping import looping
from aropt.frontend.scans import untraced
from aropt.ir.torch_compat import size_at, size_conditions

GROUPED = "TRANSFORMERS_SDPA_FORCE_GQA"  # transformers then leaves groups of heads to SDPA
BATCHES = (1, 3, 5)  # beside 2
NOT_STATED = "the forward fixes the sequence length or the batch"


def export_forward(
    module: nn.Module, example: torch.Tensor, capacity: int
) -> tuple[ExportedProgram, list[tuple[int, int]]]:
    """The export of forward(ids[B, T]), and those batches and lengths up to the capacity that torch can't speak for.

    torch assumes of sizes what it can't prove ("min(64, 64 * T) is 64"); each assumption is held against all lengths.
    Raises Unsupported where one fails for more than two lengths, or torch refuses.
    """
    shapes = ({0: Dim("B"), 1: Dim("T", max=capacity)},)
    try:
        exported = deferring(module, (example,), shapes)
    except Exception as error:  # torch.export raises anything that a model's code does
        if (scan := untraced(error, module)) is not None:
            raise scan from error
        if "scaled_dot_product_attention" not in (user_frame(error) or ""):
            raise named(export_failure(error), module, example, capacity) from error
        with grouped():
            try:
                exported = deferring(module, (example,), shapes)
            except Exception:  # the first attempt's reason is the one that counts
                raise export_failure(error) from error
    failing: set[tuple[int, int]] = set()
    for condition in size_conditions(exported):
        wrong = [(2, n) for n in range(1, capacity + 1) if not size_at(condition, exported, 2, n)]
        failing |= {*wrong, *((b, 3) for b in BATCHES if not wrong and not size_at(condition, exported, b, 3))}
        if sum(batch == 2 for batch, _ in failing) > 2:
            raise limited(f"{condition} is not true of them, which its graph would take for granted", wrong[0][1] - 1)
    with torch.no_grad(), quiet():
        return exported.run_decompositions(TABLE), sorted(failing)


def named(failure: Unsupported, module: nn.Module, example: torch.Tensor, capacity: int) -> Unsupported:
    """The failure with the module that loops over the sequence, if that is what it is."""
    found = looping(module, example, capacity) if failure.what == NOT_STATED else None
    if found is None:
        return failure
    where, grows = found
    return Unsupported(
        what="a module mixes the sequence in a loop that has no graph for all lengths",
        where=where.removeprefix("model."),
        why=f"{grows}; it is none of the recurrences that aropt knows",
        hint="write the loop with torch's scan, or as one op: docs/adding_a_mixer.md",
    )


def deferring(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """torch.export, with what torch assumes of sizes written into the graph as assertions."""
    with torch.no_grad(), quiet():
        return torch.export.export(
            module, args, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True
        )


@contextlib.contextmanager
def grouped() -> Iterator[None]:
    """transformers gives SDPA the groups of heads as in a plain run without a mask, where it would repeat them.

    Latent attention (MLA) has keys for each head, whatever the configuration says of groups: repeated they don't fit.
    """
    before = os.environ.get(GROUPED)
    os.environ[GROUPED] = "1"
    try:
        yield
    finally:
        os.environ.pop(GROUPED) if before is None else os.environ.update({GROUPED: before})


def export(module: nn.Module, args: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """torch.export, made functional, without decompositions but those of `decompositions`."""
    try:
        with torch.no_grad(), quiet():
            exported = torch.export.export(module, args, dynamic_shapes=shapes, strict=False)
            made: ExportedProgram = exported.run_decompositions(TABLE)
            return made
    except Exception as error:  # torch.export raises anything that a model's code does
        raise export_failure(error) from error


@contextlib.contextmanager
def fixed_rotary(model: nn.Module, capacity: int) -> Iterator[None]:
    """Frequencies of transformers' dynamic rotary scaling as constants, which they are up to the model's own length.

    Raises Unsupported for a capacity beyond.
    """
    found: list[tuple[Any, Any, dict[str, Any]]] = []
    parts: list[Any] = list(model.modules())
    for module in parts:
        kinds = getattr(module, "rope_type", None)
        named = {"": kinds} if isinstance(kinds, str) else kinds if isinstance(kinds, dict) else {}
        scaled = {f"{layer}_" if layer else "": kind for layer, kind in named.items() if "dynamic" in str(kind)}
        if scaled and hasattr(module, "original_max_seq_len"):
            if capacity > module.original_max_seq_len:
                raise limited(
                    "dynamic rotary scaling changes all positions with the length", module.original_max_seq_len
                )
            found.append((module, kinds, {f"{p}inv_freq": getattr(module, f"{p}inv_freq") for p in scaled}))
    for module, kinds, tables in found:
        module.rope_type = "default" if isinstance(kinds, str) else dict.fromkeys(kinds, "default")
        for name in tables:
            setattr(module, name, getattr(module, name.removesuffix("inv_freq") + "original_inv_freq").clone())
    try:
        yield
    finally:
        for module, kinds, tables in found:
            module.rope_type = kinds
            for name, table in tables.items():
                setattr(module, name, table)


class Limited(Unsupported):
    """The forward is another function for long sequences; `most` tokens can be captured."""

    most = 0


def limited(why: str, most: int) -> Limited:
    """What to tell of a forward that is another function for long sequences."""
    error = Limited(
        what="the forward computes something else for long sequences",
        where=f"sequences of more than {most} tokens",
        why=why,
        hint=f"use --capacity {most} or less" if most > 1 else "avoid branches on the length",
    )
    error.most = most
    return error


def export_failure(error: Exception) -> Unsupported:
    """Names the user's line and the op of a failed export."""
    text = str(error)
    where = user_frame(error) or "forward"
    if "ConstraintViolation" in type(error).__name__ or "Constraints violated" in text or "specialized" in text:
        most = re.search(r"T = Dim\('T',.* max=(\d+)\)", text)
        if most:
            return limited(torch_reason(text, "- "), int(most[1]))
        return Unsupported(
            what=NOT_STATED,
            where=where,
            why=torch_reason(text, "- "),
            hint="avoid int(x.shape[1]), loops over the length and lengths stored in the module",
        )
    if "data-dependent" in text or "unbacked" in text.lower():
        return Unsupported(
            what="the forward branches on the values of a tensor",
            where=where,
            why=torch_reason(text, "data-dependent", "guard on"),
            hint="replace `if tensor:` and `.item()` by torch.where or torch.cond",
        )
    return Unsupported(
        what="the forward can't be exported",
        where=where,
        why=f"{type(error).__name__}: {torch_reason(text)}",
        hint="run torch.export.export(model, (ids,)) alone to see the whole trace, or -vv here",
    )


def torch_reason(text: str, *marks: str) -> str:
    """torch's own reason: the first line with one of the marks, else the first; sizes and fake tensors in words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    line = next((line for mark in marks for line in lines if mark in line), lines[0]).removeprefix("- ")
    line = re.sub(r"L\['\w+'\]\.size\(\)\[(\d)\]", lambda m: "BT"[min(int(m[1]), 1)], line)
    line = re.sub(r"FakeTensor\(\.\.\.,[^()]*size=\(([^()]*)\)[^()]*\)", r"[\1]", line)
    return line.replace("T = T in the specified range", "T in the range")[:300]


def user_frame(error: BaseException) -> str | None:
    """file:line of the innermost frame outside torch and aropt, with the source line."""
    own, torch_dir = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if not f.filename.startswith((own, torch_dir)) and "<" not in f.filename]
    if not outside:
        return None
    frame = outside[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"


@contextlib.contextmanager
def batched_experts(model: nn.Module) -> Iterator[None]:
    """Makes transformers' mixtures of experts compute without data-dependent shapes, where the model has the choice."""
    change = getattr(model, "set_experts_implementation", None)
    if change is None:
        yield
        return
    before = model.get_experts_implementation()  # type: ignore[operator]
    change("batched_mm")
    try:
        yield
    finally:
        change(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences torch's exporters: their warnings and dumps speak of internals."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
