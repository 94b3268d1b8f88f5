"""ScoreSDE's three forward SDEs, dx = f(x, t) dt + g(t) dw, in their own coordinates x_t = alpha(t) x0 + std(t) eps.

Each is a `Schedule` too, so that its grids, its sigma(t) = std / alpha and `steps.euler` are at hand; x = x_t / alpha(t) is
the course's coordinate. All times lie in [0, 1]; f, g, alpha and std are exact and in float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from course_lib.schedules import Linear, Schedule
from course_lib.types import Denoiser, Noise, Step, float64, right


class SDE(Schedule):
    """dx = rate(t) x dt + g(t) dw, with marginals N(alpha(t) x0, std(t)^2) (Song et al. 2021, Sec. 3 and App. B).

    A subclass gives `rate`, `diffusion`, alpha and std; every drift below follows. x_t is (B, ...), t is 0-d or (B,).
    """

    prior_std = 1.0
    """Deviation of the Gaussian from which sampling starts at t = 1."""

    def rate(self, t: Tensor) -> Tensor:
        """f(x, t) / x: all three drifts are linear."""
        raise NotImplementedError(f"{type(self).__name__} must define rate(t)")

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        raise NotImplementedError(f"{type(self).__name__} must define diffusion(t)")

    def drift(self, x_t: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t) of the forward SDE."""
        return right(self.rate(t), x_t) * x_t

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean alpha(t) x0 and deviation std(t) of x_t given x0 (Song et al. 2021, Eq. 29)."""
        return right(self.alpha(t), x0) * x0, self.std(t)

    def score(self, D: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x_t) = (alpha D(x_t / alpha, sigma) - x_t) / std^2, by Tweedie's formula."""
        alpha, std = right(self.alpha(t), x_t), right(self.std(t), x_t)
        return (alpha * D(x_t / alpha, self.sigma(t)) - x_t) / std**2

    def reverse_drift(self, D: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
        """f - g^2 score, the drift of the reverse-time SDE (Song et al. 2021, Eq. 6); its diffusion is g."""
        return self.drift(x_t, t) - right(self.diffusion(t) ** 2, x_t) * self.score(D, x_t, t)

    def flow_drift(self, D: Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
        """f - g^2 score / 2, the drift of the probability-flow ODE, which has the same marginals (Song et al. 2021, Eq. 13)."""
        return self.drift(x_t, t) - right(self.diffusion(t) ** 2 / 2, x_t) * self.score(D, x_t, t)

    def move(self, x_t: Tensor, t: Tensor | float, t_next: Tensor | float, noise: Noise, D: Denoiser | None = None) -> Tensor:
        """One Euler-Maruyama step: x_t + (t' - t) drift + g sqrt|t' - t| z; forward without D, under D the reverse SDE.

        Raises ValueError where the direction is not the SDE's: t' > t without D, t' < t with it.
        """
        t, t_next = float64(t), float64(t_next)
        if bool(((t_next < t) if D is None else (t_next > t)).any()):
            way = "rise (the forward SDE)" if D is None else "fall (the reverse SDE)"
            raise ValueError(f"t = {t.tolist()}, t_next = {t_next.tolist()}; expected the time to {way}")
        drift = self.drift(x_t, t) if D is None else self.reverse_drift(D, x_t, t)
        spread = self.diffusion(t) * (t_next - t).abs().sqrt()
        return x_t + right(t_next - t, x_t) * drift + right(spread, x_t) * noise(x_t)


class VP(SDE, Linear):
    """Variance preserving: f = -beta x / 2, g^2 = beta, beta(t) = beta_min + t (beta_max - beta_min).

    alpha^2 = alpha_bar = exp(-integral of beta), std^2 = 1 - alpha_bar (Song et al. 2021, Eq. 11, 29 and 32).
    """

    name = "vp"

    def beta(self, t: Tensor) -> Tensor:
        """beta(t), per unit of time."""
        return self.beta_min + float64(t) * (self.beta_max - self.beta_min)

    def rate(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()


class SubVP(VP):
    """sub-VP: VP's drift, and less noise: g^2 = beta (1 - alpha_bar^2), std = 1 - alpha_bar (Song et al. 2021, Eq. 12 and 29).

    Its variance is the square of VP's, so at most VP's; g falls to 0 at t = 0.
    """

    name = "subvp"
    preserves_variance = False

    def std(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.log_alpha_bar(float64(t)))

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(2 * self.log_alpha_bar(float64(t)))).sqrt()

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        # sigma = (1 - alpha^2) / alpha = 2 sinh(-log alpha), and VP's sigma at that alpha is sqrt(1 / alpha^2 - 1)
        level = 2 * torch.asinh(float64(sigma) / 2)  # = -log alpha_bar
        return super().t_of_sigma(torch.expm1(level).sqrt())


class VE(SDE):
    """Variance exploding: f = 0, g = std sqrt(2 log(sigma_max / sigma_min)), std(t) = sigma_min (sigma_max / sigma_min)^t.

    Song et al. 2021, Eq. 9, 29 and 30. std(0) is sigma_min and not 0: the paper's sigma jumps there, and x at t = 0 is data
    with noise of deviation sigma_min. The prior N(0, sigma_max^2) leaves out the data's own variance.
    """

    name = "ve"

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; expected 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std, self._range = sigma_max, math.log(sigma_max / sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(float64(t))

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self._range * float64(t)).exp()

    def rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(float64(t))

    def diffusion(self, t: Tensor) -> Tensor:
        return self.std(t) * math.sqrt(2 * self._range)

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return ((float64(sigma) / self.sigma_min).log() / self._range).clamp(self.t_min, self.t_max)


def euler_maruyama(sde: SDE, noise: Noise) -> Step:
    """Euler-Maruyama for the reverse SDE in its own time and coordinates, as a Step (Song et al. 2021, Eq. 6).

    x_t = alpha(t) x;  x_t' = x_t + (t' - t) (f - g^2 score) + g sqrt(t - t') z;  x' = x_t' / alpha(t')
    Raises ValueError for a level outside of the SDE's range, or one that rises.
    """

    def step(D: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor, memory: Any = None) -> tuple[Tensor, Any]:
        t, t_next = sde.t_of_sigma(sigma), sde.t_of_sigma(sigma_next)
        for name, level, time in (("sigma", sigma, t), ("sigma_next", sigma_next, t_next)):
            if not torch.allclose(sde.sigma(time), float64(level), rtol=1e-6, atol=1e-9):
                raise ValueError(
                    f"{name} = {level.tolist()} is beyond the {sde.name} SDE; expected a level that its time reaches"
                )
        moved = sde.move(right(sde.alpha(t), x) * x, t, t_next, noise, D)
        return moved / right(sde.alpha(t_next), x), None

    return step
