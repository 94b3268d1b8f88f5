"""`scenes-blind`: super-resolution of scenes of 32 pixels whose blur is not known, by a network that is told the kernel.

Two halves, trained together: one guesses the kernel from the measurement, the other corrects what `scenes-prior` makes of the
noisy picture, beside the measurement and modulated by a kernel (BlindDiff; Li et al. 2024, who train one network from scratch and
guess from the noisy picture too). EDM preconditioning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from course_lib import metrics, zoo
from course_lib.denoisers import NetworkDenoiser
from course_lib.devices import SampleNoise, autocast, generator
from course_lib.nets.blind import BlindNet
from course_lib.posterior.blind import BlindSuperResolution, gaussian_kernels, log_covariance
from course_lib.training import Fit, check_data, edm_weight, fit, lognormal_sigmas
from course_lib.types import float64, right
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.zoo.recipes.scenes_prior import DATA, SCENES, SHAPE, SIGMA_DATA, SIGMA_MEAN, SIGMA_STD, SIZE, pictures

__all__ = ["DATA"]
A = BlindSuperResolution(SHAPE, size=15, factor=2)
SIGMA_Y = 0.01
STDS = (0.6, 2.4)
"""Deviations of the kernels along their two axes, in pixels, log-uniform; their angle is uniform."""
JITTER = 0.2
"""The kernel that the denoiser is told in training errs by this, as what it will be told does."""
BATCH, GUESSED, STEPS, LR, SEED = 24, 192, 500, 3e-3, 11
JUDGED = (0.05, 0.1, 0.3, 1.0, 3.0)


def draw_kernels(n: int, source: torch.Generator) -> Tensor:
    """Logarithms of the covariance (n, 3) of random kernels."""
    low, high = map(math.log, STDS)
    u = torch.rand(3, n, generator=source)
    axes = (low + (high - low) * u[:2]).exp()
    return log_covariance(axes[0], axes[1], math.pi * u[2])


def observe(x0: Tensor, theta: Tensor, source: torch.Generator) -> Tensor:
    """Measurements y of pictures x0 under the kernels theta, with noise of deviation SIGMA_Y."""
    clean = A(x0, gaussian_kernels(theta, A.kernel_shape[0]).to(x0.dtype))
    return clean + SIGMA_Y * torch.randn(clean.shape, generator=source, dtype=clean.dtype)


def round_kernel(std: float) -> Tensor:
    """theta (1, 3) of the kernel of this deviation, in pixels, in every direction."""
    return torch.tensor([[2 * math.log(std), 0.0, 2 * math.log(std)]], dtype=torch.float64)


SHARPEST, MIDDLE = round_kernel(STDS[0]), round_kernel(math.sqrt(math.prod(STDS)))
"""Hardly any blur, as plain super-resolution assumes, and the middle of the kernels that are drawn."""


def scenes(split: str, rows: Tensor) -> Tensor:
    """Pictures of a split, as `scenes_prior` has them, without the others."""
    return SceneDataset(*SCENES[split], SIZE).pictures(rows)


def network(name: str = "scenes-blind") -> BlindNet:
    """The untrained network."""
    return BlindNet(SHAPE, (16, 24), guess=128, floor=SIGMA_Y**2)


@dataclass(frozen=True)
class KernelDenoiser:
    """D(x, sigma) = P(x, sigma) + c_out net(c_in x, P, y, kernel): the prior P, corrected beside y by a network told a kernel.

    `given(y=..., kernel=...)` sets y (B, 3, 16, 16) and theta (B, 3); `guess` finds theta in y. c_in and c_out are EDM's.
    """

    net: BlindNet
    prior: NetworkDenoiser
    y: Tensor | None = None
    kernel: Tensor | None = None

    def given(self, **condition: Tensor) -> KernelDenoiser:
        return replace(self, **condition)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.corrected(x, sigma, self.prior(x, sigma).to(x.dtype))

    def corrected(self, x: Tensor, sigma: Tensor, x_hat: Tensor) -> Tensor:
        """D where x_hat = P(x, sigma) is known."""
        sigma = float64(sigma)
        _, c_out, c_in = (right(c, x) for c in self.prior.coefficients(sigma))
        time = self.prior.c_noise(sigma).to(x)
        return x_hat + c_out * self.net(c_in * x, time, x_hat, self.y, self.kernel).to(x.dtype)

    def guess(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of theta, (B, 3) each; of y alone, whatever x (B, ...) and sigma are."""
        mean, log_std = self.net.guess(self.y)
        return mean, log_std.exp()


