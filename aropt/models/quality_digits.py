"""How good sampled digits are: classes as a judge reads them, and a Fréchet distance in a small classifier's features.

The distance compares means and covariances of two sets of features as Heusel et al. (1706.08500) do.  The features are
those of a classifier of 8x8 digits, not of Inception: no figure here is an FID.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aropt.models import digits, shuffle, train_digits
from aropt.models.optimise import SEED, optimise

SAMPLED = 100  # images of each class
FEATURES = 32
STEPS = 400  # of training the classifier


class Classifier(nn.Module):
    """Pixels int64 [N, 64] to logits float32 [N, 10]; `features` is its penultimate layer."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Conv2d(1, 16, 3, padding=1)
        self.far = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.dense = nn.Linear(32 * 16, FEATURES)
        self.head = nn.Linear(FEATURES, digits.CLASSES)

    def features(self, pixels: Tensor) -> Tensor:
        """Pixels int64 [N, 64] to float32 [N, FEATURES]."""
        x = pixels.view(-1, 1, digits.SIDE, digits.SIDE) / (digits.LEVELS - 1)
        x = F.relu(self.far(F.relu(self.near(x))))
        return F.relu(self.dense(x.flatten(1)))

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(pixels))
        return logits


@functools.cache
def classifier() -> Classifier:
    """Trained on the fitting split and its shifts; the same every time on the same machine."""
    fit, _, _, _ = train_digits.data()
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(SEED)
        model = Classifier()
        for _ in optimise(model, STEPS, peak=3e-3, decay=0.01):
            pick = torch.randint(len(fit[0]), (128,), generator=generator)
            pixels = train_digits.shifted(fit[1][pick], generator)
            torch.autograd.backward(F.cross_entropy(model(pixels), fit[0][pick]))
    return model.eval().requires_grad_(False)


@functools.cache
def judge() -> Any:
    """A support vector machine that knows all images but the held-out ones."""
    from sklearn.svm import SVC

    fit, stop, _, _ = train_digits.data()
    return SVC(gamma=0.001).fit(torch.cat([fit[1], stop[1]]).numpy(), torch.cat([fit[0], stop[0]]).numpy())


def frechet(a: Tensor, b: Tensor) -> float:
    """The Fréchet distance of normal distributions fitted to features float [N, d] and [M, d]."""
    mean_a, mean_b = a.double().mean(0), b.double().mean(0)
    cov_a, cov_b = a.double().T.cov(), b.double().T.cov()
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def sampled(model: nn.Module, guidance: float, seed: int = SEED, each: int = SAMPLED) -> dict[str, float]:
    """Class accuracy of `each` drawn images of each class, and their Fréchet distance from the held-out images."""
    asked = torch.arange(digits.CLASSES).repeat(each)
    drawn = train_digits.sample(model, asked, guidance, torch.Generator().manual_seed(seed))
    held, features = train_digits.data()[2], classifier().features
    return {
        "class_accuracy": float((judge().predict(drawn.numpy()) == asked.numpy()).mean()),
        "frechet_distance": frechet(features(drawn), features(held[1])),
    }


def floor() -> dict[str, float]:
    """What the measures give for real images: training images in place of drawn ones, the judges on held-out ones."""
    fit, stop, held, _ = train_digits.data()
    model = classifier()
    seen = torch.cat([fit[1], stop[1]])
    return {
        "class_accuracy": float(judge().score(held[1].numpy(), held[0].numpy())),
        "frechet_distance": frechet(model.features(seen), model.features(held[1])),
        "features_classifier_accuracy": float((model(held[1]).argmax(1) == held[0]).float().mean()),
    }


def measure(model: nn.Module) -> dict[str, Any]:
    """Held-out NLLs in nats per pixel, how often a judge reads the class asked for off sampled images, distances."""
    fit, stop, held, _ = train_digits.data()
    seen = torch.cat([fit[1], stop[1]])
    shares = (torch.bincount(seen.flatten(), minlength=digits.LEVELS) + 1.0).log()
    nll = train_digits.nll(model, *held)
    plain, guided = sampled(model, 1.0), sampled(model, 2.0)
    return {
        "nll": nll,
        "bits_per_pixel": nll / math.log(2),
        "nll_without_class": train_digits.nll(model, torch.full_like(held[0], digits.CLASSES), held[1]),
        "unigram_nll": -shares.log_softmax(0)[held[1]].mean().item(),
        "images": len(held[0]),
        "sampled_images": SAMPLED * digits.CLASSES,
        "sampled_class_accuracy": plain["class_accuracy"],
        "sampled_class_accuracy_guidance_2": guided["class_accuracy"],
        "frechet_distance": plain["frechet_distance"],
        "frechet_distance_guidance_2": guided["frechet_distance"],
        "classifier_accuracy_on_real_images": floor()["class_accuracy"],
        "frechet_distance_of_training_images": floor()["frechet_distance"],
        **({"steps_of_an_image": model.capacity} if isinstance(model, shuffle.ShuffleAR) else {}),
    }
