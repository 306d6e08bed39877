"""Models from Hugging Face directories: config.json, weights in safetensors, and what lies beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from aropt.errors import MissingTool, Unsupported, UsageError
from aropt.frontend.directory import check, check_class, read_json, without_config, without_weights
from aropt.frontend.facts import Source, facts, too_long
from aropt.frontend.generation_config import read_defaults
from aropt.frontend.stored import account, read_files, stored, unread
from aropt.frontend.texts import Texts, model_tokenizer

COPIED = ("generation_config.json", "config.json")
CHOICES = ("attn_implementation", "experts_implementation")
OWN = ("eager", "sdpa", "batched_mm", "grouped_mm")  # implementations that are part of transformers
GENERAL = {
    "_name_or_path",
    "auto_map",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "gradient_checkpointing",
    "task_specific_params",
}


def huggingface(path: Path, capacity: int | None, trust_remote_code: bool, masked: bool = False) -> Source:
    """A directory that AutoModelForCausalLM (or AutoModelForMaskedLM) loads: config.json and safetensors."""
    try:
        import transformers
    except ImportError as error:
        raise MissingTool(
            what="transformers is not installed", why=str(error), hint="pip install 'aropt[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not (path / "config.json").is_file():
        raise without_config(path)
    config = read_json(path / "config.json")
    check(path, config)
    if not trust_remote_code:
        check_implementations(path, config)
    check_class(path, config, configuration(path, trust_remote_code, masked), masked)
    files = read_files(path, config)
    if not files:
        raise without_weights(path)
    held = stored(files)
    module, info = pretrained(path, trust_remote_code, masked)
    left_out = [*account(path, module, held, info), *unread(path, files), *unknown(module.config, config)]
    left_out += others(module.config)
    meta = {"name": path.resolve().name, "source": str(path), **facts(module, capacity), "modality": "text"}
    texts, why = model_tokenizer(path, trust_remote_code)
    left_out += [f"Prompts are token ids: {why}."] if why else []
    own, notes = read_defaults(path, module.config, int(meta["vocab"]))
    meta |= own | {"left_out": left_out + notes}
    if masked:
        meta["defaults"] = {}  # these are of texts that are written one token after the other
    beside = [path / name for name in COPIED if (path / name).is_file()]
    if texts is None:
        meta["modality"] = "tokens"
    meta["prompts"] = first_prompts(module, meta, texts)
    if masked:
        meta |= {"mask": mask_id(module, texts), "capacity": checked(module, int(meta["capacity"]), capacity)}
    return Source(module.eval().requires_grad_(False), meta, beside, texts)


def check_implementations(path: Path, config: Any, name: str = "config.json") -> None:
    """Raises UsageError where a configuration names code that transformers would get from the hub."""
    parts = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for key, value in parts:
        chosen = any(k in str(key) for k in CHOICES) and not (value is None or value in OWN)
        if chosen or (key == "use_kernels" and value):
            raise UsageError(
                what=f"config.json chooses an implementation: {key} is {str(value)[:60]!r}",
                where=f"{path}, {name}",
                why="transformers takes such from the hub, as code, or needs a GPU; aropt runs its own",
                hint="delete the entry from config.json; or read that code, then add --trust-remote-code",
            )
        check_implementations(path, value, f"{name}: {key}")


def configuration(path: Path, trusted: bool, masked: bool) -> Any:
    """The configuration as transformers completes it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # the model's own code may raise anything
        raise loading_error(path, error, trusted, masked) from error


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
                ignore_mismatched_sizes=True,  # told by `account`, with the name
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


def others(config: Any) -> list[str]:
    """A note on the parts of a model that takes more than texts."""
    if config.get_text_config() is config:
        return []
    text = [name for name in vars(config) if getattr(config, name) is config.get_text_config()]
    parts = sorted(name for name in config.sub_configs if name not in text and getattr(config, name, None) is not None)
    verb = "is of a part" if len(parts) == 1 else "are of parts"
    return [f"The program takes texts alone: {', '.join(parts)} {verb} that it leaves out."] if parts else []


def unknown(config: Any, said: dict[str, Any]) -> list[str]:
    """A note on what config.json says and the model's configuration knows nothing of."""
    try:
        usual = type(config)()
    except Exception:  # a configuration that takes no defaults: what it knows can't be told from what it was given
        return []
    known = {*usual.to_dict(), *vars(usual), *usual.attribute_map, *GENERAL}
    kept = vars(config)  # an older name that became another's value, as rope_theta, is none of these
    names = sorted(n for n, value in said.items() if n in kept and n not in known and value not in (None, False))
    return [f"config.json says what {type(config).__name__} does not know: {', '.join(names)}."] if names else []


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


def mask_id(module: nn.Module, texts: Texts | None) -> int | None:
    """The id of the mask token: what config.json says, else the tokenizer's."""
    known = getattr(module.config, "mask_token_id", None)
    if known is None and texts is not None:
        known = getattr(texts.whole, "mask_token_id", None)
    return None if known is None else int(known)


def first_prompts(module: nn.Module, meta: dict[str, Any], texts: Texts | None) -> list[list[int]]:
    """The prompts that a module has, else the id that its texts begin with: its generation config's, its config's, its
    tokenizer's; of a model without one that which parts texts, their end.
    """
    if getattr(module, "prompts", None):
        return list(meta["prompts"])
    config: Any = module.config
    config = config.get_text_config()
    whole = None if texts is None else texts.whole
    known = [meta["bos"], getattr(config, "bos_token_id", None)]
    known += [getattr(whole, name, None) for name in ("bos_token_id", "cls_token_id")]
    usable = [i for i in (*known, *meta["eos"][:1]) if type(i) is int and 0 <= i < int(meta["input_vocab"])]
    return [usable[:1]] if usable else list(meta["prompts"])


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
