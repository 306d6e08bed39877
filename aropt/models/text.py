"""Byte-level language models of English text and Python code from the Python distribution: attention and recurrences.

Token ids are byte values 0..255, then pad, beginning of document, end of document and unknown.  A checkpoint is an
ordinary Hugging Face directory, so nothing below is needed to use it elsewhere: AutoModelForCausalLM and AutoTokenizer
load it offline.  A smaller model of each kind, its name ending in -draft, drafts for the other.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = 256, 257, 258, 259
SPECIAL = {"<|pad|>": PAD, "<|begin|>": BOS, "<|end|>": EOS, "<|unknown|>": UNKNOWN}
VOCAB = 260
CAPACITY = 1024

PACKAGES = (
    "asyncio", "collections", "concurrent", "email", "html", "http", "importlib", "json", "logging", "multiprocessing",
    "re", "sqlite3", "tomllib", "unittest", "urllib", "wsgiref", "xml", "xmlrpc", "zoneinfo",
)  # fmt: skip
# Tables, and pure Python twins whose docstrings repeat those of other modules.
SKIPPED = ("_sysconfigdata*", "_pydecimal.py", "_pydatetime.py", "_pyio.py", "html/entities.py", "*/test/*")
# Chosen among the documents that share less than a tenth of their long lines with the rest.
HELD_OUT = (
    "topic:calls", "topic:global", "topic:import", "topic:slicings", "topic:typesmapping", "topic:yield",
    "asyncio/taskgroups.py", "calendar.py", "copy.py", "email/header.py", "graphlib.py", "heapq.py",
    "http/cookies.py", "json/encoder.py", "shelve.py", "textwrap.py", "urllib/robotparser.py",
)  # fmt: skip


def encode(text: str) -> list[int]:
    """The UTF-8 bytes of text, each in 0..255; no special token is added."""
    return list(text.encode("utf-8"))


def decode(ids: Sequence[int]) -> str:
    """The text of ids: special tokens are dropped, bytes that are not UTF-8 become U+FFFD."""
    return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def documents() -> dict[str, bytes]:
    """The corpus in the running Python distribution: documents by name, in a fixed order.

    They are the language reference topics shown by help(), the sources of the standard library modules at top level
    and in PACKAGES, and the licence where the distribution carries it.
    """
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_paths()["stdlib"])
    found = {f"topic:{name}": text.encode("utf-8") for name, text in sorted(topics.items())}
    paths = [root / "LICENSE.txt", *root.glob("*.py")]
    for package in PACKAGES:
        paths += (root / package).rglob("*.py")
    for path in sorted(paths):
        name = path.relative_to(root)
        if path.is_file() and not any(name.match(pattern) or "test" in name.parts for pattern in SKIPPED):
            found[name.as_posix()] = path.read_bytes()
    return found


def split() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """(training documents, held-out documents); the split is by document, by the fixed list HELD_OUT."""
    every = documents()
    held = {name: data for name, data in every.items() if name in HELD_OUT}
    return {name: data for name, data in every.items() if name not in HELD_OUT}, held


def digest(docs: dict[str, bytes]) -> str:
    """sha256 (hexadecimal) over the names and contents of docs, in order."""
    total = hashlib.sha256()
    for name, data in docs.items():
        total.update(f"{name}\0{len(data)}\0".encode() + data)
    return total.hexdigest()


def stream(docs: dict[str, bytes]) -> list[int]:
    """One list of ids: every document between BOS and EOS, in order."""
    ids: list[int] = []
    for data in docs.values():
        ids += [BOS, *data, EOS]
    return ids


def heldout(count: int, length: int) -> list[list[int]]:
    """So many windows of the held-out documents, evenly spaced, each of `length` ids."""
    ids = stream(split()[1])
    step = (len(ids) - length) // count
    return [list(map(int, ids[i * step : i * step + length])) for i in range(count)]


COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}


def llama(width: int, layers: int, inner: int, heads: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=CAPACITY,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **COMMON,
    )
    return LlamaForCausalLM(config)


def mamba2(width: int, layers: int, state: int) -> PreTrainedModel:
    """Mamba-2 (Dao & Gu 2024): no attention."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        head_dim=32,
        num_heads=width // 16,
        state_size=state,
        n_groups=1,
        expand=2,
        chunk_size=64,
        residual_in_fp32=False,
        **COMMON,
    )
    return Mamba2ForCausalLM(config)


def hybrid(width: int, layers: int, inner: int, attention: list[int]) -> PreTrainedModel:
    """Bamba: Mamba-2, and attention in the layers `attention`."""
    from transformers import BambaConfig, BambaForCausalLM

    config = BambaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        mamba_d_head=32,
        mamba_n_heads=width // 16,
        mamba_d_state=32,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=64,
        num_attention_heads=width // 32,
        num_key_value_heads=3,
        attn_layer_indices=attention,
        max_position_embeddings=CAPACITY,
        **COMMON,
    )
    return BambaForCausalLM(config)


def deltanet(width: int, layers: int, inner: int) -> PreTrainedModel:
    """Qwen 3.5's: the gated delta rule (Yang et al. 2024), and attention in the last layer."""
    from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=inner,
        num_attention_heads=width // 32,
        num_key_value_heads=3,
        head_dim=32,
        linear_num_key_heads=3,
        linear_num_value_heads=width // 32,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        layer_types=["linear_attention"] * (layers - 1) + ["full_attention"],
        max_position_embeddings=CAPACITY,
        **COMMON,
    )
    return Qwen3_5ForCausalLM(config)


BUILDS: dict[str, Callable[[], PreTrainedModel]] = {
    "text-ar": lambda: llama(192, 4, 512, 6),
    "text-ar-draft": lambda: llama(128, 1, 256, 4),
    "text-mamba2": lambda: mamba2(256, 4, 64),
    "text-mamba2-draft": lambda: mamba2(128, 1, 64),
    "text-hybrid": lambda: hybrid(192, 4, 320, [2]),
    "text-hybrid-draft": lambda: hybrid(96, 2, 160, [1]),
    "text-deltanet": lambda: deltanet(192, 4, 384),
    "text-deltanet-draft": lambda: deltanet(96, 2, 192),
}


def build(name: str = "text-ar") -> PreTrainedModel:
    """An untrained float32 model, one of BUILDS: ids int64 [B, T] with T <= 1024 to logits float32 [B, T, 260]."""
    return BUILDS[name]()


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose id for each UTF-8 byte is the byte's value."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The ByteLevel pre-tokenizer writes every byte as one printable character: itself where it is printable in
    # Latin-1, else the next free one from U+0100 on, in byte order.  Without merges, BPE then maps characters to ids.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 0x100 + hidden.index(byte)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    pad, bos, eos, unknown = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
        model_max_length=CAPACITY,
    )


def load(directory: Path) -> PreTrainedModel:
    """The model saved in directory, widened to float32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    return model
