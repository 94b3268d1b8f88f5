"""Annealed Langevin dynamics on the posterior, with a likelihood that is annealed as the prior is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from course_lib.integrals import over
from course_lib.operators.base import Operator
from course_lib.posterior.data_term import check_slope, towards
from course_lib.types import Denoiser, Noise, Step, right


def csgm(A: Operator, y: Tensor, sigma_y: float, noise: Noise, c: float = 0.1, steps: int = 3, gamma: float = 1.0) -> Step:
    """Langevin moves on the noised prior times an annealed likelihood, `steps` of them at each level (CSGM; Jalal et al. 2021).

    x <- x + a (s + A^T (y - A x) / (sigma_y^2 + gamma_t^2)) + sqrt(2 a) z,  a = c sigma^2,  s = (D(x, sigma) - x) / sigma^2

    gamma_t = gamma sigma (the paper leaves it open): |A| sigma is how far A x is at most from A x0 with x = x0 + sigma eps. At
    high levels this is no noised posterior, which is no such product; as sigma falls it becomes the posterior of x0, so the
    samples approach it as c and the last level above 0 fall and `steps` grows. Stable for c (1 + |A|^2 / gamma^2) < 2.
    Langevin runs at `sigma` and hands x on unchanged, so a grid ends with 0 to include its last level. `steps` calls of D; A
    linear or differentiable, y (B or 1, *out). Raises ValueError for c <= 0, steps < 1, gamma < 0, gamma = 0 with sigma_y = 0,
    an operator without a gradient, a y that it cannot have measured, and sigma_y < 0.
    """
    y = check_slope(A, y, sigma_y, "csgm")
    if not c > 0:
        raise ValueError(f"c = {c}; expected a number > 0, such as 0.1")
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps = {steps!r}; expected a whole number >= 1")
    if not (gamma >= 0 and gamma + sigma_y > 0):
        raise ValueError(f"gamma = {gamma} with sigma_y = {sigma_y}; expected gamma >= 0, and above 0 for an exact y")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        share = c * over(sigma**2, sigma_y**2 + (gamma * sigma) ** 2)
        for _ in range(steps):
            drift = c * (D(x, sigma) - x) + right(share, x) * towards(A, y, x)
            x = x + drift + right((2 * c) ** 0.5 * sigma, x) * noise(x)
        return x, None

    return step
