"""Train or evaluate a reference model: python -m aropt.models.train NAME [--steps N] [--out DIR] [--evaluate].

--from digits-ar --shuffle WINDOW tunes a raster model to a shuffled one, digits-ar-shuffleWINDOW.  digits-ar-cca is
tuned from the shipped digits-ar.  text-mdlm is tuned after training; `--steps 0` tunes the shipped checkpoint again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.ir.known_mixers import known_mixers
from aropt.models import (
    CHECKPOINTS,
    REFERENCES,
    canvas,
    digits,
    load,
    quality_digits,
    shuffle,
    text,
    train_canvas,
    train_cca,
    train_digits,
    train_shuffle,
    tune_canvas,
)
from aropt.models.optimise import SEED, log, optimise, parameters

CANVAS = ("text-mdlm", "text-bd")
STEPS = {
    "digits-ar": 900,
    "digits-shuffle2": 900,
    "digits-shuffle4": 900,
    "digits-ar-cca": 100,
    "text-ar": 2000,
    "text-mamba2": 1500,
    "text-hybrid": 700,
    "text-deltanet": 400,
    "text-ar-draft": 1000,
    "text-mamba2-draft": 1000,
    "text-hybrid-draft": 800,
    "text-deltanet-draft": 500,
    "text-mdlm": 3000,
    "text-bd": 400,
}
SHUFFLED = 900  # steps of --from digits-ar --shuffle
TUNED = 1500  # steps of tuning, for text-mdlm


# Byte-level language models


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """float32 [B, T, 260], with the definitions of our ops in the place of transformers' loops over chunks."""
    with known_mixers(model):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@torch.no_grad()