def wrap(net: nn.Module) -> KernelDenoiser:
    """What `zoo.load` returns: a `posterior.blind.BlindDenoiser` of pictures (B, 3, 32, 32), once given y."""
    return KernelDenoiser(net.eval(), zoo.load("scenes-prior", device=str(next(net.parameters()).device)))


def train(
    name: str = "scenes-blind", net: nn.Module | None = None, steps: int = STEPS, lr: float = LR, seed: int = SEED, **options: Any
) -> Fit:
    """Minimise EDM's loss, the squared error of the guess, and -log p of that error under the guess's deviation."""
    data, prior = check_data(pictures("train"), "pictures"), zoo.load("scenes-prior", device="cpu")

    def draw(source: torch.Generator) -> tuple[Tensor, ...]:
        x0 = data[torch.randint(len(data), (BATCH + GUESSED,), generator=source)]
        theta = draw_kernels(len(x0), source)
        told = (theta + JITTER * torch.randn(theta.shape, generator=source))[:BATCH]
        y = observe(x0, theta, source)
        sigma = lognormal_sigmas(BATCH, SIGMA_MEAN, SIGMA_STD, source)
        x = x0[:BATCH] + right(sigma, x0[:BATCH]) * torch.randn(BATCH, *SHAPE, generator=source)
        with torch.no_grad(), autocast("cpu"):
            x_hat = prior(x, sigma).float()
        return x0[:BATCH], sigma, x, x_hat, told, y, theta

    def loss(
        net: nn.Module, x0: Tensor, sigma: Tensor, x: Tensor, x_hat: Tensor, told: Tensor, y: Tensor, theta: Tensor
    ) -> Tensor:
        D = KernelDenoiser(net, prior, y[: len(x0)], told)
        denoised = (D.corrected(x, sigma, x_hat) - x0).float().square().flatten(1).mean(1)
        mean, log_std = (part.float() for part in net.guess(y))
        error = mean - theta
        surprise = (error.detach() * (-log_std).exp()).square() / 2 + log_std
        return edm_weight(SIGMA_DATA)(sigma) * denoised + error.square().mean() + 0.1 * surprise.mean()

    if net is None:
        torch.manual_seed(seed)
        net = network(name)
    return fit(net, draw, loss, steps=steps, lr=lr, seed=seed, nhwc=False, **options)


@torch.no_grad()
def judge(name: str, net: nn.Module) -> dict[str, Any]:
    """PSNR of denoised held-out pictures told the true kernel, beside the prior's, which sees no y; and the guess's error."""
    D, x0 = wrap(net), scenes("held out", torch.arange(96))
    theta, noise = draw_kernels(len(x0), generator(SEED, 1)), SampleNoise(1)
    y = observe(x0, theta, generator(SEED, 2))
    told, denoised = D.given(y=y, kernel=theta), {}
    for level in map(torch.tensor, JUDGED):
        x = x0 + level * noise(x0)
        with autocast("cpu"):
            x_hat = D.prior(x, level).float()
            pair = told.corrected(x, level, x_hat), x_hat
        denoised[f"{level:g}"] = [round(metrics.psnr(again, x0), 2) for again in pair]
    mean, std = told.guess(x0, level)
    return {
        "psnr_of_denoised_and_of_prior": denoised,
        "rms_of_guess": round(float((mean - theta).square().mean().sqrt()), 4),
        "rms_of_middle": round(float((theta - MIDDLE).square().mean().sqrt()), 4),
        "rms_of_guess_over_its_deviation": round(float(((mean - theta) / std).square().mean().sqrt()), 3),
    }
