"""Where models come from: a reference model's name, a Hugging Face directory, file.py:factory, or a .pt2."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aropt.errors import MissingTool, Unsupported, UsageError
from aropt.program import Graph
from aropt.trace import capture_exported, capture_model, check_exported, quiet
from aropt.units import window

SAID = (
    ("input_vocab", int), ("null", int), ("mask", int), ("block", int), ("shift", bool), ("unit", int), ("single", int),
    ("side", int), ("window", int), ("guidance_free", bool),
)  # fmt: skip
LONGEST = 2048  # default capacity where the model takes more
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length", "capacity")
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


@dataclass
class Source:
    """A model to optimize. `module` runs eagerly; `meta` is what programs carry (vocab, capacity, prompts, ...)."""

    module: nn.Module
    meta: dict[str, Any]
    files: list[Path] = field(default_factory=list)  # tokenizer and configuration, copied into the artifact
    exported: Any = None  # the ExportedProgram of a .pt2

    def captured(self) -> tuple[Graph, dict[str, Tensor]]:
        """The forward as a graph, and its weights."""
        if self.exported is not None:
            return capture_exported(self.exported)
        vocab, capacity = int(self.meta["input_vocab"]), int(self.meta["capacity"])
        return capture_model(self.module, vocab, capacity, window(self.meta))


def resolve(
    model: str, capacity: int | None = None, trust_remote_code: bool = False, loop: str | None = None
) -> Source:
    """Loads MODEL. Raises UsageError for what isn't there or is damaged, Unsupported for what aropt can't take."""
    from aropt.models import REFERENCES

    check_capacity(capacity)
    path = Path(model)
    if model in REFERENCES:
        return reference(model, capacity)
    if path.is_dir():
        return huggingface(path, capacity, trust_remote_code, loop == "unmask")
    if ".py:" in model:
        return factory(model, capacity)
    if path.suffix == ".pt2" and path.is_file():
        return exported(path, capacity)
    close = "; reference models: " + ", ".join(REFERENCES)
    raise UsageError(
        what=f"no model '{model}'",
        why="it is neither a reference model, a directory, file.py:factory, nor a .pt2 file",
        hint="aropt models lists the reference models" + close,
    )


def reference(name: str, capacity: int | None) -> Source:
    """A reference model with its trained weights."""
    from aropt.models import REFERENCES, load

    found = REFERENCES[name]
    if capacity is not None and capacity > found.capacity:
        raise too_long(capacity, found.capacity)
    module = load(name)
    meta = {
        "name": name,
        "source": name,
        "modality": found.modality,
        "vocab": found.vocab,
        "input_vocab": found.vocab,
        "capacity": capacity or found.capacity,
        "prompts": [list(p) for p in found.prompts],
        "heldout": found.heldout,
    }
    meta |= said(module)
    if found.mask is not None:
        meta |= {"mask": found.mask, "block": found.block, "examples": infilling()}
    files = [f for f in found.checkpoint.iterdir() if f.name in TOKENIZER] if found.checkpoint.is_dir() else []
    if found.mask is not None:  # the bytes of text-ar
        files = sorted(REFERENCES["text-ar"].checkpoint.glob("tokenizer*.json"))
    return Source(module, meta, sorted(files))


def infilling() -> list[dict[str, Any]]:
    """Held-out text with spans to be found, in bytes (written by aropt.models.train_canvas)."""
    from aropt.models import CHECKPOINTS
    from aropt.quality import read

    def encode(text: str) -> list[int]:
        return list(text.encode())

    return read(CHECKPOINTS / "infilling.jsonl", encode, encode)


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


def factory(model: str, capacity: int | None) -> Source:
    """file.py:factory, where factory() returns an nn.Module with forward(ids) -> logits."""
    file, _, name = model.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise UsageError(what=f"no file '{file}'", hint="give a path such as model.py:factory")
    spec = importlib.util.spec_from_file_location("aropt_user_" + path.stem, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded  # dataclasses look their module up
    try:
        with importable(path.resolve().parent):
            spec.loader.exec_module(loaded)
            make = getattr(loaded, name, None)
            module = make() if callable(make) else None
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise UsageError(
            what=f"'{model}' fails",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            hint=f"run it alone: python -c 'import {path.stem}; {path.stem}.{name}()'",
        ) from error
    if make is None:
        raise UsageError(
            what=f"no function '{name}' in {path.name}",
            where=str(path),
            hint="name a function that returns an nn.Module",
        )
    if not isinstance(module, nn.Module):
        raise UsageError(
            what=f"'{name}' does not return an nn.Module",
            where=str(path),
            why=f"it returns {type(module).__name__}",
            hint="return the model itself",
        )
    module = module.float().eval().requires_grad_(False)
    return Source(module, {"name": path.stem, "source": model, "modality": "tokens", **facts(module, capacity)})


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """The modules of a folder can be imported, as by a script in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def exported(path: Path, capacity: int | None) -> Source:
    """A program saved by torch.export.save, its sequence length dynamic."""
    try:
        with quiet():
            program = torch.export.load(path)
    except Exception as error:  # zip, JSON and pickle errors, by what is damaged
        raise UsageError(
            what="the .pt2 file can't be loaded",
            where=str(path),
            why=str(error).splitlines()[0][:300] if str(error) else "",
            hint="write it with torch.export.save",
        ) from error
    check_exported(program)
    module = program.module()
    meta = {"name": path.stem, "source": str(path), "modality": "tokens", **facts(module, capacity or 512)}
    return Source(module, meta, exported=program)


def facts(module: nn.Module, capacity: int | None) -> dict[str, Any]:
    """Vocabulary and capacity of a model: what it says of itself, else what a short run shows.

    A module may say `capacity`, `input_vocab`, `null`, `prompts` as attributes; of a canvas `mask`, `block`, `shift`;
    of rows of several ids `unit`, `single` (see aropt.units); of images `side`, `window` (see aropt.pictures);
    `guidance_free` if it was trained to need no guidance (see the pass cfg-eliminate).
    """
    check_capacity(capacity)
    config = getattr(module, "config", None)
    longest = next(
        (int(v) for source in (module, config) for n in LENGTHS if isinstance(v := getattr(source, n, None), int)), None
    )
    if capacity is not None and longest is not None and capacity > longest:
        raise too_long(capacity, longest)
    vocab = logits_size(module)
    known = getattr(module, "input_vocab", None) or getattr(config, "vocab_size", None) or vocab
    prompts = getattr(module, "prompts", None) or [[min(1, int(known) - 1)]]
    found: dict[str, Any] = {
        "vocab": vocab,
        "input_vocab": int(known),
        "capacity": capacity or min(longest or 512, LONGEST),
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
    from aropt.trace import Forward, export_failure

    unit = getattr(module, "unit", None)
    row = (unit,) if type(unit) is int else ()
    try:
        with torch.no_grad():
            logits = Forward(module)(torch.zeros(1, 2, *row, dtype=torch.int64))
    except Exception as error:  # the user's code may raise anything
        raise export_failure(error) from error
    if logits.dim() != 3 + len(row):
        raise Unsupported(
            what="the forward does not return logits",
            why=f"its result has shape {list(logits.shape)}",
            hint="return logits of shape [batch, length, vocabulary] from forward(ids)",
        )
    return int(logits.shape[-1])
