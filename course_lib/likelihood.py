"""The variational bound on the likelihood, term by term."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from course_lib.gaussians import Mixture
from course_lib.types import Denoiser, Noise, check_grid


@dataclass(frozen=True)
class Bound:
    """The three parts of the variational bound, each (B,), in bits per dimension.

    Their sum, `total`, bounds -log2 p(x0) / d of the model from above, on average over its noise.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def total(self) -> Tensor:
        """prior + diffusion + reconstruction."""
        return self.prior + self.diffusion + self.reconstruction


@torch.no_grad()
def variational_bound(D: Denoiser, x0: Tensor, sigmas: Tensor, noise: Noise) -> Bound:
    """The bound of DDPM's ancestral sampler on -log2 p(x0) per dimension (Ho et al. 2020, Eq. 5; VDM Eq. 13).

    `sigmas` falls to a last level sigma_1 > 0. With N(0, 1 + sigma_T^2) as the prior of x_T,
    prior           KL( N(x0, sigma_T^2) || N(0, 1 + sigma_T^2) )
    diffusion       sum_i 1/2 (1/sigma_{i-1}^2 - 1/sigma_i^2) |x0 - D(x_i, sigma_i)|^2, one draw of x_i for each i
    reconstruction  -log N(x0; D(x_1, sigma_1), sigma_1^2)
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1] or sigmas[-1] == 0:
        raise ValueError(f"sigmas ends at {sigmas[-1]:.6g}; expected a falling grid whose last level is above 0")
    d = x0[0].numel()
    to_bits = 1 / (d * math.log(2))

    def squared(x: Tensor) -> Tensor:
        return x.double().square().flatten(1).sum(1)

    top, low = float(sigmas[0]), float(sigmas[-1])
    variance = 1 + top**2
    prior = (squared(x0) / variance + d * (top**2 / variance - 1 + math.log(variance / top**2))) / 2
    diffusion = torch.zeros_like(prior)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        error = squared(x0 - D(x0 + sigma.to(x0) * noise(x0), sigma))
        diffusion += float(sigma_next**-2 - sigma**-2) / 2 * error
    error = squared(x0 - D(x0 + low * noise(x0), sigmas[-1]))
    reconstruction = error / (2 * low**2) + d / 2 * math.log(2 * math.pi * low**2)
    return Bound(prior * to_bits, diffusion * to_bits, reconstruction * to_bits)


def bound_gap(gaussian: Mixture, sigmas: Tensor) -> float:
    """How far the bound with the exact denoiser is above E[-log2 p(x0)] / d of one Gaussian N(m, C), in bits per dimension.

    The mean of `variational_bound(...).total` minus the entropy, in closed form. Along an axis of variance v it adds
    prior           KL( N(m, v + sigma_T^2) || N(0, 1 + sigma_T^2) )
    diffusion       sum_i (r_i - log(1 + r_i)) / 2,  r_i = v sigma_i^2 / (v + sigma_i^2) (1/sigma_{i-1}^2 - 1/sigma_i^2):
                    the true reverse step has the model's mean and 1 + r_i times its variance
    reconstruction  (c - 1 - log c) / 2,  c = v / (v + sigma_1^2)

    r - log(1 + r) is r^2 / 2 for small steps, so that T times as many of them have a gap T times smaller, apart from the
    two ends. `sigmas` falls to a last level above 0. Raises ValueError for another grid or several components.
    """
    sigmas = check_grid(sigmas)
    if sigmas[0] < sigmas[-1] or sigmas[-1] == 0:
        raise ValueError(f"sigmas ends at {sigmas[-1]:.6g}; expected a falling grid whose last level is above 0")
    if len(gaussian.weights) > 1:
        raise ValueError(f"gaussian has {len(gaussian.weights)} components; expected one, whose gap is closed")
    v, m = gaussian.variances[0], gaussian.means[0] @ gaussian.axes[0]  # (d,)
    top, low = sigmas[0], sigmas[-1]
    ratio = (v + top**2) / (1 + top**2)
    nats = ((ratio - 1 - ratio.log() + m**2 / (1 + top**2)) / 2).sum()
    s = sigmas[:-1, None]  # (T, 1)
    r = v * s**2 / (v + s**2) * (sigmas[1:, None] ** -2 - s**-2)
    nats += ((r - r.log1p()) / 2).sum()
    c = v / (v + low**2)
    nats += ((c - 1 - c.log()) / 2).sum()
    return float(nats) / gaussian.dim / math.log(2)
