"""`scenes-pyramid`: one network for scenes of 8, 16 and 32 pixels, which knows by the pixels' positions which it sees.

Pyramidal denoising diffusion (Ryu and Ye 2022): the same weights draw a small picture and refine it twice. The loss is EDM's
(Karras et al. 2022), each step at one resolution.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.denoisers import from_edm
from course_lib.nets.positioned import Positioned
from course_lib.training import Fit, check_data, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.zoo.recipes.scenes_prior import DATA, SIGMA_DATA, SIGMA_MEAN, SIGMA_STD, judge, wrap
from course_lib.zoo.recipes.scenes_prior import pictures as large

SIZES = (8, 16, 32)
BATCH = {8: 96, 16: 64, 32: 32}
"""Pictures in a step at each resolution: small ones are cheap."""
STEPS, LR, SEED = 14_000, 2e-3, 9
__all__ = ["DATA", "judge", "network", "train", "wrap"]


@functools.cache
def pictures(split: str, size: int = 32) -> Tensor:
    """Pictures of a split at a resolution, (N, 3, size, size) in [-1, 1]: means of the blocks of those of 32 pixels."""
    return F.avg_pool2d(large(split), 32 // size)


def network(name: str = "scenes-pyramid", positioned: bool = True) -> Positioned:
    """The untrained network."""
    return Positioned(3, (32, 40), positioned, blocks=1, attention=(1,))


def train(
    name: str = "scenes-pyramid",
    net: nn.Module | None = None,
    steps: int = STEPS,
    lr: float = LR,
    seed: int = SEED,
    **options: Any,
) -> Fit:
    """Minimise EDM's loss on the training scenes, at a resolution drawn anew for each step."""
    data = {size: check_data(pictures("train", size), "pictures") for size in SIZES}

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        size = SIZES[int(torch.randint(len(SIZES), (), generator=source))]
        rows = torch.randint(len(data[size]), (BATCH[size],), generator=source)
        sigma = lognormal_sigmas(len(rows), SIGMA_MEAN, SIGMA_STD, source)
        return data[size][rows], sigma, torch.randn(len(rows), 3, size, size, generator=source)

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return denoising_loss(from_edm(net, SIGMA_DATA), x0, sigma, eps, edm_weight(SIGMA_DATA))

    if net is None:
        torch.manual_seed(seed)
        net = network(name)
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, nhwc=False, **options)
