"""Denoising diffusion restoration: each coordinate of the SVD weighs its own measurement against the noise of the level."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import noise_in, over
from course_lib.operators.base import LinearOperator, Operator
from course_lib.posterior.checks import check_share, drawn, for_batch
from course_lib.posterior.spectral import Spectrum
from course_lib.steps import check_falling
from course_lib.types import Denoiser, Noise, Step, right


def ddrm(A: LinearOperator, y: Tensor, sigma_y: float, noise: Noise, eta: float = 0.85, eta_b: float = 1.0) -> Step:
    """Denoising diffusion restoration models, coordinate by coordinate of the SVD (DDRM; Kawar et al. 2022).

    with x0 = D(x, sigma), eps = (x - x0) / sigma, r_i = sigma_y / s_i and y_i = (U^T y)_i / s_i, in coordinates V^T x:
    s_i = 0        x'_i = x0_i + sigma' (sqrt(1 - eta^2) eps_i + eta z_i)
    sigma' <  r_i  x'_i = x0_i + sigma' (sqrt(1 - eta^2) (y_i - x0_i) / r_i + eta z_i)
    sigma' >= r_i  x'_i = (1 - eta_b) x0_i + eta_b y_i + sqrt(sigma'^2 - eta_b^2 r_i^2) z_i

    The paper is written in this coordinate, x0 + sigma eps. One call of D. Start from `ddrm_start`. Its samples are not the
    posterior's, and more steps bring them no nearer: below r_i each step pulls x_i towards y_i once more, and renews little of
    its noise. For N(0, 1), sigma_y = 0.5, y = 1.5 the posterior's variance is 0.2; eta = 0.85 gives 0.043 in 20 steps and
    0.002 in 1,000 (levels from 80 to 0.002 in equal ratios, then 0).
    Raises ValueError for an operator without an SVD, eta or eta_b outside [0, 1], and what `replacement` refuses.
    """
    check_share("eta", eta)
    check_share("eta_b", eta_b)
    spectrum = Spectrum(A, y, sigma_y, "ddrm")
    keep = math.sqrt(1 - eta**2)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        denoised = D(x, sigma)
        x0, y_bar, s, spread, level = spectrum.at(denoised, sigma_next)
        eps = spectrum.to(noise_in(x, denoised, sigma))
        z = noise(x0)  # a standard normal is one in any orthonormal basis
        towards = over(y_bar - x0, spread)  # (y_i - x0_i) / r_i, 0 where s_i = 0
        below = x0 + level * (keep * torch.where(s > 0, towards, eps) + eta * z)
        above = torch.lerp(x0, y_bar, eta_b) + (level**2 - (eta_b * spread) ** 2).clamp_min(0).sqrt() * z
        return spectrum.back(torch.where(level >= spread, above, below)), None

    return step


def ddrm_start(x: Tensor, sigma: Tensor, A: LinearOperator, y: Tensor, sigma_y: float) -> Tensor:
    """Where DDRM starts: x ~ N(0, sigma^2 I) moved to the measurement (Kawar et al. 2022).

    x_i <- y_i + sqrt(1 - r_i^2 / sigma^2) x_i where sigma >= r_i = sigma_y / s_i; other coordinates stay as they are.
    x (B, *shape); sigma 0-d or (B,), the grid's first level. Raises what `ddrm` raises of its problem.
    """
    spectrum = Spectrum(A, y, sigma_y, "ddrm_start")
    c, y_bar, _, spread, level = spectrum.at(x, sigma)
    return spectrum.back(torch.where(level >= spread, y_bar + (1 - (spread / level) ** 2).clamp_min(0).sqrt() * c, c))


def ddrm_jpeg(A: Operator, y: Tensor, noise: Noise, eta: float = 1.0, eta_b: float = 0.4) -> Step:
    """DDRM for JPEG, whose quantisation is no linear map: A(x) encodes, A.decode(y) decodes (Kawar et al. 2022, JPEG).

    x' = x0 + eta_b (decode(y) - decode(A(x0))) + sigma' ((1 - eta) eps + eta z),  x0 = D(x, sigma)

    As the authors' code has it: no square root over the shares of the noise, so that its variance is below sigma'^2 for
    0 < eta < 1. y (B or 1, *out). Raises ValueError for an operator without `decode`, and eta or eta_b outside [0, 1].
    """
    check_share("eta", eta)
    check_share("eta_b", eta_b)
    if not hasattr(A, "decode"):
        raise ValueError(
            f"A = {type(A).__name__} has no `decode`; expected an operator such as JPEG, or use ddrm for a linear one"
        )
    y = A.check_measurement(y)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        x0 = D(x, sigma)
        data = eta_b * (A.decode(for_batch(y, x)) - A.decode(A(x0)))
        kept = right(sigma_next, x) * (1 - eta) * noise_in(x, x0, sigma)
        return x0 + data + kept + eta * drawn(noise, x, sigma_next), None

    return step
