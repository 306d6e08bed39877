"""What a directory's generation_config.json says: facts of a program, which loops/defaults.py follows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aropt.errors import UsageError
from aropt.frontend.directory import read_json

LENGTHY = ("max_new_tokens", "max_length")


SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")


TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens", *SUPPRESSED)


# of generation_config.json: about the run and not about what is written, or told elsewhere
SILENT = {
    "_from_model_config", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "do_sample",
    "decoder_start_token_id", "use_cache", "cache_implementation", "cache_config", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "disable_compile", "compile_config",
    "renormalize_logits", "prompt_lookup_num_tokens", "max_matching_ngram_size", "is_assistant", "max_time",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_early_exit", "_commit_hash", "generation_kwargs", "low_memory",
}  # fmt: skip


def read_defaults(path: Path, config: Any, vocab: int) -> tuple[dict[str, Any], list[str]]:
    """What transformers' GenerationConfig says of a directory, as facts of a program; notes on what no rule follows.

    Without a generation_config.json it says what config.json does. Raises UsageError for a file that can't be read.
    """
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        read_json(path / "generation_config.json")  # transformers passes over a damaged one
        try:
            said = GenerationConfig.from_pretrained(path, local_files_only=True)
        except Exception as error:  # whatever its checks raise
            raise UsageError(
                what="generation_config.json says what can't be",
                where=str(path / "generation_config.json"),
                why=(str(error).splitlines() or [type(error).__name__])[0][:300],
                hint="correct it, or take it out of the directory",
            ) from error
    else:
        said = GenerationConfig.from_model_config(config)
    usual = {**GenerationConfig._get_default_generation_params(), "guidance_scale": 1.0, "min_new_tokens": 0}
    other = {
        name: value
        for name, value in said.to_dict().items()
        if value not in (None, False, [], {}, usual.get(name)) and name not in {*SILENT, *TAKEN, *LENGTHY}
    }
    found = parameters_of(said, usual, other, vocab)
    notes = [f"generation_config.json says {name} {value}, which no rule follows." for name, value in other.items()]
    told = [f"{name} {value}" for name, value in found.items()]
    notes += [f"Defaults of the model's own generation_config: {', '.join(told)}."] if told else []
    return {"eos": ids_of_ends(said.eos_token_id), "bos": said.bos_token_id, "defaults": found}, notes


def parameters_of(said: Any, usual: Mapping[str, Any], other: dict[str, Any], vocab: int) -> dict[str, Any]:
    """The parameters that the rules take; words of one id leave `other`, as they are suppressed."""
    found = {name: getattr(said, name, None) for name in (*TAKEN, *LENGTHY)}
    words = [list(word) for word in other.get("bad_words_ids") or []]
    if words and all(len(word) == 1 for word in words):
        found["suppress_tokens"] = sorted({*(found["suppress_tokens"] or []), *(word[0] for word in words)})
        del other["bad_words_ids"]
    if said.do_sample:
        found["temperature"] = usual["temperature"] if said.temperature is None else said.temperature
        found["top_k"] = usual["top_k"] if said.top_k is None else said.top_k
    else:
        found["temperature"] = None
    if found["top_k"] is not None:
        found["top_k"] = min(found["top_k"], vocab)  # as transformers; and so are ids that there are none of
    found |= {n: [i for i in found[n] or [] if 0 <= i < vocab] for n in SUPPRESSED}
    drawn = ("temperature", "top_k")  # usual values of transformers are not the rules' own
    return {n: v for n, v in found.items() if v not in (None, []) and (n in drawn or v != usual.get(n))}


def ids_of_ends(said: Any) -> list[int]:
    """The ids that end a text, of a number, a list or nothing."""
    return [int(i) for i in said] if isinstance(said, (list, tuple)) else [] if said is None else [int(said)]
