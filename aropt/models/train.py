"""Train or evaluate a reference model: python -m aropt.models.train NAME [--steps N] [--out DIR] [--evaluate].

text-mdlm is tuned after training; `--steps 0` tunes the shipped checkpoint again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.models import CHECKPOINTS, REFERENCES, canvas, digits, load, text, train_canvas, tune_canvas

SEED = 0
CANVAS = ("text-mdlm", "text-bd")
STEPS = {"digits-ar": 900, "text-ar": 2000, "text-mdlm": 3000, "text-bd": 400}
TUNED = 1500  # steps of tuning, for text-mdlm


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def round_bf16(model: nn.Module) -> None:
    """Round every weight to the nearest bfloat16, keeping float32 storage: what the checkpoint will hold."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


def optimise(model: nn.Module, steps: int, peak: float, decay: float) -> Iterator[tuple[int, torch.optim.AdamW]]:
    """Yield (step, optimizer) for each step, gradients cleared, then clip and apply the gradients left by the caller.

    The learning rate rises linearly to peak over the first 5% of steps and falls on a cosine to a twentieth of it.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    for step in range(steps):
        rate = 0.05 + 0.95 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = peak * min(rate, (step + 1) / warmup)
        optimizer.zero_grad()
        yield step, optimizer
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


# digits-ar


def digits_data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    """(fit, stop, held-out, sha256): each split is (labels int64 [N], pixels int64 [N, 64]).

    One image in five is held out.  Early stopping looks at a tenth of the others and never at the held-out ones.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    pixels, labels = data.data.astype(np.uint8), data.target.astype(np.uint8)
    sha = hashlib.sha256(labels.tobytes() + pixels.tobytes()).hexdigest()
    rest, held = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=SEED, stratify=labels)
    fit, stop = train_test_split(rest, test_size=0.1, random_state=SEED, stratify=labels[rest])
    parts = [(torch.from_numpy(labels[i]).long(), torch.from_numpy(pixels[i]).long()) for i in (fit, stop, held)]
    return parts[0], parts[1], parts[2], sha


def digits_ids(labels: Tensor, pixels: Tensor) -> Tensor:
    """Inputs int64 [N, 64] that predict pixels int64 [N, 64]: the class token, then all pixels but the last."""
    return torch.cat([digits.LEVELS + labels[:, None], pixels[:, :-1]], dim=1)


@torch.no_grad()
def digits_nll(model: nn.Module, labels: Tensor, pixels: Tensor) -> float:
    """Mean negative log likelihood, in nats per pixel; labels int64 [N], pixels int64 [N, 64]."""
    logits = model(digits_ids(labels, pixels))
    return F.cross_entropy(logits.transpose(1, 2), pixels).item()


@torch.no_grad()
def digits_sample(model: nn.Module, labels: Tensor, guidance: float, generator: torch.Generator) -> Tensor:
    """Pixels int64 [N, 64] drawn at temperature 1, one image per label (int64 [N]), by plain repeated forwards.

    Logits are null + guidance * (conditional - null); guidance 1 is the model's own distribution.
    """
    ids = digits.LEVELS + labels[:, None]
    null = torch.full_like(ids, digits.NULL)
    for _ in range(digits.CAPACITY):
        logits = model(ids)[:, -1]
        if guidance != 1.0:
            base = model(torch.cat([null, ids[:, 1:]], dim=1))[:, -1]
            logits = base + guidance * (logits - base)
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
    return ids[:, 1:]