def text_nll(model: nn.Module, ids: Tensor, length: int) -> float:
    """Mean negative log likelihood, in nats per id, over consecutive windows of length ids of ids int64 [N].

    Every id but the first of each window counts, with the ids before it in its window as context.
    """
    windows = ids[: len(ids) // length * length].view(-1, length)
    total = 0.0
    for batch in torch.split(windows, max(1, 8192 // length)):
        logits = logits_of(model, batch)
        total += F.cross_entropy(logits[:, :-1].transpose(1, 2), batch[:, 1:], reduction="sum").item()
    return total / (windows.shape[0] * (length - 1))


def text_measure(model: nn.Module) -> dict[str, Any]:
    """Held-out NLLs in nats per byte, all documents, in windows of 256 and of 1024 ids."""
    train, held = text.split()
    ids = torch.tensor(text.stream(held))
    counts = torch.bincount(torch.tensor(text.stream(train)), minlength=text.VOCAB) + 1.0
    nll = text_nll(model, ids, 256)
    return {
        "nll": nll,
        "bits_per_byte": nll / math.log(2),
        "nll_window_1024": text_nll(model, ids, text.CAPACITY),
        "unigram_nll": -counts.log().log_softmax(0)[ids].mean().item(),
        "ids": len(ids),
        "documents": list(held),
        "data_sha256": text.digest(held),
    }


def train_text(name: str, steps: int, out: Path) -> dict[str, Any]:
    """Train one of text.BUILDS, write its Hugging Face directory into out; return its record but for the measurements.

    The last fifth of the steps reads sequences as long as the model's capacity, to train it at every position.
    """
    train, held = text.split()
    stream, check = torch.tensor(text.stream(train)), torch.tensor(text.stream(held)[:16384])
    model = text.build(name).train()
    generator = torch.Generator().manual_seed(SEED)
    for step, _ in optimise(model, steps, peak=2e-3, decay=0.1):
        if step % 100 == 0:
            log(f"{name} step {step}/{steps}: {text_nll(model, check, 256):.4f} nats/byte on a held-out slice")
        rows, length = (12, 256) if step < steps * 4 // 5 else (3, text.CAPACITY)
        starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
        batch = stream[starts + torch.arange(length + 1)]
        logits = logits_of(model, batch[:, :-1])
        torch.autograd.backward(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:]))
    directory = out / name
    model.to(torch.bfloat16).save_pretrained(directory)
    text.tokenizer().save_pretrained(directory)
    return {
        "parameters": parameters(model),
        "data": f"documents of Python {platform.python_version()}",
        "documents": len(train),
        "ids": len(stream),
        "data_sha256": text.digest(train),
    }


def measure(model: nn.Module) -> dict[str, Any]:
    """The held-out measurements recorded for a reference model."""
    if isinstance(model, canvas.CanvasLM):
        return train_canvas.measure(model)
    if isinstance(model, (digits.DigitsAR, shuffle.ShuffleAR)):
        return quality_digits.measure(model)
    return text_measure(model)


def make(name: str, steps: int, out: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Train the reference model called name, write its checkpoint into out; its record but for the measurements."""
    made: dict[str, Any]
    if name in CANVAS:

        def tune(model: canvas.CanvasLM, stream: Tensor) -> dict[str, Any]:
            return tune_canvas.tune(model, stream, TUNED, optimise, log)

        made = train_canvas.train(name, steps, out, optimise, log, tune)
    elif name.endswith("-cca"):
        _, made = train_cca.tune(load(name.removesuffix("-cca")), name, steps, out)
    else:
        made = (train_text if name in text.BUILDS else train_digits.train)(name, steps, out)
    return load(name, out), made


def parse() -> argparse.Namespace:
    """The command line: `name`, what is made, and `base` and `shuffle` where a model is turned into a shuffled one."""
    parser = argparse.ArgumentParser(prog="python -m aropt.models.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=list(STEPS), help="a reference model")
    parser.add_argument(
        "--from", dest="base", choices=["digits-ar"], help="the raster model that --shuffle starts from"
    )
    parser.add_argument("--shuffle", type=int, metavar="WINDOW", help="tune --from to WINDOW x WINDOW pixels a step")
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS}; with --shuffle {SHUFFLED})")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder for the checkpoint and its record")
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped checkpoint instead of training")
    arguments = parser.parse_args()
    if (arguments.base is None) != (arguments.shuffle is None) or (arguments.name is None) == (arguments.base is None):
        parser.error("give the name of a reference model, or --from digits-ar --shuffle WINDOW")
    if arguments.base and arguments.evaluate:
        parser.error("--evaluate measures a shipped checkpoint, so it takes a name")
    return arguments


def main() -> None:
    arguments = parse()
    name, out = arguments.name or f"{arguments.base}-shuffle{arguments.shuffle}", arguments.out
    if arguments.evaluate:
        measured = measure(load(name))
        if measured.get("data_sha256") != REFERENCES[name].heldout.get("data_sha256"):
            log("note: this Python's held-out documents differ from those of the recorded measurement")
        print(json.dumps(measured, indent=1))
        return
    torch.manual_seed(SEED)
    steps = STEPS.get(name, SHUFFLED) if arguments.steps is None else arguments.steps
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if arguments.base:
        model, made = train_shuffle.tune(load(arguments.base), arguments.shuffle, name, steps, out)
    else:
        model, made = make(name, steps, out)
    seconds = round(time.perf_counter() - start)
    heldout = measure(model.eval())
    if not steps:  # what came before the tuning
        before = REFERENCES[name].training
        steps, seconds = before["steps"], before["seconds"] + seconds
    training = {"steps": steps, "seconds": seconds, "threads": torch.get_num_threads(), "seed": SEED, **made}
    record = json.dumps({"heldout": heldout, "training": training}, indent=1)
    for path in out.glob(f"{name}*/*.safetensors") if (out / name).is_dir() else [out / f"{name}.safetensors"]:
        path.chmod(0o644)  # the writer leaves it unreadable to other users
    (out / f"{name}.json").write_text(record + "\n", encoding="utf-8")
    log(f"{name}: held-out NLL {heldout['nll']:.4f} nats")


if __name__ == "__main__":
    main()
