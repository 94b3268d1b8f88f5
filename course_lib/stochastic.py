"""Steps that add noise on the way: each solves the reverse SDE of x = x0 + sigma eps,

dx = 2 sigma^-1 (x - D(x, sigma)) dsigma + sqrt(2 sigma) dw,  sigma falling (Song et al. 2021, Eq. 6, for the VE SDE).

The variance-preserving forms are these scaled by alpha, so alpha appears nowhere. With D held constant over a step the
equation is linear and its solution is `ddpm`'s step, x' = x0 + rho^2 (x - x0) + sigma' sqrt(1 - rho^2) z, rho = sigma' / sigma:
first order. Euler ancestral sampling is `ddim_eta` in this coordinate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import ratio
from course_lib.singlestep import heun
from course_lib.steps import check_falling
from course_lib.types import Denoiser, Noise, Step, right


def _fall(sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """rho = sigma' / sigma, 1 where sigma = 0; ValueError where sigma rises."""
    check_falling(sigma, sigma_next)
    return ratio(sigma, sigma_next)


def _renew(x: Tensor, x0: Tensor, rho: Tensor, sigma_next: Tensor, z: Tensor | None) -> Tensor:
    """The reverse SDE's exact solution for a constant x0: x0 + rho^2 (x - x0) + sigma' sqrt(1 - rho^2) z."""
    mean = x0 + right(rho**2, x) * (x - x0)
    return mean if z is None else mean + right(sigma_next * (1 - rho**2).sqrt(), x) * z


def reverse_diffusion(noise: Noise) -> Step:
    """ScoreSDE's reverse diffusion predictor for the VE SDE (Song et al. 2021, App. E and Algorithm 2): Euler in sigma^2.

    x' = x0 + rho^2 (x - x0) + sqrt(sigma^2 - sigma'^2) z,  rho = sigma' / sigma
    The mean is `ddpm`'s and the variance larger by 1 / rho^2. As in Algorithm 2, noise is added in every step, also in
    the one to 0, which leaves x at x0 + sigma z there: let the grid end above 0.
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        rho = _fall(sigma, sigma_next)
        s = (sigma**2 - sigma_next**2).sqrt()
        return _renew(x, D(x, sigma), rho, sigma_next, None) + right(s, x) * noise(x), None

    return step


def edm_stochastic(
    noise: Noise, S_churn: float, steps: int, S_min: float = 0.0, S_max: float = math.inf, S_noise: float = 1.0
) -> Step:
    """EDM's stochastic sampler, Algorithm 2 (Karras et al. 2022): first raise the noise, then a step of Heun's method.

    gamma = min(S_churn / steps, sqrt(2) - 1) where S_min <= sigma <= S_max, else 0;  s = (1 + gamma) sigma
    x^ = x + S_noise sqrt(s^2 - sigma^2) z;  d = (x^ - D(x^, s)) / s;  x' = x^ + (sigma' - s) d
    x' <- x^ + (sigma' - s) (d + (x' - D(x', sigma')) / sigma') / 2, unless sigma' = 0

    `steps` is the number N of steps of the whole grid. Two calls of D, one in the step to 0. With S_churn = 0 this is
    Heun's method, and may walk a rising grid. Raises ValueError for options out of range.
    """
    for name, value, wanted in (("S_churn", S_churn, 0), ("steps", steps, 1), ("S_min", S_min, 0), ("S_noise", S_noise, 0)):
        if not value >= wanted:
            raise ValueError(f"{name} = {value}; expected a number >= {wanted}")
    largest = min(S_churn / steps, math.sqrt(2) - 1)

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        if largest > 0:
            _fall(sigma, sigma_next)
        s = torch.where((sigma >= S_min) & (sigma <= S_max), sigma * (1 + largest), sigma)
        lift = (s**2 - sigma**2).sqrt()
        if bool((lift > 0).any()):
            x = x + right(S_noise * lift, x) * noise(x)
        return heun(D, x, s, sigma_next)

    return step


def dpm_solver_pp_sde_2m(noise: Noise) -> Step:
    """SDE-DPM-Solver++(2M), with the last D as its memory (Lu et al. 2022, DPM-Solver++; diffusers' `midpoint`).

    x' = rho^2 x + (1 - rho^2) (D + (h / h_last) (D - D_last) / 2) + sigma' sqrt(1 - rho^2) z
    rho = sigma' / sigma,  h = log(sigma / sigma'),  h_last = log(sigma_last / sigma)
    The first step, and one to sigma' = 0, whose h is infinite, take D alone: that is `ddpm`'s step. One call of D.
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        rho = _fall(sigma, sigma_next)
        x0 = D(x, sigma)
        ahead = x0
        if memory is not None:
            x0_last, sigma_last = memory
            share = torch.where(sigma_next > 0, (sigma / sigma_next).log() / (sigma_last / sigma).log(), 0.0)
            ahead = x0 + right(torch.where(sigma < sigma_last, share, 0.0) / 2, x) * (x0 - x0_last)
        z = noise(x) if bool((sigma_next > 0).any()) else None
        return _renew(x, ahead, rho, sigma_next, z), (x0, sigma)

    return step


def dpm_solver_sde(noise: Noise, clock: str = "exact") -> Step:
    """Single-step second-order SDE solver: look at D halfway in log sigma, on the same Brownian path.

    m = sqrt(sigma sigma');  x_m = the `ddpm` step to m with z_m;  x' = the `ddpm` step from x to sigma' with D(x_m, m) and z
    z = sqrt(c) z_m + sqrt(1 - c) z_2: one path drives both, and shares c = (T(m) - T(sigma)) / (T(sigma') - T(sigma)).
    clock 'exact' takes T = 1 / sigma^2, the time of the path in this equation's solution: c = sigma' / (sigma + sigma').
    clock 'sigma' takes T = sigma as k-diffusion and diffusers' DPMSolverSDEScheduler do (Crowson 2022, `dpmpp_sde`):
    c = sqrt(sigma) / (sqrt(sigma) + sqrt(sigma')). Two calls of D, and one, without noise, in the step to sigma' = 0.
    """
    if clock not in ("exact", "sigma"):
        raise ValueError(f"clock = {clock!r}; expected 'exact' (1 / sigma^2) or 'sigma' (as diffusers)")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        rho, x0, moving = _fall(sigma, sigma_next), D(x, sigma), sigma_next > 0
        if not bool(moving.any()):
            return _renew(x, x0, rho, sigma_next, None), None
        middle = torch.where(moving, sigma * sigma_next, sigma**2).sqrt()
        z_m = noise(x)
        x_m = _renew(x, x0, torch.where(sigma > 0, middle / sigma, 1.0), middle, z_m)
        x0 = torch.where(right(sigma_next, x) > 0, D(x_m, middle), x0)
        c = rho / (1 + rho) if clock == "exact" else 1 / (1 + rho.sqrt())
        z = right(c.sqrt(), x) * z_m + right((1 - c).sqrt(), x) * noise(x)
        return _renew(x, x0, rho, sigma_next, z), None

    return step
