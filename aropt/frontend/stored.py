"""The weights that a directory stores, and what became of each when they were loaded: nothing is lost unsaid."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt.errors import Unsupported, UsageError
from aropt.frontend.directory import MERGE, PICKLED, WHOLE, read_json

FLOATS = {"F64", "F32", "F16", "BF16"}
INDEX = "model.safetensors.index.json"
WEIGHTS = (*PICKLED, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx")
SCALES = re.compile(r"scale|zero_point|qzeros|qweight|g_idx|absmax|quant|\.SCB$|amax")


def read_files(path: Path, config: dict[str, Any]) -> list[Path]:
    """The safetensors that transformers reads of a directory. Raises UsageError for one that is missing or damaged."""
    first = config.get("transformers_weights") or ("model.safetensors" if (path / "model.safetensors").exists() else "")
    index = path / (str(first) or INDEX)
    if index.name.endswith(".safetensors"):
        names = [str(first)]
    else:
        held = read_json(index).get("weight_map") if index.exists() else None
        names = sorted(set(map(str, held.values()))) if isinstance(held, dict) else []
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise UsageError(
                what=f"the weights file '{name}' is missing",
                where=str(path),
                why=f"{index.name} names it" if index.name != name else "it is no file of this directory",
                hint="the download may be incomplete; get the checkpoint again",
            )
    return [path / name for name in names]


def stored(files: Iterable[Path]) -> dict[str, str]:
    """Names of the tensors in safetensors files, and their dtypes, as "F32". Raises UsageError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                held = {name: str(opened.get_slice(name).get_dtype()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(
                what="the weights file is damaged",
                where=str(file),
                why=str(error),
                hint="get the file again, and compare its size and hash",
            ) from error
        if twice := sorted(held.keys() & found.keys()):
            raise UsageError(
                what="a weight is stored twice", where=f"{file}, {twice[0]}", why="two files of one model hold it",
                hint="leave the files of one checkpoint alone in the directory",
            )  # fmt: skip
        found |= held
    return found


def account(path: Path, module: nn.Module, held: dict[str, str], info: dict[str, Any]) -> list[str]:
    """What of the stored weights the model does not use because transformers ignores it, as notes.

    `info` is what from_pretrained had to say. Raises Unsupported, UsageError for whatever else was lost: weights that
    are missing, of other shapes, stored as codes, or that the model of config.json doesn't have.
    """
    check_shapes(path, info["mismatched_keys"])
    unexpected, missing = set(info["unexpected_keys"]), sorted(info["missing_keys"])
    if missing:
        raise lacking(path, missing, sorted(unexpected))
    state = module.state_dict()
    ignored = ignores(module, [name for name in held if name not in state])
    codes = [n for n, dtype in held.items() if dtype not in FLOATS and n not in ignored]
    check_codes(path, held, [n for n in codes if n not in state or state[n].is_floating_point()])
    heads = unexpected & other_heads(module) if unexpected else set()
    if lost := sorted(unexpected - heads):
        raise unused(path, lost, type(module).__name__)
    notes = [listed(sorted(heads), "heads of other tasks")] if heads else []
    return notes + ([listed(ignored, "as transformers says")] if ignored else [])


def listed(names: Sequence[str], why: str) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Weights that are not used ({why}): {', '.join(names[:3])}{more}."


def check_shapes(path: Path, mismatched: Iterable[tuple[str, Any, Any]]) -> None:
    """Raises UsageError where a weight has not the shape that config.json says."""
    for name, there, wanted in sorted(mismatched, key=str):
        raise UsageError(
            what="the weights don't have the shapes that config.json says",
            where=f"{path}, {name}",
            why=f"size mismatch: it is stored as {list(there)}, and config.json makes it {list(wanted)}",
            hint="check vocab_size and hidden_size in config.json against the checkpoint",
        )


def check_codes(path: Path, held: dict[str, str], codes: Sequence[str]) -> None:
    """Raises Unsupported where weights are stored as integers or in eight bits."""
    if codes:
        raise Unsupported(
            what="weights are stored as codes",
            where=f"{path}, {codes[0]}",
            why=f"it is of {held[codes[0]]} ({len(codes)} such weights), which says nothing without a scale",
            hint=WHOLE,
        )


def lacking(path: Path, missing: Sequence[str], unexpected: Sequence[str]) -> UsageError:
    """What to tell of weights that the checkpoint hasn't."""
    other = f"; it has others that the model does not, such as {unexpected[0]}" if unexpected else ""
    return UsageError(
        what="the checkpoint lacks weights of its own model",
        where=f"{path}, {missing[0]}",
        why=f"{len(missing)} weights are missing{other}",
        hint=MERGE
        if any("lora_" in name for name in unexpected)
        else "the download or the conversion may be incomplete; get the checkpoint again",
    )


def unused(path: Path, lost: Sequence[str], kind: str) -> Unsupported:
    """What to tell of weights that the model of config.json doesn't have."""
    why, hint = f"a {kind} as config.json says it has no such weights, and would write other text without them", (
        "check config.json against the checkpoint (number of layers, biases, tied or separate heads)"
    )  # fmt: skip
    if any("lora_" in name for name in lost):
        why, hint = "they are an adapter's, and the model without it writes other text", MERGE
    elif any(SCALES.search(name) for name in lost):
        why, hint = "they are scales of quantized weights", WHOLE
    return Unsupported(
        what=f"{len(lost)} stored weights would be lost", where=f"{path}, {', '.join(lost[:3])}", why=why, hint=hint
    )


def ignores(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Those of the names that transformers says its model may leave out."""
    patterns = set(getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = {name.rpartition(".")[2] for name, _ in module.named_buffers()}  # as transformers: once stored, now made
    patterns |= {
        p for b, p in (("inv_freq", r"rotary_emb\.inv_freq"), ("position_ids", r"position_ids$")) if b in buffers
    }
    return sorted(n for n in names if any(re.search(p, n) for p in patterns))


def other_heads(module: nn.Module) -> set[str]:
    """Names of the weights of this model's classes for pretraining: the same backbone, with a pooler, other heads."""
    from transformers import AutoModel, AutoModelForPreTraining

    found: set[str] = set()
    prefix = str(getattr(module, "base_model_prefix", ""))
    for auto, before in ((AutoModelForPreTraining, ""), (AutoModel, prefix + "." if prefix else "")):
        try:
            with torch.device("meta"):
                made = auto.from_config(module.config)
        except Exception:  # there is no such class, or it can't be built: no names from it
            continue
        found |= {before + name for name in made.state_dict()}
    return found


def unread(path: Path, read: Sequence[Path]) -> list[str]:
    """A note on files of weights that are not read because others are."""
    others = sorted(f.name for f in path.iterdir() if f.suffix in WEIGHTS and f not in read)
    names = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    return [f"Files of weights that are not read, beside {read[0].name}: {names}."] if others else []
