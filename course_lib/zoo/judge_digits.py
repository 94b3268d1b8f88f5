"""How a model of the digits is judged: is the class right, is the set right, and is it copied?

Accuracy and Frechet distance alone pass for a plain Gaussian per class, and neither sees memorising, so
precision, recall and the distance to the nearest training image stand beside them, each next to references.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics
from course_lib.devices import SampleNoise, autocast
from course_lib.gaussians import Empirical
from course_lib.guidance import cfg
from course_lib.sample import sample
from course_lib.training import denoising_loss
from course_lib.types import Denoiser
from course_lib.worlds import digits

LOSS_SIGMAS = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)


def draw(D: Any, labels: Tensor, sigmas: Tensor, *, guidance: float = 1.0, seed: int = 0, batch: int = 500) -> Tensor:
    """Sample one digit per label with DDIM along `sigmas`; (N, 1, 16, 16), clipped to [-1, 1]."""
    out = []
    for first in range(0, len(labels), batch):
        chunk = labels[first : first + batch]
        null = torch.full_like(chunk, digits.CLASSES)
        noise = SampleNoise(seed, first)
        x = noise.start((len(chunk), *digits.SHAPE), sigmas[0])
        with autocast(x.device):
            out.append(sample(cfg(D.given(label=chunk), D.given(label=null), guidance), x, sigmas).clamp(-1, 1))
    return torch.cat(out)


def class_gaussians(rows: Tensor, labels: Tensor, wanted: Tensor, seed: int = 0) -> Tensor:
    """A Gaussian fitted to each class of grey values (N, 64), sampled: what accuracy and Frechet distance cannot reject."""
    generator = torch.Generator().manual_seed(seed)
    out = rows.new_empty(len(wanted), rows.shape[1])
    for c in range(digits.CLASSES):
        mine = rows[labels == c]
        cov = torch.cov(mine.T) + 1e-6 * torch.eye(rows.shape[1], dtype=rows.dtype)  # some pixels never change
        z = torch.randn(int((wanted == c).sum()), rows.shape[1], generator=generator, dtype=rows.dtype)
        out[wanted == c] = mine.mean(0) + z @ torch.linalg.cholesky(cov).T
    return out.clamp(0, 1)


def kernel_density(rows: Tensor, n: int, seed: int = 0) -> Tensor:
    """scikit-learn's Gaussian KDE on grey values (N, 64), its bandwidth chosen by cross-validation, sampled."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.neighbors import KernelDensity

    search = GridSearchCV(KernelDensity(), {"bandwidth": [0.03, 0.05, 0.07, 0.1, 0.15, 0.2]}, cv=3).fit(rows.numpy())
    return torch.as_tensor(search.best_estimator_.sample(n, random_state=seed), dtype=rows.dtype).clamp(0, 1)


def grey(images: Tensor) -> Tensor:
    """8 x 8 grey values in [0, 1] of images (N, 1, 16, 16), as float64 (N, 64): the space of all distances here."""
    return digits.pixels(images).double()


def quality(samples: Tensor, real: Tensor, spread: bool = False) -> dict[str, Any]:
    """Frechet distance over 16 PCA features, precision and recall (k = 3), and the distance to the training set; rows of `grey`.

    `spread` adds a bootstrap interval of the Frechet distance.
    """
    features = metrics.pca_features(grey(digits.load("all")[0]), 16)
    a, b = features(real), features(samples)
    precision, recall = metrics.precision_recall(real, samples)
    result: dict[str, Any] = {
        "frechet": round(metrics.frechet_distance(a, b), 4),
        "precision": round(precision, 3),
        "recall": round(recall, 3),
        "nearest_training_distance_ratio": round(copying(samples), 3),
    }
    if spread:
        result["frechet_interval"] = [round(end, 4) for end in metrics.bootstrap(metrics.frechet_distance, a, b)]
    return result


def references(seed: int = 0) -> dict[str, dict[str, Any]]:
    """Half of the real data against the other half, a Gaussian per class, and a KDE: what the numbers mean.

    The Gaussian falls to precision. The KDE passes precision and recall, since it is the training set with a
    little blur: only the distance to the training set, under 0.85 of that of held-out digits, gives it away.
    """
    images, labels = digits.load("all")
    train, train_labels = digits.load("train")
    real, rows = grey(images), grey(train)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
    half = len(real) // 2
    halves = quality(real[order[:half]], real[order[half:]])
    del halves["nearest_training_distance_ratio"]  # most of either half is the training set
    return {
        "real half against half": halves,
        "Gaussian per class": quality(class_gaussians(rows, train_labels, labels, seed), real),
        "kernel density": quality(kernel_density(rows, len(real), seed), real),
    }


def copying(samples: Tensor) -> float:
    """Median distance of samples (rows of `grey`) to the nearest training image, over that of held-out images.

    1 means no nearer than new digits are, 0 that all are copies.
    """
    train, held_out = (grey(digits.load(split)[0]) for split in ("train", "test"))
    near = metrics.nearest_distance(samples, train).median()
    return float(near / metrics.nearest_distance(held_out, train).median())


@torch.no_grad()
def loss_by_sigma(D: Any, split: str, draws: int = 4) -> list[float]:
    """Mean |D - x0|^2 / d on a split at each of LOSS_SIGMAS, with the same noise for every model."""
    images, labels = digits.load(split)
    given = D.given(label=labels) if hasattr(D, "given") else D
    values = []
    for k, level in enumerate(LOSS_SIGMAS):
        sigma = torch.full((len(images),), level)
        runs = [denoising_loss(given, images, sigma, SampleNoise(100 * k + j)(images), "x0").mean() for j in range(draws)]
        values.append(float(torch.stack(runs).mean()))
    return values


@torch.no_grad()
def judge(D: Any, readers: dict[str, nn.Module], *, guidance: float, sigmas: Tensor, n: int = 5000) -> dict[str, Any]:
    """Every number of the card of a digit model. `readers` maps names to classifiers."""
    images, labels = digits.load("all")
    asked = labels[torch.arange(n) % len(labels)]  # the real classes, over and over
    asked_samples = draw(D, asked, sigmas, guidance=guidance, seed=1)
    free = draw(D, torch.full((n,), digits.CLASSES), sigmas, seed=2)
    plain = asked_samples[: len(labels)] if guidance == 1 else draw(D, labels, sigmas, seed=1)
    train_loss, test_loss = loss_by_sigma(D, "train"), loss_by_sigma(D, "test")
    memory: Denoiser = Empirical(digits.load("train")[0])
    read = {name: reader(asked_samples).argmax(1) for name, reader in readers.items()}
    first = next(iter(readers.values()))
    return {
        "class_read_as_asked": {name: round(float((r == asked).double().mean()), 4) for name, r in read.items()},
        "unconditional_class_histogram": first(free).argmax(1).bincount(minlength=digits.CLASSES).tolist(),
        "quality_at_guidance_1": quality(grey(plain), grey(images), spread=True),
        "references": references(),
        "loss_sigmas": list(LOSS_SIGMAS),
        "loss_train": [round(v, 5) for v in train_loss],
        "loss_held_out": [round(v, 5) for v in test_loss],
        "loss_empirical_denoiser_train": [round(v, 5) for v in loss_by_sigma(memory, "train")],
        "loss_empirical_denoiser_held_out": [round(v, 5) for v in loss_by_sigma(memory, "test")],
    }
