"""`digits`: a class-conditional U-Net that draws handwritten digits, 16 x 16, with a null class for guidance.

EDM preconditioning (Karras et al. 2022) and condition dropout (Ho and Salimans 2022). The data are few
(1,437 images): dropout and an early end keep the model from copying them; no augmentation, which would
change the distribution to be learned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.nets.unet import UNet
from course_lib.schedules import karras
from course_lib.training import Fit, check_data, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.worlds import digits

DATA = "scikit-learn's load_digits, the first 1,437 images of the file, 16 x 16"
SIGMA_DATA = 0.7
SIGMA_MEAN, SIGMA_STD = -0.8, 1.2
BATCH, STEPS, LR, SEED = 128, 3000, 1e-3, 0
CLASS_DROPOUT = 0.1
GUIDANCE = 1.0


def grid(steps: int = 50) -> Tensor:
    """The levels at which the card's samples are drawn: Karras's, from 15 to 0.01.

    First-order steps shrink the samples, and a narrower range leaves smaller steps: over 50 steps the deviation
    of a Gaussian falls by 3.5 %, against 5 % from 40 to 0.002 (see `tests/unit/test_zoo.py`).
    """
    return karras(steps, sigma_min=0.01, sigma_max=15.0)


def network(name: str = "digits") -> UNet:
    """The untrained U-Net."""
    return UNet(channels=1, widths=(32, 64), blocks=2, attention=(1,), classes=digits.CLASSES, dropout=0.1)


def wrap(net: UNet) -> NetworkDenoiser:
    """What `zoo.load` returns: the Denoiser; `D.given(label=...)` asks for classes (10 is the null class)."""
    return from_edm(net.eval(), SIGMA_DATA)


def train(
    name: str = "digits", net: UNet | None = None, steps: int = STEPS, lr: float = LR, seed: int = SEED, **options: Any
) -> Fit:
    """Minimise EDM's loss on the training digits."""
    images, labels = digits.load("train")
    check_data(images, "images")

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        sigma = lognormal_sigmas(BATCH, SIGMA_MEAN, SIGMA_STD, generator)
        eps = torch.randn((BATCH, *digits.SHAPE), generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < CLASS_DROPOUT
        return images[rows], sigma, eps, labels[rows].masked_fill(dropped, digits.CLASSES)

    def loss(net: UNet, x0: Tensor, sigma: Tensor, eps: Tensor, label: Tensor) -> Tensor:
        return denoising_loss(from_edm(net, SIGMA_DATA, label=label), x0, sigma, eps, edm_weight(SIGMA_DATA))

    torch.manual_seed(seed)
    return fit(network() if net is None else net, draw, loss, steps=steps, lr=lr, seed=seed, **options)


def judge(name: str, net: UNet) -> dict[str, Any]:
    """The numbers of the card: classes read back by both readers, quality beside references, and copying."""
    from course_lib import zoo
    from course_lib.zoo import judge_digits

    readers = {reader: zoo.load(reader, device="cpu") for reader in ("digits-reader", "digits-reader-2")}
    sigmas = grid()
    facts = {"guidance": GUIDANCE, "sampler": f"DDIM, {len(sigmas) - 1} steps, Karras grid from {sigmas[0]:g} to {sigmas[-2]:g}"}
    return {**facts, **judge_digits.judge(wrap(net), readers, guidance=GUIDANCE, sigmas=sigmas)}
