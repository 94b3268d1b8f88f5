"""Rules that forget: each step is an integral from sigma to sigma' with two or three evaluations of D.

Written in x = x0 + sigma eps, lambda = -log sigma, h = log(sigma / sigma'), where the scale alpha of the papers cancels.
All take rising grids that start above 0 (inversion: h < 0). At sigma' = 0, where lambda is infinite, each falls back to
its first-order step, x' = D, and one evaluation, as the published algorithms do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import log_step, noise_in, ratio
from course_lib.types import Denoiser, Step, right


def _between(sigma: Tensor, sigma_next: Tensor, r: float) -> Tensor:
    """The level at lambda + r h, sigma^(1-r) sigma'^r."""
    return sigma ** (1 - r) * sigma_next**r


def _inside(sigma_next: Tensor) -> Tensor:
    """1, and 0 where sigma' = 0: there a step has no inner level."""
    return (sigma_next > 0).to(sigma_next)


def _check_fraction(name: str, r: float, low: float = 0.0) -> None:
    if not low < r <= 1:
        raise ValueError(f"{name} = {r}; expected a fraction of the step, above {low:g} and at most 1")


def heun(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
    """EDM's deterministic sampler: Heun's rule in sigma (Karras et al. 2022, Algorithm 1 with sigma(t) = t, s(t) = 1).

    x^ = x + (sigma' - sigma) d,  x' = x + (sigma' - sigma) (d + d') / 2,  d = eps(x, sigma),  d' = eps(x^, sigma').
    Order 2, two evaluations; Euler's step x' = x^ where sigma' = 0, as in Algorithm 1, with one.
    """
    d = noise_in(x, D(x, sigma), sigma)
    length = sigma_next - sigma
    x_next = torch.addcmul(x, right(length, x), d)
    if not bool((sigma_next > 0).any()):
        return x_next, None
    change = noise_in(x_next, D(x_next, sigma_next), sigma_next) - d
    return torch.addcmul(x_next, right(length * _inside(sigma_next) / 2, x), change), None


def dpm_solver_2(r1: float = 0.5) -> Step:
    """DPM-Solver-2: the noise, taken at a level inside the step (Lu et al. 2022, DPM-Solver, Algorithm 1 at r1 = 1/2).

    u = x - s1 (e^{r1 h} - 1) eps,  x' = x - sigma' (e^h - 1) (eps + (eps(u, s1) - eps) / (2 r1)),  s1 at lambda + r1 h.
    Order 2, two evaluations. Raises ValueError where r1 is not in (0, 1].
    """
    _check_fraction("r1", r1)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        eps, length = noise_in(x, D(x, sigma), sigma), right(sigma_next - sigma, x)  # sigma' (e^h - 1) = sigma - sigma'
        if not bool((sigma_next > 0).any()):
            return x + length * eps, None
        s1 = _between(sigma, sigma_next, r1)
        u = x + right(s1 - sigma, x) * eps
        change = noise_in(u, D(u, s1), s1) - eps
        return x + length * (eps + right(_inside(sigma_next) / (2 * r1), x) * change), None

    return step


def dpm_solver_3(r1: float = 1 / 3, r2: float = 2 / 3) -> Step:
    """DPM-Solver-3: two levels inside the step (Lu et al. 2022, DPM-Solver, Algorithm 2).

    u1 = x - s1 (e^{r1 h} - 1) eps,                                    D1 = eps(u1, s1) - eps
    u2 = x - s2 (e^{r2 h} - 1) eps - s2 (r2 / r1) phi(r2 h) D1,        D2 = eps(u2, s2) - eps
    x' = x - sigma' (e^h - 1) eps - sigma' phi(h) D2 / r2,             phi(h) = (e^h - 1) / h - 1
    Order 3 with r2 = 2/3, else 2; three evaluations. Raises ValueError unless 0 < r1 < r2 <= 1.
    """
    _check_fraction("r1", r1)
    _check_fraction("r2", r2, r1)

    def phi(h: Tensor) -> Tensor:
        return (h.expm1() / h - 1).nan_to_num(0.0)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        eps = noise_in(x, D(x, sigma), sigma)
        first_order = x + right(sigma_next - sigma, x) * eps
        if not bool((sigma_next > 0).any()):
            return first_order, None
        h, s1, s2 = log_step(sigma, sigma_next), _between(sigma, sigma_next, r1), _between(sigma, sigma_next, r2)
        u1 = x + right(s1 - sigma, x) * eps
        D1 = noise_in(u1, D(u1, s1), s1) - eps
        u2 = x + right(s2 - sigma, x) * eps - right(s2 * phi(r2 * h) * r2 / r1, x) * D1
        D2 = noise_in(u2, D(u2, s2), s2) - eps
        return first_order - right(sigma_next * phi(h) / r2, x) * D2, None

    return step


def dpm_solver_pp_2s(r: float = 0.5) -> Step:
    """DPM-Solver++(2S): the clean sample, taken at a level inside the step (Lu et al. 2022, DPM-Solver++, Algorithm 1).

    u = (s/sigma) x + (1 - s/sigma) D,  D_bar = (1 - 1/(2r)) D + D(u, s) / (2r),  x' = (sigma'/sigma) x - (e^-h - 1) D_bar,
    s at lambda + r h. Order 2, two evaluations. Raises ValueError where r is not in (0, 1].
    """
    _check_fraction("r", r)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        D_bar, keep = D(x, sigma), ratio(sigma, sigma_next)
        if bool((sigma_next > 0).any()):
            s = _between(sigma, sigma_next, r)
            inside = ratio(sigma, s)
            u = right(inside, x) * x + right(1 - inside, x) * D_bar
            D_bar = D_bar + right(_inside(sigma_next) / (2 * r), x) * (D(u, s) - D_bar)
        return right(keep, x) * x + right(1 - keep, x) * D_bar, None

    return step
