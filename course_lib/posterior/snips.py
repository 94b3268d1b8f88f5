"""Annealed Langevin dynamics on the posterior itself, in the SVD's coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.operators.base import LinearOperator
from course_lib.posterior.spectral import Spectrum
from course_lib.types import Denoiser, Noise, Step


def snips(A: LinearOperator, y: Tensor, sigma_y: float, noise: Noise, c: float = 0.033, steps: int = 3) -> Step:
    """SNIPS: `steps` Langevin moves on p(x | y) at each level, each coordinate with its own step size (Kawar et al. 2021).

    x_i <- x_i + c a_i score_i + sqrt(2 c a_i) z_i in coordinates V^T x, with r_i = sigma_y / s_i, y_i = (U^T y)_i / s_i:
    s_i = 0       score_i = eta_i,                                     a_i = sigma^2
    sigma <  r_i  score_i = eta_i + (y_i - x_i) / (r_i^2 - sigma^2),   a_i = sigma^2 (1 - sigma^2 / r_i^2)
    sigma >= r_i  score_i = (y_i - x_i) / (sigma^2 - r_i^2),           a_i = sigma^2 - r_i^2
    eta = V^T (D(x, sigma) - x) / sigma^2, the prior's score

    The noise of x and that of y are parts of each other, so y_i - x_i has the variance |r_i^2 - sigma^2|, and not the sum.
    Below the smallest r_i this is the exact score of p(x | y), so the samples approach the posterior of x0 as c falls, `steps`
    grows and the grid's last level above 0 falls. Above it, D sees other coordinates noisier than y knows them.
    Langevin runs at `sigma` and hands x on unchanged, so a grid ends with 0 to include its last level. `steps` calls of D.
    c is the paper's step size over the square of its last level, stable below 2. Raises ValueError for sigma_y = 0, by
    which it divides (use `ddrm` or `null_space`), an operator without an SVD, and what `replacement` refuses.
    """
    if sigma_y == 0:
        raise ValueError("sigma_y = 0; snips divides by it: expected sigma_y > 0, or use ddrm or null_space for an exact y")
    if not c > 0:
        raise ValueError(f"c = {c}; expected a number > 0, such as 0.033")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; expected a whole number >= 1")
    spectrum = Spectrum(A, y, sigma_y, "snips")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        x_i, y_i, _, r, level = spectrum.at(x, sigma)
        share = (level / r) ** 2  # 0 where nothing is measured
        a = torch.where(level < r, level**2 * (1 - share), level**2 - r**2)
        for _ in range(steps):
            pull = spectrum.to(D(spectrum.back(x_i), sigma)) - x_i  # sigma^2 eta
            # a_i score_i, multiplied out: the variance |r^2 - sigma^2| cancels, also where it is 0
            drift = torch.where(level < r, (1 - share) * pull + share * (y_i - x_i), y_i - x_i)
            x_i = x_i + c * drift + (2 * c * a).sqrt() * noise(x_i)
        return spectrum.back(x_i), None

    return step
