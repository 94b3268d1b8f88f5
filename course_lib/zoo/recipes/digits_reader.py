"""`digits-reader` and `digits-reader-2`: two classifiers of clean digits that judge what the models draw.

Their architectures and seeds differ, so that one confirms the other. Shifts by up to a pixel and small
noise are used in training; only the training split is seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.reader import ConvReader, MixingReader
from course_lib.training import Fit, fit
from course_lib.worlds import digits
from course_lib.zoo.recipes.settings import settings

DATA = "scikit-learn's load_digits, the first 1,437 images of the file, 16 x 16"
VARIANTS: dict[str, dict[str, Any]] = {
    "digits-reader": {"build": ConvReader, "steps": 1500, "lr": 2e-3, "seed": 1},
    "digits-reader-2": {"build": MixingReader, "steps": 2000, "lr": 1e-3, "seed": 2},
}
BATCH = 128


def network(name: str) -> nn.Module:
    """The untrained classifier of this name."""
    return VARIANTS[name]["build"]()


def wrap(net: nn.Module) -> nn.Module:
    """What `zoo.load` returns: the classifier, in evaluation mode."""
    return net.eval()


def train(
    name: str,
    net: nn.Module | None = None,
    steps: int | None = None,
    lr: float | None = None,
    seed: int | None = None,
    **options: Any,
) -> Fit:
    """Cross-entropy on shifted, slightly noisy training digits."""
    images, labels = digits.load("train")

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        dy, dx = (int(v) for v in torch.randint(-1, 2, (2,), generator=generator))
        x = F.pad(images[rows], (1, 1, 1, 1), value=-1.0)[:, :, 1 + dy : 17 + dy, 1 + dx : 17 + dx]
        return x + 0.1 * torch.randn(x.shape, generator=generator), labels[rows]

    def loss(net: nn.Module, x: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(net(x).float(), label, reduction="none", label_smoothing=0.05)

    chosen = settings(VARIANTS[name], steps=steps, lr=lr, seed=seed)
    torch.manual_seed(chosen["seed"])
    net = network(name) if net is None else net
    return fit(net, draw, loss, weight_decay=0.02, half=False, **chosen, **options)


@torch.no_grad()
def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """Accuracy on the held-out digits and on the training digits."""
    metrics: dict[str, Any] = {}
    for split in ("test", "train"):
        images, labels = digits.load(split)
        key = "accuracy_held_out" if split == "test" else "accuracy_train"
        metrics[key] = round(float((net.eval()(images).argmax(1) == labels).double().mean()), 4)
    return metrics
