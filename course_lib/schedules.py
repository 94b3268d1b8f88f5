"""Noise schedules: how much signal and how much noise at each time, and the grids that samplers walk.

The course has one coordinate, the noise-to-signal ratio `sigma`. A schedule also has coordinates of
its own, x_t = alpha(t) x0 + std(t) eps, and sigma(t) = std(t) / alpha(t), so that x_t / alpha(t) is
the course's x. For DDPM alpha^2 = alpha_bar and std^2 = 1 - alpha_bar.
"""

from __future__ import annotations

import difflib
import math

import torch
from torch import Tensor

from course_lib.types import float64, right

F64 = torch.float64
NO_SIGNAL = 1e-12  # below this alpha is rounding error


class Schedule:
    """A schedule x_t = alpha(t) x0 + std(t) eps. A subclass gives `alpha` and `std`; the rest is derived.

    All maps take and return float64 tensors of any shape. `t_min` and `t_max` bound the time; `preserves_variance`
    says whether alpha^2 + std^2 = 1.
    """

    name = "schedule"
    t_min, t_max = 0.0, 1.0
    preserves_variance = False

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at time t."""
        raise NotImplementedError(f"{type(self).__name__} must define alpha(t)")

    def std(self, t: Tensor) -> Tensor:
        """Scale of the noise at time t, in the schedule's own coordinates."""
        raise NotImplementedError(f"{type(self).__name__} must define std(t)")

    def sigma(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma(t) = std(t) / alpha(t), the course's coordinate."""
        return self.std(t) / self.alpha(t)

    def snr(self, t: Tensor) -> Tensor:
        """SNR(t) = alpha(t)^2 / std(t)^2 = 1 / sigma(t)^2 (VDM, Kingma et al. 2021, Eq. 2)."""
        return self.sigma(t) ** -2

    def log_snr(self, t: Tensor) -> Tensor:
        """log SNR(t) = -2 log sigma(t), in nats."""
        return -2 * self.sigma(t).log()

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        """The time at which sigma(t) = sigma, by bisection; clamped to [t_min, t_max]."""
        sigma = float64(sigma)
        low = torch.full_like(sigma, self.t_min)
        high = torch.full_like(sigma, self.t_max)
        for _ in range(80):  # halving 80 times exhausts float64
            middle = (low + high) / 2
            below = self.sigma(middle) < sigma
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def transition(self, t_prev: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Scale a and deviation b of one forward step, q(x_t | x_prev) = N(a x_prev, b^2).

        a = alpha(t) / alpha(t_prev),  b^2 = std(t)^2 - a^2 std(t_prev)^2 (VDM, Kingma et al. 2021, Eq. 20).
        For DDPM a^2 = 1 - beta and b^2 = beta (Ho et al. 2020, Eq. 2).
        """
        a = self.alpha(t) / self.alpha(t_prev)
        return a, (self.std(t) ** 2 - (a * self.std(t_prev)) ** 2).clamp_min(0).sqrt()

    def add_noise(self, x0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + std(t) eps, in the schedule's own coordinates. x0, eps (B, ...); t 0-d or (B,)."""
        t = float64(t)
        return right(self.alpha(t), x0) * x0 + right(self.std(t), x0) * eps

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Time derivatives (d alpha / dt, d std / dt), by automatic differentiation."""
        t = float64(t)
        d_alpha = torch.func.jvp(self.alpha, (t,), (torch.ones_like(t),))[1]
        d_std = torch.func.jvp(self.std, (t,), (torch.ones_like(t),))[1]
        return d_alpha, d_std


class VariancePreserving(Schedule):
    """alpha^2 = alpha_bar, std^2 = 1 - alpha_bar; a subclass gives log alpha_bar(t)."""

    preserves_variance = True

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log of the signal's share of the variance, at most 0."""
        raise NotImplementedError(f"{type(self).__name__} must define log_alpha_bar(t)")

    def alpha_bar(self, t: Tensor) -> Tensor:
        """The signal's share of the variance: prod_{s <= t} (1 - beta_s) in DDPM."""
        return self.log_alpha_bar(float64(t)).exp()

    def alpha(self, t: Tensor) -> Tensor:
        return (self.log_alpha_bar(float64(t)) / 2).exp()

    def std(self, t: Tensor) -> Tensor:
        return (-torch.expm1(self.log_alpha_bar(float64(t)))).sqrt()


class Linear(VariancePreserving):
    """DDPM's linear beta in continuous time: alpha_bar(t) = exp(-beta_min t - (beta_max - beta_min) t^2 / 2).

    Song et al. 2021, Eq. 29 and 32 (the VP SDE), with beta_min = 0.1 and beta_max = 20.
    """

    name = "linear"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return -self.beta_min * t - (self.beta_max - self.beta_min) * t**2 / 2

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        level = torch.log1p(float64(sigma) ** 2)  # = -log alpha_bar
        t = 2 * level / (self.beta_min + (self.beta_min**2 + 2 * slope * level).sqrt())
        return t.clamp(self.t_min, self.t_max)


class Cosine(VariancePreserving):
    """alpha_bar(t) = cos^2(pi/2 (t + s)/(1 + s)) / cos^2(pi/2 s/(1 + s)), Nichol and Dhariwal 2021, Eq. 17."""

    name = "cosine"

    def __init__(self, s: float = 0.008):
        self.s = s

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        angle = (t + self.s) / (1 + self.s) * math.pi / 2
        start = math.log(math.cos(self.s / (1 + self.s) * math.pi / 2))
        return (2 * (angle.cos().log() - start)).clamp_max(0)  # rounding must not give more than all signal

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        cos = math.cos(self.s / (1 + self.s) * math.pi / 2) / (1 + float64(sigma) ** 2).sqrt()
        return (cos.acos() * 2 / math.pi * (1 + self.s) - self.s).clamp(self.t_min, self.t_max)


class EDM(Schedule):
    """No scaling: alpha = 1, and sigma^(1/rho) is linear in t from sigma_min to sigma_max (Karras et al. 2022, Eq. 5)."""

    name = "edm"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0):
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; expected 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(float64(t))

    def std(self, t: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return (low + float64(t) * (high - low)) ** self.rho

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return ((float64(sigma) ** (1 / self.rho) - low) / (high - low)).clamp(self.t_min, self.t_max)


class Flow(Schedule):
    """A straight line from data to noise: alpha = 1 - t, std = t (rectified flow, Liu et al. 2023, Eq. 1).

    At t = 1 no signal is left and sigma is infinite: start samplers at a large finite sigma.
    """

    name = "flow"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - float64(t)

    def std(self, t: Tensor) -> Tensor:
        return float64(t)

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return 1 - 1 / (1 + float64(sigma))  # 1 at sigma = infinity


class Discrete(VariancePreserving):
    """A trained table of alpha_bar at t = 0 ... T - 1, read between the entries by interpolating log sigma.

    `rounding=True` reads the nearest entry instead (samplers that keep to the trained times).
    """

    def __init__(self, betas: Tensor, name: str = "discrete", rounding: bool = False):
        betas = torch.as_tensor(betas, dtype=F64)
        if betas.ndim != 1 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"betas has shape {tuple(betas.shape)} and range [{betas.min():.3g}, {betas.max():.3g}]; "
                "expected one number in (0, 1) per step"
            )
        self.name, self.betas, self.rounding = name, betas, rounding
        self.table = torch.cumprod(1 - betas, 0)  # alpha_bar, (T,)
        self.t_max = float(len(betas) - 1)
        self._log_sigmas = (1 / self.table - 1).log() / 2

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        log_sigma = _interpolate(float64(t), torch.arange(len(self.table), dtype=F64), self._log_sigmas)
        return -torch.nn.functional.softplus(2 * log_sigma)  # log 1 / (1 + sigma^2)

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        t = _interpolate(float64(sigma).log(), self._log_sigmas, torch.arange(len(self.table), dtype=F64))
        return t.round() if self.rounding else t


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs rising, held constant beyond the ends; differentiable in x."""
    x = x.clamp(xs[0], xs[-1])
    right_end = torch.searchsorted(xs, x.detach().contiguous()).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right_end - 1], xs[right_end], ys[right_end - 1], ys[right_end]
    return y0 + (x - x0) / (x1 - x0) * (y1 - y0)


# --- tables of beta, as published -------------------------------------------------------------------


def linear_betas(T: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """DDPM (Ho et al. 2020, Sec. 4): beta rises linearly; (T,) float64."""
    return torch.linspace(first, last, T, dtype=F64)


def scaled_linear_betas(T: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Stable Diffusion (Rombach et al. 2022): the square root of beta rises linearly; (T,) float64."""
    return torch.linspace(first**0.5, last**0.5, T, dtype=F64) ** 2


def cosine_betas(T: int = 1000, s: float = 0.008, largest: float = 0.999) -> Tensor:
    """Improved DDPM (Nichol and Dhariwal 2021, Sec. 3.2): betas of the cosine alpha_bar, clipped; (T,) float64."""
    alpha_bar = Cosine(s).alpha_bar(torch.arange(T + 1, dtype=F64) / T)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(largest)


# --- grids: the noise levels that a sampler visits ---------------------------------------------------


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's n levels from sigma_max down to sigma_min, then 0: (n + 1,) float64 (Karras et al. 2022, Eq. 5)."""
    return uniform(EDM(sigma_min, sigma_max, rho), n)


def uniform(schedule: Schedule, n: int, t_min: float | None = None, t_max: float | None = None) -> Tensor:
    """The levels of n times spaced evenly from t_max down to t_min, then 0: (n + 1,) float64."""
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one step")
    t_min = schedule.t_min if t_min is None else t_min
    t_max = schedule.t_max if t_max is None else t_max
    if n == 1:
        t_min = t_max
    times = torch.linspace(t_max, t_min, n, dtype=F64)
    if bool(schedule.alpha(times[0]) < NO_SIGNAL):
        raise ValueError(
            f"t_max = {t_max} of the {schedule.name} schedule leaves no signal (sigma is infinite); expected t_max < {t_max}"
        )
    levels = schedule.sigma(times)
    if levels[-1] == 0:  # the schedule itself ends at 0: spread n + 1 times instead
        return schedule.sigma(torch.linspace(t_max, t_min, n + 1, dtype=F64))
    return torch.cat([levels, torch.zeros(1, dtype=F64)])


def equal_information(n: int, sigma_min: float, sigma_max: float = 80.0) -> Tensor:
    """n levels from sigma_max down to sigma_min, evenly spaced in log(1 + 1/sigma^2); (n,) float64, no level 0.

    log(1 + SNR) / 2 is what x tells about data of variance 1, in nats per number: each step reveals as much as any other.
    """
    if n < 2 or not 0 < sigma_min < sigma_max:
        got = f"n = {n}, sigma_min = {sigma_min}, sigma_max = {sigma_max}"
        raise ValueError(f"{got}; expected n >= 2 and 0 < sigma_min < sigma_max")
    ends = [math.log1p(sigma**-2) for sigma in (sigma_max, sigma_min)]
    return torch.expm1(torch.linspace(*ends, n, dtype=F64)).rsqrt()


CONTINUOUS = {schedule.name: schedule for schedule in (Linear, Cosine, EDM, Flow)}
TABLES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas}


def get(name: str) -> Schedule:
    """Return the continuous schedule of this name: linear, cosine, edm or flow."""
    if name not in CONTINUOUS:
        near = difflib.get_close_matches(name, CONTINUOUS, n=1)
        raise ValueError(
            f"schedule = {name!r}; expected one of {', '.join(CONTINUOUS)}" + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return CONTINUOUS[name]()
