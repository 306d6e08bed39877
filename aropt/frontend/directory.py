"""What a model directory says of itself, before its weights are read: what aropt can't take is refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from aropt.errors import AroptError, Unsupported, UsageError

MERGE = "merge it first: peft's AutoPeftModelForCausalLM.from_pretrained(DIR).merge_and_unload().save_pretrained(NEW)"
WHOLE = "give the model before its quantization, or from_pretrained(DIR).dequantize().save_pretrained(NEW)"
FACTORY = "write a factory for the part that writes text: aropt optimize model.py:factory"
QUANTIZED = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # ModelOpt, AutoGPTQ, AutoAWQ
QUANTIZES = ("quantization_config", "compression_config", "quantization")  # of config.json; the last is MLX's
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = {".h5": "TensorFlow's", ".msgpack": "Flax's", ".onnx": "ONNX", ".npz": "NumPy's"}
SAFE = "save the model again: model.save_pretrained(NEW)"


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


def no_model(name: str) -> AroptError:
    """What to tell of a name that is neither a reference model nor a directory, file.py:factory or .pt2."""
    path = Path(name)
    if path.suffix == ".gguf":
        return gguf(path)
    if path.is_file():
        return UsageError(
            what=f"'{name}' is a file, not a model directory",
            why="weights alone do not say what the model is: that is in config.json",
            hint=f"give its directory: {path.parent}",
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.parent.exists():
        return UsageError(
            what=f"no directory '{name}'",
            why="it looks like a model of the Hugging Face hub, and aropt downloads nothing",
            hint=f"hf download {name} --local-dir {path.name}, then give {path.name}",
        )
    from aropt.models import REFERENCES

    return UsageError(
        what=f"no model '{name}'",
        why="it is neither a reference model, a directory, file.py:factory, nor a .pt2 file",
        hint="aropt models lists the reference models; reference models: " + ", ".join(REFERENCES),
    )


def gguf(path: Path) -> Unsupported:
    return Unsupported(
        what="aropt takes no GGUF files",
        where=str(path),
        why="they hold llama.cpp's form of a model, mostly quantized, and no module to capture",
        hint="give the directory that it was converted from: config.json and safetensors",
    )


def without_config(path: Path) -> AroptError:
    """What to tell of a directory that has no config.json, by what it has."""
    names = {file.name for file in path.iterdir()}
    below = sorted(file.parent.name for file in path.glob("*/config.json"))
    if names & set(ADAPTERS):
        return adapter(path)
    if found := sorted(path.glob("*.gguf")):
        return gguf(found[0])
    if {"manifest.json", "program.json"} <= names:
        return UsageError(
            what=f"'{path}' is an artifact that aropt made", hint=f"aropt run {path}, or give the model it was made of"
        )
    if "model_index.json" in names:
        why = "model_index.json says that it is a pipeline of Diffusers, of several models"
    elif "params.json" in names:
        why = "it is in its author's own format (params.json), and config.json is missing"
    else:
        why = "config.json is missing"
    return UsageError(
        what=f"'{path}' is not a model directory",
        where=str(path / "config.json"),
        why=why,
        hint=f"give one of those in it: {', '.join(below)}" if below else "give a directory written by save_pretrained",
    )


def without_weights(path: Path) -> AroptError:
    """What to tell of a directory without weights in safetensors, by what it has."""
    if found := sorted(path.glob("*.gguf")):
        return gguf(found[0])
    pickled = sorted(f.name for f in path.iterdir() if f.suffix in PICKLED)
    other = sorted(f.name for f in path.iterdir() if f.suffix in OTHERS)
    why = "aropt never loads pickled weights"
    if pickled:
        why = f"{pickled[0]} is a pickle, and a pickle runs any code when it is loaded"
    elif other:
        why = f"{other[0]} holds {OTHERS[Path(other[0]).suffix]} weights"
    return UsageError(what="no weights in safetensors", where=str(path), why=why, hint=SAFE)


def adapter(path: Path) -> Unsupported:
    """What to tell of an adapter: weights that change another model's."""
    file = path / "adapter_config.json"
    said = read_json(file) if file.is_file() else {}
    base = f" of '{said['base_model_name_or_path']}'" if said.get("base_model_name_or_path") else ""
    return Unsupported(
        what=f"the directory holds an adapter{base}",
        where=str(next(path / name for name in ADAPTERS if (path / name).exists())),
        why=f"its weights ({said.get('peft_type', 'LoRA')}) change a model's, which alone writes other text",
        hint=MERGE + ", or take its files out of the directory to have the model without it",
    )


