"""`scenes-prior`: an unconditional model of scenes of 32 pixels, the prior of inverse problems.

EDM preconditioning (Karras et al. 2022), on every level from noise that hides all to noise that cannot be seen.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics, zoo
from course_lib.denoisers import NetworkDenoiser, from_edm
from course_lib.devices import SampleNoise, autocast
from course_lib.multistep import dpm_solver_pp_2m
from course_lib.nets.unet import Folded
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.training import Fit, check_data, denoising_loss, edm_weight, fit, lognormal_sigmas
from course_lib.worlds.scenes.dataset import SceneDataset

DATA = "the scene world at 32 px: 20,000 training scenes of seed 31, one object"
SIZE = 32
SHAPE = (3, SIZE, SIZE)
SCENES = {"train": (20_000, 31), "validation": (256, 32), "held out": (1_000, 33), "other": (1_000, 34)}
"""Split -> scenes of one object, and their seed."""
SIGMA_DATA, SIGMA_MEAN, SIGMA_STD = 0.5, -1.0, 1.5
BATCH, STEPS, LR, SEED = 32, 12_000, 2e-3, 9
JUDGED = (0.05, 0.1, 0.3, 1.0, 3.0)


def grid(steps: int = 30) -> Tensor:
    """The levels at which the card's samples are drawn: Karras's, from 40 to 0.01, and 0."""
    return karras(steps, sigma_min=0.01, sigma_max=40.0)


@functools.cache
def pictures(split: str) -> Tensor:
    """Pictures of a split, (N, 3, 32, 32) in [-1, 1]."""
    n, seed = SCENES[split]
    return SceneDataset(n, seed, SIZE).cached().pictures(torch.arange(n))


def network(name: str = "scenes-prior") -> Folded:
    """The untrained network."""
    return Folded(3, (48, 64), blocks=1, attention=(1,))


def wrap(net: nn.Module) -> NetworkDenoiser:
    """What `zoo.load` returns: the Denoiser of pictures (B, 3, 32, 32)."""
    return from_edm(net.eval(), SIGMA_DATA)


def train(
    name: str = "scenes-prior", net: nn.Module | None = None, steps: int = STEPS, lr: float = LR, seed: int = SEED, **options: Any
) -> Fit:
    """Minimise EDM's loss on the training scenes."""
    data = check_data(pictures("train"), "pictures")

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        rows = torch.randint(len(data), (BATCH,), generator=source)
        return data[rows], lognormal_sigmas(BATCH, SIGMA_MEAN, SIGMA_STD, source), torch.randn(BATCH, *SHAPE, generator=source)

    def loss(net: nn.Module, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return denoising_loss(from_edm(net, SIGMA_DATA), x0, sigma, eps, edm_weight(SIGMA_DATA))

    if net is None:
        torch.manual_seed(seed)
        net = network(name)
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, nhwc=False, **options)


@torch.no_grad()
def draw(D: NetworkDenoiser, n: int, seed: int, batch: int = 250) -> Tensor:
    """n pictures in 30 steps of DPM-Solver++(2M)."""
    found, sigmas = [], grid()
    for first in range(0, n, batch):
        start = SampleNoise(seed, first).start((min(batch, n - first), *SHAPE), sigmas[0])
        with autocast(start.device):
            found.append(sample(D, start, sigmas, dpm_solver_pp_2m).float().clamp(-1, 1))
    return torch.cat(found)


def features(x: Tensor) -> Tensor:
    """The reader's features of pictures, (N, d), at the reader's 64 pixels."""
    large = nn.functional.interpolate(x, (64, 64), mode="bicubic").clamp(-1, 1)
    return zoo.load("scenes-reader", device="cpu").features(large)


@torch.no_grad()
def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """PSNR of denoised held-out pictures, and the Frechet distance of samples beside that of other real pictures."""
    D, real = wrap(net), pictures("held out")
    x0, noise = real[:256], SampleNoise(1)
    denoised = {}
    for sigma in JUDGED:
        with autocast("cpu"):
            again = D(x0 + sigma * noise(x0), torch.tensor(sigma)).float()
        denoised[f"{sigma:g}"] = round(metrics.psnr(again, x0), 2)
    return {
        "psnr_of_denoised": denoised,
        "frechet": round(metrics.frechet_distance(features(draw(D, len(real), seed=2)), features(real)), 4),
        "frechet_of_real": round(metrics.frechet_distance(features(pictures("other")), features(real)), 4),
    }
