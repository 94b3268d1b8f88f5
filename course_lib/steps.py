"""How we move: each step is its equation, and knows only the Denoiser.

All are written in the course's coordinate, x = x0 + sigma eps. The variance-preserving chain of DDPM is
this chain scaled by 1 / sqrt(1 + sigma^2), so DDPM and DDIM are exact here, not approximations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from course_lib.integrals import ratio
from course_lib.schedules import Schedule
from course_lib.types import Denoiser, Noise, Step, right


def check_falling(sigma: Tensor, sigma_next: Tensor) -> None:
    """Raise ValueError where the level rises: a step that adds noise cannot invert."""
    if bool((sigma_next > sigma).any()):
        raise ValueError(
            f"sigma_next = {sigma_next.tolist()} is above sigma = {sigma.tolist()}; expected a falling grid: "
            "a stochastic step cannot invert, use ddim"
        )


def ddim(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
    """Deterministic DDIM: keep x0 and the direction of the noise, change its size (Song et al. 2021, Eq. 12, sigma_t = 0).

    x' = x0 + sigma' eps,  x0 = D(x, sigma),  eps = (x - x0) / sigma
    """
    x0 = D(x, sigma)
    return torch.lerp(x0, x, right(ratio(sigma, sigma_next), x)), None  # x0 + (sigma' / sigma) (x - x0), one pass over x


def ddim_eta(eta: float, noise: Noise) -> Step:
    """DDIM with fresh noise: eta = 0 is `ddim`, eta = 1 has DDPM's variance (Song et al. 2021, Eq. 12 and 16).

    x' = x0 + sqrt(sigma'^2 - s^2) eps + s z,  s = eta sigma' sqrt(1 - sigma'^2 / sigma^2),  z = noise(x)
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta = {eta}; expected a number from 0 (deterministic) to 1 (DDPM's variance)")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        if eta == 0:
            return ddim(D, x, sigma, sigma_next)
        check_falling(sigma, sigma_next)
        x0, rho = D(x, sigma), ratio(sigma, sigma_next)
        share = eta * (1 - rho**2).sqrt()
        s = share * sigma_next
        x_next = x0 + right(rho * (1 - share**2).sqrt(), x) * (x - x0)
        return (x_next + right(s, x) * noise(x) if bool((s > 0).any()) else x_next), None

    return step


def ddpm(noise: Noise, variance: str = "small") -> Step:
    """DDPM's ancestral step, Algorithm 2 (Ho et al. 2020), between any two levels.

    x' = x0 + (sigma'^2 / sigma^2) (x - x0) + s z: mean and 'small' variance of q(x' | x, x0),
    s^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2, which is beta-tilde (Eq. 7); 'large' is beta (Sec. 3.2),
    s^2 = (1 + sigma'^2) (sigma^2 - sigma'^2) / (1 + sigma^2). No noise is added in the step to sigma' = 0.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance = {variance!r}; expected 'small' (beta-tilde) or 'large' (beta)")

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        check_falling(sigma, sigma_next)
        x0 = D(x, sigma)
        rho2 = ratio(sigma, sigma_next) ** 2
        mean = x0 + right(rho2, x) * (x - x0)
        if not bool((sigma_next > 0).any()):
            return mean, None
        gap = sigma**2 - sigma_next**2
        s2 = rho2 * gap if variance == "small" else (1 + sigma_next**2) * gap / (1 + sigma**2)
        s = torch.where(sigma_next > 0, s2, 0.0).sqrt()
        return mean + right(s, x) * noise(x), None

    return step


def euler(schedule: Schedule) -> Step:
    """Euler's method for the probability-flow ODE in a schedule's own time and coordinates.

    x_t = alpha(t) x;  x_t' = x_t + (t' - t) (d alpha/dt x0 + d std/dt eps);  x' = x_t' / alpha(t')
    In sigma itself (alpha = 1, std = t) and in the flow's t this *is* `ddim`; in the VP time it is not.
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        t, t_next = schedule.t_of_sigma(sigma), schedule.t_of_sigma(sigma_next)
        for name, level, time in (("sigma", sigma, t), ("sigma_next", sigma_next, t_next)):
            if not torch.allclose(schedule.sigma(time), level.to(time), rtol=1e-6, atol=1e-9):
                raise ValueError(
                    f"{name} = {level.tolist()} is beyond the {schedule.name} schedule; expected a level that its time reaches"
                )
        x0 = D(x, sigma)
        eps = (x - x0) / right(torch.where(sigma > 0, sigma, 1.0), x)
        d_alpha, d_std = schedule.velocity(t)
        drift = right(d_alpha, x) * x0 + right(d_std, x) * eps
        moved = right(schedule.alpha(t), x) * x + right(t_next - t, x) * drift
        return torch.where(right(sigma, x) > 0, moved / right(schedule.alpha(t_next), x), x), None

    return step