def quantization(said: Any, where: str = "config.json") -> tuple[str, str] | None:
    """Where a configuration, or one nested in it, says that weights are quantized, and how."""
    if not isinstance(said, dict):
        return None
    for name in QUANTIZES:
        if said.get(name):
            kind = said[name].get("quant_method") if isinstance(said[name], dict) else None
            return f"{where}: {name}", str(kind or "codes")
    nested = (quantization(value, f"{where}: {name}") for name, value in said.items() if name.endswith("_config"))
    return next((found for found in nested if found), None)


def check_quantized(path: Path, config: dict[str, Any]) -> None:
    """Raises Unsupported where the directory says that its weights are codes with scales."""
    found = quantization(config)
    for name in QUANTIZED:
        if found is None and (path / name).exists():
            said = read_json(path / name)
            inner = said.get("quantization")
            kind = inner.get("quant_algo") if isinstance(inner, dict) else said.get("quant_method")
            found = name, str(kind or f"{said.get('bits', said.get('w_bit', 'a few'))} bits")
    if found is not None:
        raise Unsupported(
            what=f"the weights are quantized ({found[1]})",
            where=f"{path}, {found[0]}",
            why="aropt captures the model's own arithmetic, and would take codes for weights",
            hint=WHOLE,
        )


def tasks(name: str) -> set[str]:
    """What transformers' class of that name is for: "CAUSAL_LM", "MASKED_LM", ..., "" for a model without a head."""
    from transformers.models.auto import modeling_auto

    found = set()
    for mapping, classes in vars(modeling_auto).items():
        if mapping.endswith("_MAPPING_NAMES") and isinstance(classes, dict):
            values = {v for value in classes.values() for v in (value if isinstance(value, (tuple, list)) else [value])}
            if name in values:
                found.add(mapping.removesuffix("_MAPPING_NAMES").removeprefix("MODEL").removeprefix("_FOR_"))
    return found


def check_class(path: Path, config: dict[str, Any], loaded: Any, masked: bool) -> None:
    """Raises Unsupported or UsageError where what config.json names writes no text alone, or in another loop.

    `loaded` is the same configuration as transformers completes it.
    """
    if getattr(loaded, "is_encoder_decoder", False):
        raise Unsupported(
            what=f"{loaded.model_type} is an encoder-decoder",
            where=str(path / "config.json"),
            why="its decoder alone is another model: what it writes depends on what the encoder read",
            hint="optimize a decoder-only model, or a decoder saved as one (its ForCausalLM class)",
        )
    names = [str(name) for name in config.get("architectures") or []]
    known = {name: tasks(name) for name in names}
    if not names or not all(known.values()):  # the weights say the rest
        return
    found, name = set().union(*known.values()), names[0]
    if "CAUSAL_LM" in found or (masked and found & {"MASKED_LM", "PRETRAINING"}):
        return
    if found & {"MASKED_LM", "PRETRAINING"} and not found & {"SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT"}:
        raise UsageError(
            what=f"{name} is a masked language model",
            where=str(path / "config.json"),
            why="each of its rows sees all others: it does not write one token after the other",
            hint="unmask a canvas with it: --loop unmask, or loop='unmask' in Python",
        )
    if found <= {"", "TEXT_ENCODING"}:
        why, hint = "it has no language-model head: it returns hidden states", "give a directory of its ForCausalLM"
    else:
        task = sorted(found - {"", "MULTIMODAL_LM", "PRETRAINING"})[0].lower().replace("_", " ")
        why, hint = f"its head is for {task}", FACTORY
    raise Unsupported(what=f"{name} is no language model", where=str(path / "config.json"), why=why, hint=hint)


def check(path: Path, config: dict[str, Any]) -> None:
    """Raises Unsupported, UsageError for adapters and quantized weights."""
    if any((path / name).exists() for name in ADAPTERS):
        raise adapter(path)
    check_quantized(path, config)
