"""Models from Hugging Face directories: config.json, weights in safetensors, and what lies beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt.errors import MissingTool, Unsupported, UsageError
from aropt.facts import Source, facts, too_long

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
    "config.json",
)


def huggingface(path: Path, capacity: int | None, trust_remote_code: bool, masked: bool = False) -> Source:
    """A directory that AutoModelForCausalLM (or AutoModelForMaskedLM) loads: config.json and safetensors."""
    try:
        import transformers
    except ImportError as error:
        raise MissingTool(
            what="transformers is not installed", why=str(error), hint="pip install 'aropt[hf]'"
        ) from error
    config_file = path / "config.json"
    if not config_file.is_file():
        raise UsageError(
            what=f"'{path}' is not a model directory",
            where=str(config_file),
            why="config.json is missing",
            hint="give a directory written by save_pretrained",
        )
    read_json(config_file)
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise UsageError(
            what="no weights in safetensors",
            where=str(path),
            why="aropt never loads pickled weights",
            hint="save the model again: model.save_pretrained(dir, safe_serialization=True)",
        )
    for file in weights:
        check_safetensors(file)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    module, info = pretrained(path, trust_remote_code, masked)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UsageError(
            what="the checkpoint lacks weights of its own model",
            where=missing[0],
            why=f"{len(missing)} weights are missing",
            hint="the download or the conversion may be incomplete; get the checkpoint again",
        )
    meta = {"name": path.resolve().name, "source": str(path), **facts(module, capacity), "modality": "text"}
    files = [path / name for name in TOKENIZER if (path / name).is_file()]
    generation = read_json(path / "generation_config.json") if (path / "generation_config.json").is_file() else {}
    ends = generation.get("eos_token_id")
    meta["eos"] = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not (path / "tokenizer.json").is_file():
        meta["modality"] = "tokens"
    if masked:
        meta |= {"mask": mask_id(path, module), "capacity": checked(module, int(meta["capacity"]), capacity)}
    return Source(module.eval().requires_grad_(False), meta, files)


def pretrained(path: Path, trusted: bool, masked: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The model and what loading it had to say. A masked one may also be of the class that config.json names."""
    import transformers

    kinds = [transformers.AutoModelForCausalLM]
    if masked:
        kinds = [transformers.AutoModelForMaskedLM, *named(read_json(path / "config.json"))]
    first: Exception | None = None
    for kind in kinds:
        try:
            return kind.from_pretrained(  # type: ignore[no-any-return]
                path,
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=trusted,
            )
        except Exception as error:  # the model's own code may raise anything
            first = first or error
            if not unrecognized(error):
                break
    assert first is not None
    raise loading_error(path, first, trusted, masked) from first


def named(config: dict[str, Any]) -> list[Any]:
    """Classes that load the architectures of a config.json: transformers' own, or one that finds the model's code."""
    import transformers

    architectures = [str(name) for name in config.get("architectures") or []]
    own = [getattr(transformers, name, None) for name in architectures]
    found = [kind for kind in own if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)]
    code = config.get("auto_map") or {}
    autos = [auto for auto, target in code.items() if str(target).rpartition(".")[2] in architectures]
    return found + [getattr(transformers, auto) for auto in autos if auto.startswith("AutoModel")]


def unrecognized(error: Exception) -> bool:
    """Whether the directory's kind of model is not one of this class."""
    text = str(error)
    return isinstance(error, (KeyError, ValueError)) and ("does not recognize" in text or "Unrecognized" in text)


def checked(module: nn.Module, capacity: int, asked: int | None) -> int:
    """The capacity, shortened to what the model takes. Raises UsageError if more was asked for."""
    most = longest(module, capacity)
    if asked is not None and most < asked:
        raise too_long(asked, most)
    return most


def longest(module: nn.Module, capacity: int) -> int:
    """The most ids that the model takes in fact: RoBERTa's table of positions begins after the padding id.

    Raises Unsupported if it takes neither `capacity` nor what is left after that.
    """
    padding = getattr(module.config, "pad_token_id", None) or 0
    token = 0 if padding else 1  # any id but padding, which RoBERTa does not count
    problem = refusal(module, token, capacity)
    if not problem:
        return capacity
    less = capacity - padding - 1
    if less > 0 and not refusal(module, token, less):
        return less
    raise Unsupported(
        what=f"the model does not take the {capacity} ids that its config.json promises",
        where="config.json",
        why=problem,
        hint="give a smaller --capacity",
    )


def refusal(module: nn.Module, token: int, length: int) -> str:
    """What a forward of so many ids fails with; "" if it runs. Raises MemoryError where there is not enough."""
    try:
        with torch.no_grad():
            module(torch.full((1, length), token))
    except (IndexError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            raise MemoryError(text) from error
        return (text.splitlines() or [type(error).__name__])[0][:300]
    return ""


def mask_id(path: Path, module: nn.Module) -> int | None:
    """The id of the mask token: what config.json says, else the tokenizer's."""
    known = getattr(module.config, "mask_token_id", None)
    if known is None and (path / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        known = AutoTokenizer.from_pretrained(path, local_files_only=True).mask_token_id
    return None if known is None else int(known)


def loading_error(path: Path, error: Exception, trusted: bool, masked: bool) -> Exception:
    """What to tell of a failed from_pretrained."""
    text = str(error)
    if "trust_remote_code" in text and not trusted:
        return UsageError(
            what="the model needs Python code of its own repository",
            where=str(path),
            why="remote code runs only when asked for",
            hint="read that code, then add --trust-remote-code",
        )
    if "size mismatch" in text or "mismatched" in text.lower():
        line = next(
            (x.strip() for x in text.splitlines() if "size mismatch" in x or "mismatch" in x.lower()), text[:200]
        )
        return UsageError(
            what="the weights don't have the shapes that config.json says",
            where=str(path),
            why=line[:300],
            hint="check vocab_size and hidden_size in config.json against the checkpoint",
        )
    if unrecognized(error):
        return Unsupported(
            what=f"transformers can't load this as a {'masked' if masked else 'causal'} language model",
            where=str(path),
            why=text.splitlines()[0][:300],
            hint="write a factory: aropt optimize model.py:factory",
        )
    return UsageError(
        what="the model can't be loaded",
        where=str(path),
        why=(text.splitlines() or [type(error).__name__])[0][:300],
        hint=f"check that AutoModelFor{'MaskedLM' if masked else 'CausalLM'}.from_pretrained loads it",
    )


def check_safetensors(file: Path) -> None:
    """Raises UsageError for a truncated or corrupted file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            opened.keys()
    except (SafetensorError, OSError) as error:
        raise UsageError(
            what="the weights file is damaged",
            where=str(file),
            why=str(error),
            hint="get the file again, and compare its size and hash",
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Raises UsageError where the file is not a JSON object."""
    try:
        data = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise UsageError(
            what=f"'{file.name}' can't be read", where=str(file), why=str(error), hint="check the file"
        ) from error
    if not isinstance(data, dict):
        raise UsageError(
            what=f"'{file.name}' can't be read", where=str(file), why="it is not a JSON object", hint="check the file"
        )
    return data
