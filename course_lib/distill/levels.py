"""Which noise levels score distillation asks about, and how much each counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from course_lib.schedules import Schedule
from course_lib.types import float64

Weight = Callable[[Tensor], Tensor]
"""`weight(sigma)`: w of `w(sigma) (eps_hat - eps)`, of the shape of sigma, float64."""
Levels = Callable[[float, int, torch.Generator], Tensor]
"""`levels(progress, rows, generator)`: sigma of each row, (rows,) float64; progress runs from 0 to 1."""


# --- weights -------------------------------------------------------------------------------------------------------------


def one(sigma: Tensor) -> Tensor:
    """w = 1."""
    return torch.ones_like(sigma)


def dreamfusion(sigma: Tensor) -> Tensor:
    """w = sigma^2 / (1 + sigma^2): sigma_t^2 = 1 - alpha_bar of a variance-preserving process (Poole et al. 2023, Sec. 3.2)."""
    return sigma**2 / (1 + sigma**2)


def of_score(sigma: Tensor) -> Tensor:
    """w = sigma: the gradient is sigma^2 times a score, D_fake - D_real itself, of one size at all levels where D is far off."""
    return sigma


# --- draws ---------------------------------------------------------------------------------------------------------------


def uniform_times(schedule: Schedule, low: float = 0.02, high: float = 0.98, end: float | None = None) -> Levels:
    """Times uniform between the shares `low` and `high` of the schedule's range, as levels sigma.

    With `end` the upper share falls evenly from `high` to `end` (Wang, Lu et al. 2023 fall in one step, from 0.98 to 0.5).
    Raises ValueError unless 0 < low < high <= 1 and low < end.
    """
    last = high if end is None else end
    if not (0 < low < high <= 1 and low < last <= 1):
        raise ValueError(f"low = {low}, high = {high}, end = {end}; expected 0 < low < high <= 1 and end above low, at most 1")

    def levels(progress: float, rows: int, generator: torch.Generator) -> Tensor:
        top = high + (last - high) * progress
        share = low + (top - low) * torch.rand(rows, generator=generator, dtype=torch.float64)
        return float64(schedule.sigma(share * schedule.t_max))

    return levels


def log_uniform(low: float, high: float) -> Levels:
    """log sigma uniform between log low and log high, all the time. Raises ValueError unless 0 < low < high."""
    _check(low, high)

    def levels(progress: float, rows: int, generator: torch.Generator) -> Tensor:
        return low * (high / low) ** torch.rand(rows, generator=generator, dtype=torch.float64)

    return levels


def falling(high: float, low: float, spread: float = 1.0) -> Levels:
    """sigma falls geometrically from `high` to `low`; each row's is log-uniform within a factor `spread` below that.

    Raises ValueError unless 0 < low < high and spread >= 1.
    """
    _check(low, high)
    if spread < 1:
        raise ValueError(f"spread = {spread}; expected a factor of at least 1")

    def levels(progress: float, rows: int, generator: torch.Generator) -> Tensor:
        now = high * (low / high) ** progress
        return now * torch.exp(-math.log(spread) * torch.rand(rows, generator=generator, dtype=torch.float64))

    return levels


def _check(low: float, high: float) -> None:
    if not 0 < low < high:
        raise ValueError(f"low = {low}, high = {high}; expected 0 < low < high")
