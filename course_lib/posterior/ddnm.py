"""Denoising diffusion null-space models: the range of A comes from y, its null space from D."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import over, ratio
from course_lib.operators.base import LinearOperator
from course_lib.posterior.checks import check_problem, for_batch
from course_lib.posterior.spectral import Spectrum
from course_lib.steps import check_falling
from course_lib.types import Denoiser, Noise, Step


def null_space(D: Denoiser, A: LinearOperator, y: Tensor) -> Denoiser:
    """Replace the range part of the estimate by the measurement's: a Denoiser for any step (DDNM; Wang et al. 2023).

    D'(x, sigma) = A^+ y + (I - A^+ A) D(x, sigma)

    A D' = y wherever y is in A's range, so the last step, which returns D', ends on the measurement. For y without noise; all
    of the noise of another y stays in the result, use `ddnm_plus`. y (B or 1, *out). Raises what `replacement` refuses.
    """
    y = check_problem(A, y, 0.0, "null_space")

    def projected(x: Tensor, sigma: Tensor) -> Tensor:
        x0 = D(x, sigma)
        return A.project(x0, for_batch(y, x))

    return projected


def ddnm_plus(A: LinearOperator, y: Tensor, sigma_y: float, noise: Noise) -> Step:
    """DDNM+: the range part moves towards a noisy y only as far as the step's own noise can hide (Wang et al. 2023, Eq. 17).

    In coordinates V^T x, with x0 = D(x, sigma), rho = sigma' / sigma, a = 1 - rho^2, s = sigma' sqrt(1 - rho^2) and
    r_i = sigma_y / s_i, y_i = (U^T y)_i / s_i:
    x'_i = a (x0_i + l_i (y_i - x0_i)) + rho^2 x_i + sqrt(s^2 - (a l_i r_i)^2) z_i,   l_i = min(1, s / (a r_i))

    This is `ddpm`'s step, whose noise of size s is made of the measurement's, a l_i r_i, and of fresh noise for the rest.
    sigma_y = 0 is `ddpm` on `null_space`. Where s < a r_i only a share of y comes in, and the samples are biased,
    as DDRM's are. One call of D. Raises ValueError for an operator without an SVD, and what `replacement`
    refuses.
    """
    spectrum = Spectrum(A, y, sigma_y, "ddnm_plus")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        rho2 = ratio(sigma, sigma_next) ** 2
        x0, y_bar, s_i, spread, a, s = spectrum.at(D(x, sigma), 1 - rho2, sigma_next * (1 - rho2).sqrt())
        measured = s_i > 0
        brought = torch.where(measured, a * spread, 0.0)  # the measurement's noise, were l = 1
        l = torch.where(brought > s, over(s, brought), 1.0) * measured
        mean = a * (x0 + l * (y_bar - x0)) + (1 - a) * spectrum.to(x)
        return spectrum.back(mean + (s**2 - (l * brought) ** 2).clamp_min(0).sqrt() * noise(x0)), None

    return step