def digits_measure(model: nn.Module) -> dict[str, Any]:
    """Held-out NLLs in nats per pixel, and how often a classifier reads the class asked for off sampled images."""
    from sklearn.svm import SVC

    fit, stop, held, _ = digits_data()
    seen = torch.cat([fit[1], stop[1]])
    shares = (torch.bincount(seen.flatten(), minlength=digits.LEVELS) + 1.0).log()
    nll = digits_nll(model, *held)
    judge = SVC(gamma=0.001).fit(seen.numpy(), torch.cat([fit[0], stop[0]]).numpy())
    asked = torch.arange(digits.CLASSES).repeat(20)
    accuracy = {}
    for guidance in (1.0, 2.0):
        drawn = digits_sample(model, asked, guidance, torch.Generator().manual_seed(SEED))
        accuracy[guidance] = float((judge.predict(drawn.numpy()) == asked.numpy()).mean())
    return {
        "nll": nll,
        "bits_per_pixel": nll / math.log(2),
        "nll_without_class": digits_nll(model, torch.full_like(held[0], digits.CLASSES), held[1]),
        "unigram_nll": -shares.log_softmax(0)[held[1]].mean().item(),
        "images": len(held[0]),
        "sampled_images": len(asked),
        "sampled_class_accuracy": accuracy[1.0],
        "sampled_class_accuracy_guidance_2": accuracy[2.0],
        "classifier_accuracy_on_real_images": float(judge.score(held[1].numpy(), held[0].numpy())),
    }


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pixels int64 [N, 64], half of the images moved by up to one pixel each way; paper comes in at the edge."""
    n = len(pixels)
    padded = F.pad(pixels.view(n, digits.SIDE, digits.SIDE), (1, 1, 1, 1))
    move = torch.randint(3, (n, 2), generator=generator)
    move[torch.rand(n, generator=generator) >= 0.5] = 1
    span = torch.arange(digits.SIDE)
    rows, columns = move[:, :1] + span, move[:, 1:] + span
    return padded[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]].view(n, -1)


def train_digits(steps: int, out: Path) -> dict[str, Any]:
    """Train digits-ar, write its checkpoint into out and return its record but for the measurements."""
    from safetensors.torch import save_file

    fit, stop, _, sha = digits_data()
    model = digits.DigitsAR(dropout=0.35)
    generator = torch.Generator().manual_seed(SEED)
    best, best_step, weights = math.inf, 0, {}
    for step, _ in optimise(model.train(), steps, peak=1.5e-3, decay=0.1):
        if step % 50 == 0:
            nll = digits_nll(model.eval(), *stop)
            model.train()
            log(f"digits-ar step {step}/{steps}: {nll:.4f} nats/pixel on the stopping split")
            if nll < best:
                best, best_step = nll, step
                weights = {name: value.clone() for name, value in model.state_dict().items()}
        pick = torch.randint(len(fit[0]), (64,), generator=generator)
        # One image in ten trains the null class.
        labels = torch.where(torch.rand(64, generator=generator) < 0.1, digits.CLASSES, fit[0][pick])
        pixels = shifted(fit[1][pick], generator)
        loss = F.cross_entropy(model(digits_ids(labels, pixels)).transpose(1, 2), pixels)
        torch.autograd.backward(loss)
    save_file({name: value.bfloat16() for name, value in weights.items()}, out / "digits-ar.safetensors")
    return {"best_step": best_step, "parameters": parameters(model), "data": "sklearn load_digits", "data_sha256": sha}


# text-ar


@torch.no_grad()
def text_nll(model: nn.Module, ids: Tensor, length: int) -> float:
    """Mean negative log likelihood, in nats per id, over consecutive windows of length ids of ids int64 [N].

    Every id but the first of each window counts, with the ids before it in its window as context.
    """
    windows = ids[: len(ids) // length * length].view(-1, length)
    total = 0.0
    for batch in torch.split(windows, max(1, 8192 // length)):
        logits = model(input_ids=batch, use_cache=False).logits
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


def train_text(steps: int, out: Path) -> dict[str, Any]:
    """Train text-ar, write its Hugging Face directory into out and return its record but for the measurements.

    The last fifth of the steps reads sequences as long as the model's capacity, to train it at every position.
    """
    train, held = text.split()
    stream, check = torch.tensor(text.stream(train)), torch.tensor(text.stream(held)[:16384])
    model = text.build().train()
    generator = torch.Generator().manual_seed(SEED)
    for step, _ in optimise(model, steps, peak=2e-3, decay=0.1):
        if step % 100 == 0:
            log(f"text-ar step {step}/{steps}: {text_nll(model, check, 256):.4f} nats/byte on a held-out slice")
        rows, length = (12, 256) if step < steps * 4 // 5 else (3, text.CAPACITY)
        starts = torch.randint(len(stream) - length, (rows, 1), generator=generator)
        batch = stream[starts + torch.arange(length + 1)]
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        torch.autograd.backward(F.cross_entropy(logits.transpose(1, 2), batch[:, 1:]))
    directory = out / "text-ar"
    model.to(torch.bfloat16).save_pretrained(directory)
    text.tokenizer().save_pretrained(directory)
    return {
        "parameters": parameters(model),
        "data": f"documents of Python {platform.python_version()}",
        "documents": len(train),
        "ids": len(stream),
        "data_sha256": text.digest(train),
    }


def measure(name: str, model: nn.Module) -> dict[str, Any]:
    """The held-out measurements recorded for the reference model called name."""
    if isinstance(model, canvas.CanvasLM):
        return train_canvas.measure(model)
    return digits_measure(model) if name == "digits-ar" else text_measure(model)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aropt.models.train", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(STEPS))
    parser.add_argument("--steps", type=int, help=f"optimizer steps (default: {STEPS})")
    parser.add_argument("--out", type=Path, default=CHECKPOINTS, help="folder for the checkpoint and its record")
    parser.add_argument("--evaluate", action="store_true", help="measure the shipped checkpoint instead of training")
    arguments = parser.parse_args()
    name, out = arguments.name, arguments.out
    if arguments.evaluate:
        measured = measure(name, load(name))
        if measured.get("data_sha256") != REFERENCES[name].heldout.get("data_sha256"):
            log("note: this Python's held-out documents differ from those of the recorded measurement")
        print(json.dumps(measured, indent=1))
        return
    torch.manual_seed(SEED)
    steps = STEPS[name] if arguments.steps is None else arguments.steps
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if name in CANVAS:

        def tune(model: canvas.CanvasLM, stream: Tensor) -> dict[str, Any]:
            return tune_canvas.tune(model, stream, TUNED, optimise, log)

        made = train_canvas.train(name, steps, out, optimise, log, tune)
    else:
        made = (train_digits if name == "digits-ar" else train_text)(steps, out)
    seconds = round(time.perf_counter() - start)
    model = load(name, out)
    heldout = measure(name, model.eval())
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
