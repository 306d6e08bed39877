"""What is known of a model before it is captured: vocabulary, capacity, prompts, and what it says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aropt.errors import Unsupported, UsageError
from aropt.frontend.export import Limited, export_failure
from aropt.frontend.faithful import check
from aropt.frontend.forwards import HINT, Forward
from aropt.frontend.pt2 import capture_exported
from aropt.frontend.texts import Texts
from aropt.frontend.trace import capture_model
from aropt.ir.limits import SAID
from aropt.ir.program import Graph
from aropt.ir.torch_compat import looped_scans
from aropt.ir.units import window
from aropt.restrict.reach import most_tokens

LONGEST = 2048  # default capacity where the model takes more
UNKNOWN = 512  # and where it does not say
LENGTHS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "capacity",
    "max_target_positions",
)  # fmt: skip


@dataclass
class Source:
    """A model to optimize. `module` runs eagerly; `meta` is what programs carry (vocab, capacity, prompts, ...)."""

    module: nn.Module
    meta: dict[str, Any]
    files: list[Path] = field(default_factory=list)  # configuration, copied into the artifact
    texts: Texts | None = None  # its tokenizer, saved in the artifact
    exported: Any = None  # the ExportedProgram of a .pt2

    def captured(self) -> tuple[Graph, dict[str, Tensor]]:
        """The forward as a graph, and its weights. Raises Unsupported where they don't compute what the module does."""
        asked = self.meta.pop("asked", True)
        graph, weights = self.traced(asked) if self.exported is None else capture_exported(self.exported)
        check(graph, weights, self.module, self.meta)
        return graph, weights

    def traced(self, asked: bool) -> tuple[Graph, dict[str, Tensor]]:
        """The module's forward, for as many tokens as it takes where nobody `asked` for a number of them."""
        capacity, why = int(self.meta["capacity"]), ""
        vocab, row = int(self.meta["input_vocab"]), window(self.meta)
        try:
            graph, weights = capture_model(self.module, vocab, capacity, row)
        except Limited as limit:
            if asked or limit.most < 2:
                raise
            self.meta["capacity"], why = limit.most, limit.why
            graph, weights = capture_model(self.module, vocab, limit.most, row)
        most = most_tokens(graph, weights, int(self.meta["capacity"]))
        if asked and most < capacity:
            raise too_long(capacity, most)
        self.meta["capacity"] = most
        if most < capacity:
            self.meta["limit"] = f"The capacity is {most} tokens: {why or 'its table of positions ends there'}."
        return graph, weights


def facts(module: nn.Module, capacity: int | None) -> dict[str, Any]:
    """Vocabulary and capacity of a model: what it says of itself, else what a short run shows.

    Where it has no prompts, generation begins with the id that config says a text does.
    A module may say `capacity`, `input_vocab`, `null`, `prompts` as attributes; of a canvas `mask`, `block`, `shift`;
    of rows of several ids `unit`, `single` (see aropt.ir.units); of images `side`, `window` (see aropt.cli.pictures);
    `guidance_free` if it was trained to need no guidance (see the pass cfg-eliminate); `draft_mask`, the id whose rows
    predict themselves (see the pass tree-draft).
    """
    check_capacity(capacity)
    config = getattr(module, "config", None)
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config  # of a model that takes texts beside pictures or sounds
    longest = next(
        (v for at in (module, config) for n in LENGTHS if type(v := getattr(at, n, None)) is int and v > 0),
        None,  # -1: any
    )
    if capacity is not None and longest is not None and capacity > longest:
        raise too_long(capacity, longest)
    vocab = logits_size(module)
    known = getattr(module, "input_vocab", None) or getattr(config, "vocab_size", None) or vocab
    begin = getattr(config, "bos_token_id", None)
    begin = begin if type(begin) is int and 0 <= begin < int(known) else min(1, int(known) - 1)
    prompts = getattr(module, "prompts", None) or [[begin]]
    found: dict[str, Any] = {
        "vocab": vocab,
        "input_vocab": int(known),
        "capacity": capacity or min(longest or UNKNOWN, LONGEST),
        "asked": capacity is not None,
        "prompts": [list(map(int, p)) for p in prompts],
    }
    return {**found, **said(module)}


def said(module: nn.Module) -> dict[str, Any]:
    """What a module says of itself as attributes: see `facts`."""
    found = {name: getattr(module, name, None) for name, _ in SAID}
    return {name: found[name] for name, kind in SAID if type(found[name]) is kind}  # not a submodule, a table, ...


def check_capacity(capacity: int | None) -> None:
    """Raises UsageError where no sequence fits: of one length alone, none could be captured as any length."""
    if capacity is not None and capacity < 2:
        raise UsageError(
            what=f"capacity {capacity} leaves no room",
            where="--capacity, capacity= in Python",
            why="a sequence has a token of the prompt, and a new one",
            hint="give a number of tokens, or leave it out for what the model takes",
        )


def too_long(capacity: int, most: int) -> UsageError:
    return UsageError(
        what=f"capacity {capacity} is more than the model takes",
        where="--capacity, capacity= in Python",
        why=f"its positions end at {most}",
        hint=f"use --capacity {most} or less",
    )


def logits_size(module: nn.Module) -> int:
    """The last dimension of the logits of a short run. Raises Unsupported unless there is a row of them for each id."""
    unit = getattr(module, "unit", None)
    row = (unit,) if type(unit) is int else ()
    try:
        with torch.no_grad(), looped_scans():
            logits = Forward(module)(torch.zeros(1, 2, *row, dtype=torch.int64))
    except Unsupported:
        raise
    except Exception as error:  # the user's code may raise anything
        raise export_failure(error) from error
    if logits.dim() != 3 + len(row):
        raise Unsupported(
            what="the forward does not return logits",
            why=f"its result has shape {list(logits.shape)}",
            hint=HINT,
        )
    return int(logits.shape[-1])
