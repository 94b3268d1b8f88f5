"""`digits-classifier`: p(class | x, sigma) of noised digits at the levels of `digits`, for classifier guidance.

Cross-entropy at every level from 15 to 0.01, even in ln sigma. No label smoothing and no augmentation: what guides is the
gradient of log p(c | x), so that the probabilities themselves must be right for the data as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.devices import SampleNoise
from course_lib.guidance import Classifier, NetworkClassifier, classifier_guidance, noise_blind
from course_lib.nets.noisy_reader import NoisyReader
from course_lib.training import Fit, check_data, fit
from course_lib.types import right
from course_lib.worlds import digits
from course_lib.zoo.recipes.digits import SIGMA_DATA, grid

DATA = "scikit-learn's load_digits, the first 1,437 images of the file, 16 x 16, with noise"
BATCH, STEPS, LR, SEED = 128, 3000, 1e-3, 3
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
"""Where the card is judged."""


def network(name: str = "digits-classifier") -> NoisyReader:
    """The untrained classifier."""
    return NoisyReader()


def wrap(net: nn.Module) -> NetworkClassifier:
    """What `zoo.load` returns: the Classifier, (x, sigma) -> logits."""
    return NetworkClassifier(net.eval(), SIGMA_DATA)


def train(name: str, net: nn.Module | None = None, steps: int = STEPS, lr: float = LR, seed: int = SEED, **options: Any) -> Fit:
    """Cross-entropy on noised training digits."""
    images, labels = digits.load("train")
    check_data(images, "images")
    ends = grid(2)
    low, high = math.log(ends[-2]), math.log(ends[0])

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        # one level in each of BATCH strata: the same distribution, a loss that varies less
        u = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        sigma = (low + (high - low) * u).exp()
        eps = torch.randn((BATCH, *digits.SHAPE), generator=generator)
        return images[rows] + right(sigma, eps) * eps, sigma, labels[rows]

    def loss(net: nn.Module, x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(NetworkClassifier(net, SIGMA_DATA)(x, sigma).float(), label, reduction="none")

    torch.manual_seed(seed)
    return fit(network() if net is None else net, draw, loss, steps=steps, lr=lr, seed=seed, weight_decay=0.05, **options)


@torch.no_grad()
def reading(classifier: Classifier, split: str, sigma: float, draws: int = 4) -> tuple[float, float]:
    """Share of noised digits of a split that are read rightly, and the cross-entropy in nats."""
    images, labels = digits.load(split)
    right_, nats = [], []
    for seed in range(draws):
        logits = classifier(images + sigma * SampleNoise(seed)(images), torch.tensor(sigma))
        right_.append((logits.argmax(1) == labels).double().mean())
        nats.append(F.cross_entropy(logits.float(), labels))
    return float(torch.stack(right_).mean()), float(torch.stack(nats).mean())


@torch.no_grad()
def alignment(classifier: Classifier, sigma: float, n: int = 360) -> float:
    """Mean cosine between sigma^2 grad log p(c | x) and D(x | c) - D(x), what the gradient of an ideal classifier would be.

    D is `digits`, whose two answers are those of one network, and x noised held-out digits with their own classes.
    """
    from course_lib import zoo

    D = zoo.load("digits", device="cpu")
    images, labels = (rows[:n] for rows in digits.load("test"))
    level = torch.tensor(sigma)
    x = images + sigma * SampleNoise(9)(images)
    implied = D.given(label=labels)(x, level) - D(x, level)
    found = classifier_guidance(lambda x, sigma: 0 * x, classifier, labels, 1.0)(x, level)
    return float(F.cosine_similarity(implied.flatten(1), found.flatten(1)).mean())


def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Accuracy, cross-entropy and alignment of the gradient at LEVELS, beside a reader of clean digits that is told no level."""
    from course_lib import zoo

    found: dict[str, Any] = {"sigmas": list(LEVELS)}
    for key, classifier in (("aware", wrap(net)), ("blind", noise_blind(zoo.load("digits-reader", device="cpu")))):
        read = [reading(classifier, "test", sigma) for sigma in LEVELS]
        found[key] = {
            "accuracy_held_out": [round(accuracy, 4) for accuracy, _ in read],
            "nats_held_out": [round(nats, 4) for _, nats in read],
            "gradient_cosine": [round(alignment(classifier, sigma), 3) for sigma in LEVELS],
        }
    found["aware"]["accuracy_train"] = [round(reading(wrap(net), "train", sigma, 1)[0], 4) for sigma in LEVELS]
    found["nats_of_a_guess"] = round(math.log(digits.CLASSES), 4)
    return found
