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
        # both maps are elementwise, so that the gradient of the sum has each derivative; a jvp is three times slower
        return torch.func.grad(lambda s: self.alpha(s).sum())(t), torch.func.grad(lambda s: self.std(s).sum())(t)


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
        _check_levels(sigma_min, sigma_max)
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

    def velocity(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(float64(t))
        return -one, one


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
# A grid of n steps is (n + 1,) float64 and falls; equal_information alone counts levels. `to_zero` takes sigma = 0 for the
# last level. Without it the last step ends where the grid would have had its lowest level, in a table at its first entry.


def uniform(schedule: Schedule, n: int, t_min: float | None = None, t_max: float | None = None, to_zero: bool = True) -> Tensor:
    """Levels at times spaced evenly from t_max down to t_min, then 0 (ScoreSDE, Song et al. 2021; DDPM's are `linspace`).

    Where sigma(t_min) is 0 itself it is the last level. Raises ValueError where no signal is left at t_max.
    """
    _check_steps(n)
    t_min = schedule.t_min if t_min is None else t_min
    t_max = schedule.t_max if t_max is None else t_max
    _check_signal(schedule, t_max)
    to_zero = to_zero and float(schedule.sigma(float64(t_min))) > 0
    levels = schedule.sigma(torch.linspace(t_max, t_min, n if to_zero else n + 1, dtype=F64))
    return _ended(levels) if to_zero else levels


def karras(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, to_zero: bool = True) -> Tensor:
    """EDM's levels, sigma^(1/rho) even from sigma_max down to sigma_min, then 0 (Karras et al. 2022, Eq. 5).

    In use for Stable Diffusion too, between the first and the last level of its table (k-diffusion, Crowson 2022).
    """
    return uniform(EDM(sigma_min, sigma_max, rho), n, to_zero=to_zero)


def exponential(n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, to_zero: bool = True) -> Tensor:
    """Levels with log sigma even from sigma_max down to sigma_min, then 0.

    The geometric levels of NCSN and of the VE SDE (Song and Ermon 2019, Sec. 4.1; Song et al. 2021, App. C), by
    k-diffusion's name. It is `karras` for rho -> infinity, and `log_snr` with its ends given in sigma.
    """
    _check_steps(n)
    _check_levels(sigma_min, sigma_max)
    ends = math.log(sigma_max), math.log(sigma_min)
    levels = torch.linspace(*ends, n if to_zero else n + 1, dtype=F64).exp()
    return _ended(levels) if to_zero else levels


def log_snr(schedule: Schedule, n: int, t_min: float | None = None, t_max: float | None = None, to_zero: bool = True) -> Tensor:
    """Levels with log SNR = -2 log sigma even from t_max down to t_min, then 0.

    DPM-Solver's grid for small pictures (Lu et al. 2022, Sec. 3.3), to t_min = 1e-3 or 1e-4 and not to 0; its code advises
    `uniform` for large ones. Raises ValueError where sigma is 0 at t_min or infinite at t_max.
    """
    t_min = schedule.t_min if t_min is None else t_min
    t_max = schedule.t_max if t_max is None else t_max
    _check_signal(schedule, t_max)
    low, high = schedule.sigma(torch.tensor([t_min, t_max], dtype=F64)).tolist()
    if low == 0:
        raise ValueError(
            f"t_min = {t_min} of the {schedule.name} schedule has no noise (log SNR is infinite); expected t_min > 0"
        )
    return exponential(n, low, high, to_zero)


def leading(table: Discrete, n: int, offset: int = 0, to_zero: bool = True, drop_lowest: bool = False) -> Tensor:
    """Levels of a table at t = offset + k floor(T / n), k = n - 1 ... 0, then 0 (Lin et al. 2024, Tab. 2).

    DDPM for n = T (Ho et al. 2020), and DDIM (Song et al. 2021); with offset 1 Stable Diffusion, versions 1 and 2 with
    to_zero=False, XL with 0. It starts below the last level of the table, although sampling starts from noise alone.
    drop_lowest: the upper n of n + 1 such times, as diffusers' DPM-Solver, DEIS and UniPC have them.
    """
    T, parts = _length(table, n, drop_lowest), n + drop_lowest
    times = offset + T // parts * torch.arange(parts - 1, parts - 1 - n, -1)
    if offset < 0 or times[0] >= T:
        raise ValueError(f"offset = {offset} leads to time {int(times[0])}; expected times from 0 to {T - 1}")
    return _at(table, times, to_zero)


def linspace(table: Discrete, n: int, to_zero: bool = True, drop_lowest: bool = False) -> Tensor:
    """Levels of a table at n times even from T - 1 down to 0, rounded, then 0 (Lin et al. 2024, Tab. 2).

    Improved DDPM (Nichol and Dhariwal 2021, Sec. 4). With drop_lowest, the upper n of n + 1 such times, DPM-Solver++ and
    UniPC on large pictures. diffusers' Euler, Heun and LMS do not round, and read sigma between the entries.
    """
    T, parts = _length(table, n, drop_lowest), n + drop_lowest
    # k (T - 1) is whole, so that a half is met exactly; steps of a rounded length lead to either side of it
    times = T - 1 - torch.arange(n, dtype=F64) * (T - 1) / max(parts - 1, 1)
    return _at(table, times.round(), to_zero)


def trailing(table: Discrete, n: int, to_zero: bool = True) -> Tensor:
    """Levels of a table at t = T - k T / n - 1, k = 0 ... n - 1, rounded, then 0 (Lin et al. 2024, Tab. 2).

    It starts at the last level for any n: their mend for `leading`, and the grid of few-step students such as SDXL-Turbo.
    """
    T = _length(table, n)
    return _at(table, (T - torch.arange(n, dtype=F64) * T / n).round() - 1, to_zero)


def equal_information(n: int, sigma_min: float, sigma_max: float = 80.0) -> Tensor:
    """n levels from sigma_max down to sigma_min, evenly spaced in log(1 + 1/sigma^2); (n,) float64, no level 0.

    log(1 + SNR) / 2 is what x tells about data of variance 1, in nats per number: each step reveals as much as any other.
    """
    if n < 2 or not 0 < sigma_min < sigma_max:
        got = f"n = {n}, sigma_min = {sigma_min}, sigma_max = {sigma_max}"
        raise ValueError(f"{got}; expected n >= 2 and 0 < sigma_min < sigma_max")
    ends = [math.log1p(sigma**-2) for sigma in (sigma_max, sigma_min)]
    return torch.expm1(torch.linspace(*ends, n, dtype=F64)).rsqrt()


def _ended(levels: Tensor) -> Tensor:
    return torch.cat([levels, levels.new_zeros(1)])


def _at(table: Discrete, times: Tensor, to_zero: bool) -> Tensor:
    """The table's levels at falling times, then 0 or the level at time 0."""
    if to_zero:
        return _ended(table.sigma(times))
    if times[-1] == 0:
        raise ValueError("to_zero = False, but the lowest time is 0 already; expected an offset, drop_lowest or fewer steps")
    return table.sigma(torch.cat([times, times.new_zeros(1)]))


def _length(table: Discrete, n: int, drop_lowest: bool = False) -> int:
    """T, the number of entries; ValueError where a table has fewer than n or, without the lowest, n + 1."""
    if not isinstance(table, Discrete):
        raise ValueError(f"table is a {type(table).__name__} schedule; expected a Discrete one, with an alpha_bar for each time")
    _check_steps(n)
    T = len(table.table)
    if n + drop_lowest > T:
        raise ValueError(f"n = {n}; expected at most {T - drop_lowest} steps in a table of {T} times")
    return T


def _check_steps(n: int) -> None:
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one step")


def _check_levels(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min = {sigma_min}, sigma_max = {sigma_max}; expected 0 < sigma_min < sigma_max")


def _check_signal(schedule: Schedule, t_max: float) -> None:
    if bool(schedule.alpha(float64(t_max)) < NO_SIGNAL):
        raise ValueError(
            f"t_max = {t_max} of the {schedule.name} schedule leaves no signal (sigma is infinite); expected t_max < {t_max}"
        )


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
