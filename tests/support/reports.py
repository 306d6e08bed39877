"""A report of an optimization that nobody ran."""

from __future__ import annotations

import copy
from typing import Any

# Three images of scikit-learn's digits: 0, 3 and 8. A character is a grey level, base 17.
DIGITS = [
    [[int(c, 17) for c in row] for row in text.split()]
    for text in (
        "005d9100 00dfaf50 03f20b80 04c00880 05800980 04b01c70 02e5ac00 006da000",
        "007fd100 08d6f400 021dd000 002fb100 0001cc10 00001a80 00845e90 007dd900",
        "009e8100 00ceec00 009a0f40 003gce20 004gg200 03g8ad20 01f13g80 00bgfb10",
    )
]


def make_pass(name: str, level: str, seconds: float, nodes: tuple[int, int], size: tuple[int, int], **more: Any) -> Any:
    """One entry of report["passes"]; applied unless `more` says otherwise."""
    change = {"nodes": {"before": nodes[0], "after": nodes[1]}, "bytes": {"before": size[0], "after": size[1]}}
    return {"name": name, "status": "applied", "reason": "", "level": level, "seconds": seconds, **change, **more}


def case(name: str, kind: str, prompt: int, tokens: int, ratio: float, ties: int = 0, status: str = "pass") -> Any:
    floor = 2.4e-6
    numbers = {"prompt": prompt, "tokens": tokens, "error": ratio * floor, "floor": floor, "ratio": ratio, "ties": ties}
    return {"name": name, "kind": kind, "status": status, **numbers}


def measure(variant: str, phase: str, median: float, spread: float, unit: str = "ms") -> Any:
    low, high = median * (1 - spread), median * (1 + 2 * spread)
    return {"variant": variant, "phase": phase, "median": median, "p10": low, "p90": high, "n": 30, "unit": unit}


def image(label: str, pixels: list[list[int]]) -> Any:
    return {"label": label, "before": pixels, "after": pixels, "same": True, "kind": "image"}


DEMO: dict[str, Any] = {
    "schema_version": 1,
    "tool": {"name": "aropt", "version": "0.1.0"},
    "env": {
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "onnxruntime": "1.31.1",
        "transformers": None,
        "platform": "Linux x86_64",
        "cpu": "Example CPU, 2 cores",
        "threads": 2,
    },
    "model": {
        "name": "digits-ar",
        "source": "reference model",
        "modality": "image",
        "parameters": 811776,
        "bytes": 1623552,
        "vocab": 17,
        "capacity": 64,
        "heldout": {"nll": 1.48148, "images": 360, "classifier_accuracy_on_real_images": 0.98889},
    },
    "target": "onnxruntime",
    "passes": [
        make_pass(
            "restrict",
            "rounding",
            1.84,
            (412, 438),
            (103_907_328, 5_353_472),
            options={"rows": "next", "state": "append"},
            verify={"max_error": 1.9e-6, "error_over_floor": 0.79, "ties": 0},
            matches=[f"layers.{i}.attn: scaled_dot_product_attention, mask is causal" for i in range(4)],
        ),
        make_pass(
            "fuse_sampler",
            "bitwise",
            0.42,
            (438, 431),
            (5_353_472, 5_353_472),
            verify={"max_error": 0.0},
            matches=["step + sample: one graph"],
        ),
        make_pass(
            "fuse_qkv",
            "rounding",
            0.95,
            (431, 403),
            (5_353_472, 5_329_920),
            verify={"max_error": 2.1e-6, "error_over_floor": 0.88},
            matches=[f"layers.{i}.attn.qkv" for i in range(4)],
            rejected=[["head", "weight is tied to embed, and both are read"]],
        ),
        make_pass(
            "ring_cache",
            "bitwise",
            0.03,
            (403, 403),
            (5_329_920, 5_329_920),
            status="skipped",
            reason="no layer has a window shorter than the capacity of 64",
        ),
        make_pass(
            "quantize_kv",
            "lossy",
            1.31,
            (403, 451),
            (5_329_920, 4_281_344),
            status="reverted",
            reason="top-1 agreement 0.962 is below the budget of 0.98",
            options={"bits": 8, "per": "head"},
            verify={"kl": 0.0131, "top1": 0.962},
            matches=[f"layers.{i}.attn.cache" for i in range(4)],
        ),
        make_pass(
            "fold_constants",
            "bitwise",
            0.21,
            (403, 371),
            (5_329_920, 5_296_640),
            verify={"max_error": 0.0},
        ),
        make_pass(
            "whole_loop",
            "bitwise",
            0.66,
            (371, 377),
            (5_296_640, 5_296_640),
            verify={"max_error": 0.0},
            matches=["loop over 64 positions: one Loop node"],
        ),
    ],
    "verify": {
        "status": "pass",
        "metrics": {"nll_before": 1.48148, "nll_after": 1.48148, "tokens_equal": 1.0},
        "cases": [
            case("class 0", "greedy", 1, 64, 0.81),
            case("class 3", "greedy", 1, 64, 0.62),
            case("class 8, seed 7", "sampled", 1, 64, 0.93, ties=1),
            case("three lengths, left-padded", "ragged", 24, 120, 1.38),
            case("length 1", "boundary", 1, 1, 0.05),
            case("capacity - 1", "boundary", 63, 1, 1.12),
            case("capacity", "boundary", 64, 0, 0.74),
        ],
        "diverges": None,
    },
    "bench": [
        measure("eager", "generate", 187.4, 0.03),
        measure("inductor", "generate", 96.2, 0.05),
        measure("eager + hand-written cache", "generate", 71.9, 0.04),
        measure("aropt (onnxruntime)", "generate", 14.63, 0.02),
        measure("eager", "decode", 2.93, 0.03),
        measure("aropt (onnxruntime)", "decode", 0.221, 0.06),
        measure("eager", "generate", 341.5, 0.02, "tok/s"),
        measure("inductor", "generate", 665.3, 0.04, "tok/s"),
        measure("eager + hand-written cache", "generate", 890.1, 0.03, "tok/s"),
        measure("aropt (onnxruntime)", "generate", 4374.6, 0.02, "tok/s"),
    ],
    "speedup": {"eager": 12.81, "inductor": 6.58, "eager + hand-written cache": 4.91},
    "roofline": {"bytes_per_step": 5_296_640, "bandwidth_gb_s": 38.5, "share": 0.62},
    "samples": [image(f"class {label}", pixels) for label, pixels in zip((0, 3, 8), DIGITS)],
    "artifacts": [
        {"path": "models/generate/onnxruntime/model.onnx", "sha256": "3f" * 32, "bytes": 214_331},
        {"path": "weights.safetensors", "sha256": "a9" * 32, "bytes": 3_249_104},
    ],
    "notes": [
        "Timings are of one batch row on two threads; other machines will differ.",
        "inductor recompiles for each length; its first calls are not counted.",
    ],
}


def demo() -> dict[str, Any]:
    """A report of a verified optimization. Its numbers are made up."""
    return copy.deepcopy(DEMO)
