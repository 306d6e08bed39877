"""Trained reference models, forward only: what the compiler's tests, examples and measurements start from.

Neither torch nor transformers is imported until a model is loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aropt.errors import UsageError

if TYPE_CHECKING:
    import torch

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def _record(name: str, section: Literal["heldout", "training"]) -> dict[str, Any]:
    """A section of what training wrote about the checkpoint called name; empty while there is none."""
    path = CHECKPOINTS / f"{name}.json"
    if not path.exists():
        return {}
    record: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return record[section]


PROMPTS = (
    "The following is a list of ",
    "A mapping object maps ",
    "def __init__(self, ",
    'import os\nimport sys\n\n__all__ = ["',
    "    for key, value in ",
)


@dataclass(frozen=True)
class Reference:
    """A trained model and what is known of it."""

    name: str
    modality: Literal["image", "text"]
    description: str
    checkpoint: Path
    """A safetensors file (digits-ar) or a Hugging Face directory (text-ar)."""
    capacity: int
    """The most rows the model takes in one sequence: ids, or windows of `unit` ids."""
    vocab: int
    """The size of the last dimension of its logits."""
    prompts: tuple[tuple[int, ...], ...]
    """Example prompts, as ids."""
    heldout: dict[str, Any]
    """Measured on data kept out of training, with the shipped bfloat16 weights; NLLs in nats per pixel or byte."""
    training: dict[str, Any]
    """How the checkpoint was made: steps, seconds, seed, parameters, data and its sha256."""
    mask: int | None = None
    """The id of what is not written yet, for models that unmask a canvas."""
    unit: int = 1
    """Ids of a row; those of a prompt stand alone, each in a row of its own."""
    block: int = 0
    """Rows of a block, for models whose rows see their block and those before it; 0: they see everything."""


REFERENCES: dict[str, Reference] = {
    reference.name: reference
    for reference in (
        Reference(
            name="digits-ar",
            modality="image",
            description="class-conditional raster transformer over scikit-learn's 8x8 digits",
            checkpoint=CHECKPOINTS / "digits-ar.safetensors",
            capacity=64,
            vocab=17,
            prompts=tuple((17 + label,) for label in range(10)),
            heldout=_record("digits-ar", "heldout"),
            training=_record("digits-ar", "training"),
        ),
        Reference(
            name="digits-ar-cca",
            modality="image",
            description="digits-ar tuned by condition contrastive alignment: it needs no guidance",
            checkpoint=CHECKPOINTS / "digits-ar-cca.safetensors",
            capacity=64,
            vocab=17,
            prompts=tuple((17 + label,) for label in range(10)),
            heldout=_record("digits-ar-cca", "heldout"),
            training=_record("digits-ar-cca", "training"),
        ),
        *(
            Reference(
                name=f"digits-shuffle{window}",
                modality="image",
                description=f"digits-ar's transformer over rows of {window}x{window} pixels (Token-Shuffle)",
                checkpoint=CHECKPOINTS / f"digits-shuffle{window}.safetensors",
                capacity=64 // window**2,
                vocab=17,
                prompts=tuple((17 + label,) for label in range(10)),
                heldout=_record(f"digits-shuffle{window}", "heldout"),
                training=_record(f"digits-shuffle{window}", "training"),
                unit=window**2,
            )
            for window in (2, 4)
        ),
        *(
            Reference(
                name=name,
                modality="text",
                description=f"byte-level {what} over English text and Python code from the Python distribution",
                checkpoint=CHECKPOINTS / name,
                capacity=1024,
                vocab=260,
                prompts=tuple(tuple(prompt.encode("utf-8")) for prompt in PROMPTS),
                heldout=_record(name, "heldout"),
                training=_record(name, "training"),
            )
            for name, what in (
                ("text-ar", "Llama"),
                ("text-mamba2", "Mamba-2"),
                ("text-hybrid", "hybrid of Mamba-2 and attention (Bamba)"),
                ("text-deltanet", "hybrid of the gated delta rule and attention (Qwen 3.5)"),
                ("text-ar-draft", "Llama of one layer, a draft for text-ar,"),
                ("text-mamba2-draft", "Mamba-2 of one layer, a draft for text-mamba2,"),
                ("text-hybrid-draft", "Bamba of two layers, a draft for text-hybrid,"),
                ("text-deltanet-draft", "Qwen 3.5 of two layers, a draft for text-deltanet,"),
            )
        ),
        *(
            Reference(
                name=name,
                modality="text",
                description=f"byte-level masked diffusion model of the same text as text-ar, {sees}",
                checkpoint=CHECKPOINTS / f"{name}.safetensors",
                capacity=512,
                vocab=260,
                prompts=tuple(tuple(p.encode("utf-8")) for p in ("The following is a list of ", "def __init__(self, ")),
                heldout=_record(name, "heldout"),
                training=_record(name, "training"),
                mask=259,
                block=block,
            )
            for name, sees, block in (
                ("text-mdlm", "seeing the whole canvas (LLaDA)", 0),
                ("text-bd", "seeing its block of 16 and those before it (BD3-LM)", 16),
            )
        ),
    )
}


def load(name: str, folder: Path = CHECKPOINTS) -> torch.nn.Module:
    """The reference model called name, from its checkpoint in folder: float32, in eval mode, without gradients.

    digits-ar maps ids int64 [B, T] to logits float32 [B, T, 17], the shuffled models ids int64 [B, T, W] to logits
    float32 [B, T, W, 17]; the others of text are causal language models of transformers but for text-mdlm and text-bd,
    which map a canvas int64 [B, T] to logits float32 [B, T, 260]. Raises UsageError where the checkpoint is missing.
    """
    if name not in REFERENCES:
        raise KeyError(f"no reference model {name!r}; known: {', '.join(REFERENCES)}")
    checkpoint = folder / REFERENCES[name].checkpoint.name
    if not checkpoint.exists():
        raise UsageError(
            what=f"the reference model {name} has no checkpoint",
            where=str(checkpoint),
            why="nothing is there",
            hint=f"make it: python -m aropt.models.train {name}",
        )
    model: torch.nn.Module
    if name in ("digits-ar", "digits-ar-cca"):
        from aropt.models import digits

        model = digits.load(checkpoint)
    elif name.startswith("digits-shuffle"):
        from aropt.models import shuffle

        model = shuffle.load(checkpoint)
    elif REFERENCES[name].mask is not None:
        from aropt.models import canvas

        model = canvas.load(checkpoint, REFERENCES[name].block)
    else:
        from aropt.models import text

        model = text.load(checkpoint)
    return model.eval().requires_grad_(False)
