"""Hugging Face directories: nothing that they say is lost unsaid, and what aropt can't take is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import aropt
from aropt.errors import AroptError, Unsupported, UsageError
from aropt.frontend.sources import resolve
from tests.support.directories import SIZES, directory, said
from tests.support.run import generate

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return directory(tmp_path_factory.mktemp("base"))


@pytest.fixture
def llama(base: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(base, tmp_path / "llama"))


def rewritten(path: Path, change: Callable[[Weights], Weights]) -> None:
    """Stores other weights."""
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", metadata={"format": "pt"})


def refusal(path: Path | str, kind: type[AroptError], masked: bool = False) -> str:
    with pytest.raises(kind) as raised:
        resolve(str(path), masked=masked)
    assert raised.value.hint, "a refusal says what to do"
    return str(raised.value)


Q = "model.layers.1.self_attn.q_proj.weight"
LOST: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a layer": (lambda w: w | {Q.replace(".1.", ".2."): w[Q].clone()}, "number of layers"),
    "a bias": (lambda w: w | {Q.replace("weight", "bias"): torch.ones(32)}, "q_proj.bias"),
    "a scale": (lambda w: w | {Q + "_scale": torch.ones(())}, "scales of quantized weights"),
    "a zero point": (lambda w: w | {Q + "_zero_point": torch.ones(())}, "scales of quantized weights"),
    "an adapter": (lambda w: w | {Q.replace("weight", "lora_A.weight"): torch.ones(2, 32)}, "merge_and_unload"),
    "a wrapped adapter": (
        lambda w: {"base_model.model." + n.replace("q_proj.", "q_proj.base_layer."): x for n, x in w.items()},
        "get the checkpoint again",
    ),
    "an encoder": (lambda w: w | {"model.encoder.layers.0.weight": torch.ones(3)}, "model.encoder.layers.0.weight"),
    "codes in int8": (lambda w: w | {Q: w[Q].to(torch.int8)}, "stored as codes"),
    "codes in fp8": (lambda w: w | {Q: w[Q].to(torch.float8_e4m3fn)}, "F8_E4M3"),
    "a weight that is missing": (lambda w: {n: x for n, x in w.items() if n != Q}, "1 weights are missing"),
    "another shape": (lambda w: w | {Q: torch.ones(32, 16)}, "stored as [32, 16], and config.json makes it [32, 32]"),
}


@pytest.mark.parametrize("case", LOST)
def test_no_stored_weight_is_lost(case: str, llama: Path) -> None:
    change, told = LOST[case]
    rewritten(llama, change)
    assert told in refusal(llama, AroptError)


def test_what_transformers_ignores_is_listed(llama: Path) -> None:
    """Buffers that were stored once; a pooler and the head of another task; files and fields that nobody reads."""
    rewritten(llama, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    said(
        llama, rotary_style="no field of this name", rope_theta=1e5, torch_dtype="float16", gradient_checkpointing=True
    )
    (llama / "consolidated.safetensors").write_bytes((llama / "model.safetensors").read_bytes())
    notes = resolve(str(llama)).meta["left_out"]
    for told in ("rotary_emb.inv_freq", "rotary_style", "consolidated.safetensors"):
        assert any(told in note for note in notes), notes
    assert not any("rope_theta" in note or "gradient_checkpointing" in note for note in notes)  # the one is used
    bert = directory(llama / "bert", "Bert", "ForPreTraining")
    notes = resolve(str(bert), masked=True).meta["left_out"]
    plain = resolve(str(directory(llama / "plain"))).meta["left_out"]
    assert plain == ["Prompts are token ids: the directory has no tokenizer."]
    (told,) = [note for note in notes if note not in plain]
    assert "heads of other tasks" in told and "seq_relationship" in told


def test_notes_reach_the_report(llama: Path) -> None:
    said(llama, rotary_style="no field of this name")
    program = aropt.optimize(aropt.capture(str(llama)), "eager", [], check=False)
    assert "config.json says what LlamaConfig does not know: rotary_style." in program.report["notes"]


DECLARED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bitsandbytes": ("config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}, "bitsandbytes"),
    "nested": ("config.json", {"text_config": {"quantization_config": {"quant_method": "awq"}}}, "text_config"),
    "MLX": ("config.json", {"quantization": {"bits": 4}}, "quantized"),
    "ModelOpt": ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, "NVFP4"),
    "GPTQ": ("quantize_config.json", {"bits": 4}, "4 bits"),
    "LoRA": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "some/base"}, "some/base"),
    "encoder-decoder": ("config.json", {"is_encoder_decoder": True}, "encoder-decoder"),
    "headless": ("config.json", {"architectures": ["LlamaModel"]}, "no language-model head"),
    "classes": ("config.json", {"architectures": ["LlamaForSequenceClassification"]}, "sequence classification"),
}


@pytest.mark.parametrize("case", DECLARED)
def test_what_a_directory_declares_is_told_by_name(case: str, llama: Path) -> None:
    file, more, told = DECLARED[case]
    said(llama, file, **more)
    assert told in refusal(llama, Unsupported)


@pytest.mark.parametrize(
    "more",
    [
        {"_attn_implementation": "kernels-community/flash-attn"},
        {"attn_implementation": {"": "someone/kernel"}},
        {"text_config": {"_attn_implementation_internal": "someone/kernel@main"}},
        {"layers": [{"experts_implementation": "someone/kernel"}]},
        {"use_kernels": True},
    ],
)
def test_no_code_of_the_hub_is_chosen_by_a_directory(more: dict[str, Any], llama: Path) -> None:
    from aropt.frontend.huggingface import check_implementations

    said(llama, **more)
    with pytest.raises(UsageError, match="chooses an implementation"):
        resolve(str(llama))
    check_implementations(llama, {"_attn_implementation": "sdpa", "cache_implementation": "static"})


def test_a_tied_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """All weights of the causal class are there: its head is the embedding."""
    path = directory(tmp_path, "Llama", "Model", tie_word_embeddings=True)
    assert "no language-model head" in refusal(path, Unsupported)


ENCODED = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "head", "more"),
    [
        ("Whisper", "ForConditionalGeneration", {"max_target_positions": 64, "max_source_positions": 64}),
        ("Bart", "ForConditionalGeneration", {}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_an_encoder_decoder_is_refused(
    kind: str, head: str, more: dict[str, Any], masked: bool, tmp_path: Path
) -> None:
    path = directory(tmp_path, kind, head, **ENCODED, decoder_start_token_id=0, **more)
    assert "encoder-decoder" in refusal(path, Unsupported, masked)


def test_a_decoder_saved_as_one_is_taken(tmp_path: Path) -> None:
    path = directory(tmp_path, "Bart", "ForCausalLM", **ENCODED)
    assert type(resolve(str(path)).module).__name__ == "BartForCausalLM"


def test_a_masked_model_is_not_read_as_a_causal_one(tmp_path: Path) -> None:
    path = directory(tmp_path, "Bert", "ForMaskedLM")
    assert "--loop unmask" in refusal(path, UsageError)
    assert type(resolve(str(path), masked=True).module).__name__ == "BertForMaskedLM"


def test_lengths_of_a_model_of_texts_and_pictures(tmp_path: Path) -> None:
    import transformers

    text = {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "max_position_embeddings": 40}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    source = resolve(str(tmp_path))
    assert (source.meta["capacity"], source.meta["input_vocab"]) == (40, 50)
    assert "The program takes texts alone: vision_config is of a part that it leaves out." in source.meta["left_out"]


ABSENT = {
    "some-org/some-model": "hf download some-org/some-model",
    "no-such-model": "reference models",
    "{}/model.gguf": "GGUF",
    "{}/pytorch_model.bin": "is a file, not a model directory",
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_no_directory_is_told_by_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert ABSENT[name] in refusal(name.format(tmp_path), AroptError)


FOLDERS: dict[str, tuple[dict[str, str], str]] = {
    "an adapter": ({"adapter_config.json": '{"base_model_name_or_path": "some/base"}'}, "adapter of 'some/base'"),
    "GGUF": ({"model-Q4_K_M.gguf": ""}, "GGUF"),
    "GGUF with a configuration": ({"config.json": '{"model_type": "llama"}', "model.gguf": ""}, "GGUF"),
    "an artifact": ({"manifest.json": "{}", "program.json": "{}"}, "artifact that aropt made"),
    "a pipeline": ({"model_index.json": "{}"}, "Diffusers"),
    "its author's format": ({"params.json": "{}", "consolidated.00.pth": ""}, "params.json"),
    "a folder of checkpoints": ({"checkpoint-500/config.json": "{}"}, "checkpoint-500"),
    "pickled weights": ({"config.json": '{"model_type": "llama"}', "pytorch_model.bin": ""}, "a pickle runs any code"),
    "Flax's weights": ({"config.json": '{"model_type": "llama"}', "flax_model.msgpack": ""}, "Flax's"),
    "nothing": ({}, "config.json is missing"),
    "a list": ({"config.json": "[]"}, "not a JSON object"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_no_model_directory_is_told_by_name(case: str, tmp_path: Path) -> None:
    files, told = FOLDERS[case]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert told in refusal(tmp_path, AroptError)


def sharded(path: Path, parts: dict[str, list[str]], held: Weights) -> None:
    (path / "model.safetensors").unlink()
    for file, names in parts.items():
        save_file({n: held[n].clone() for n in names}, path / file, metadata={"format": "pt"})
    where = {n: file for file, names in parts.items() for n in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def test_shards(llama: Path) -> None:
    """A shard that is missing, and a weight that two of them hold; of the same weights otherwise the same model."""
    held = load_file(llama / "model.safetensors")
    want = resolve(str(llama)).module.state_dict()
    names = sorted(held)
    sharded(llama, {"a.safetensors": names[:5], "b.safetensors": names[5:]}, held)
    got = resolve(str(llama)).module.state_dict()
    assert all(torch.equal(want[n], got[n]) for n in want)
    save_file({n: held[n].clone() for n in names[4:]}, llama / "b.safetensors", metadata={"format": "pt"})
    assert names[4] in refusal(llama, UsageError)
    (llama / "b.safetensors").unlink()
    assert "b.safetensors" in refusal(llama, UsageError)
    (llama / "a.safetensors").write_bytes(b"\x10\x00\x00")
    shutil.copy(llama / "a.safetensors", llama / "b.safetensors")
    assert "damaged" in refusal(llama, UsageError)


PROMPT = [3, 1, 4]


def both(path: Path, n: int | None = 12) -> tuple[list[int], list[int]]:
    """New tokens of the program with its own defaults, and of transformers' generate()."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids, more = torch.tensor([PROMPT]), {} if n is None else {"max_new_tokens": n}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **more)
    return generate(aropt.capture(str(path)), [PROMPT], n)[0], want[0, len(PROMPT) :].tolist()


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer is enough for what comes after the model."""
    return directory(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture
def short(shallow: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(shallow, tmp_path / "short"))


@pytest.fixture(scope="module")
def written(shallow: Path) -> list[int]:
    """What the model writes without any defaults."""
    return list(generate(aropt.capture(str(shallow)), [PROMPT], 12)[0])


FOLLOWED: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "an end": lambda w: {"eos_token_id": w[3]},
    "ends": lambda w: {"eos_token_id": [0, w[5], w[4]]},
    "a penalty": lambda w: {"repetition_penalty": 1.8},
    "suppressed": lambda w: {"suppress_tokens": [w[0], w[4], 999]},
    "suppressed first": lambda w: {"begin_suppress_tokens": [w[0]]},
    "a word of one id": lambda w: {"bad_words_ids": [[w[1]]], "suppress_tokens": [w[2]]},
    "a least length": lambda w: {"eos_token_id": w[1], "min_new_tokens": 7},
    "all": lambda w: {"eos_token_id": w[1], "min_new_tokens": 3, "suppress_tokens": w[:1], "repetition_penalty": 0.7},
}


ALONE = ("an end", "a penalty", "suppressed", "a least length")  # others have the same rule among several things


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.exhaustive] if c in ALONE else []) for c in FOLLOWED]
)
def test_defaults_are_those_of_transformers(case: str, short: Path, written: list[int]) -> None:
    said(short, "generation_config.json", **FOLLOWED[case](written))
    got, want = both(short)
    assert got == want != written


@pytest.mark.parametrize(
    "length", [pytest.param({"max_new_tokens": 5}, marks=pytest.mark.exhaustive), {"max_length": 9}]
)
def test_how_long_a_text_gets(length: dict[str, int], short: Path) -> None:
    said(short, "generation_config.json", **length)
    got, want = both(short, None)
    assert got == want and len(got) in (5, 6)


def test_config_json_says_it_where_nothing_else_does(short: Path, written: list[int]) -> None:
    """And is not asked where generation_config.json is there, as in transformers."""
    (short / "generation_config.json").unlink()
    said(short, eos_token_id=written[2])
    got, want = both(short)
    assert got == want == written[:3]
    said(short, "generation_config.json", bos_token_id=1)
    got, want = both(short)
    assert got == want == written


def test_a_request_goes_before_the_defaults(short: Path, written: list[int]) -> None:
    said(short, "generation_config.json", eos_token_id=written[2], repetition_penalty=1.8, do_sample=True, top_p=0.5)
    program = aropt.capture(str(short))
    assert program.meta["defaults"] == {"temperature": 1.0, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.8}
    neutral: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1}
    assert generate(program, [PROMPT], 12, **neutral)[0] == written[:3]
    assert generate(program, [PROMPT], 12, stop=(), **neutral)[0] == written
    assert generate(program, [PROMPT], 12, plain=True)[0] == written
    given: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "top_p": 0.5, "repetition_penalty": 1.8}
    want = generate(program, [PROMPT], 12, plain=True, stop=[written[2]], **given)
    assert generate(program, [PROMPT], 12) == want


def test_what_no_rule_follows_is_told(short: Path) -> None:
    said(short, "generation_config.json", no_repeat_ngram_size=3, repetition_penalty=1.8, num_beams=1, typical_p=1.0)
    program = aropt.capture(str(short), rules=["temperature"])
    notes = program.meta["left_out"]
    assert [note for note in notes if "no_repeat_ngram_size 3, which no rule follows" in note]
    assert [note for note in notes if "chosen rules don't follow: repetition_penalty 1.8" in note]
    assert not [note for note in notes if "num_beams" in note or "typical_p" in note]


def test_a_broken_generation_config_is_refused(short: Path) -> None:
    (short / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(short, UsageError)
    (short / "generation_config.json").write_text('{"repetition_penalty": 0.0, "do_sample": true}')
    with pytest.raises(UsageError):
        aropt.capture(str(short))


def test_an_exported_loop_has_the_same_defaults(short: Path, written: list[int], tmp_path: Path) -> None:
    """Where its caller gives only what has none: prompt, lengths, limit, streams."""
    from aropt.exporters.whole_loop import export_program
    from aropt.targets.ort.run_loop import session

    more = {"eos_token_id": [0, written[5]], "suppress_tokens": [written[0], written[1]], "min_new_tokens": 2}
    said(short, "generation_config.json", **more, repetition_penalty=1.1)
    program = aropt.capture(str(short))
    export_program(program, tmp_path / "model.onnx")
    feeds = {"prompt": [PROMPT], "lengths": [3], "limit": 12, "streams": [0]}
    out = session(tmp_path / "model.onnx").run(["generated"], {n: np.array(v) for n, v in feeds.items()})[0]
    assert [t for t in out[0].tolist() if t >= 0] == generate(program, [PROMPT], 12)[0] == both(short)[1]


@pytest.mark.exhaustive
def test_defaults_stay_in_the_artifact_and_on_the_command_line(
    short: Path, written: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from aropt.cli.run import run

    said(short, "generation_config.json", eos_token_id=written[5], suppress_tokens=written[:1], max_new_tokens=9)
    program = aropt.optimize(aropt.capture(str(short)), "eager", check=False)
    program.save(str(tmp_path / "out"))
    want = both(short, None)[1]
    assert generate(program, [PROMPT]) == aropt.load(str(tmp_path / "out")).generate([PROMPT]) == [want]
    ran = run(tmp_path / "out", ["3 1 4"], None, {}, 0, None, None, None)
    assert ran["tokens"] == [want] and len(want) <= 9
