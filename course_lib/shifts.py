"""A schedule for another resolution: the same picture at twice the pixels a side hides twice the noise."""

from __future__ import annotations

import torch
from torch import Tensor

from course_lib.schedules import Flow, Schedule
from course_lib.types import float64


class Shifted(Schedule):
    """A schedule with sigma multiplied by `factor` at every time: log SNR(t) + 2 log(1 / factor).

    The mean of k x k pixels has their signal and 1 / k of their noise, so that a picture of d pixels a side, shown as large as
    one of d0, is as noisy at sigma d / d0 as that one at sigma: factor = d / d0 (Hoogeboom et al. 2023, Sec. 3.1). Variance
    preserving schedules stay so, and the straight line stays one, in the time t' = s t / (1 + (s - 1) t) of Stable Diffusion 3
    (Esser et al. 2024, Eq. 23, whose s is sqrt(m / n), m pixels for n). Raises ValueError for factor <= 0.
    """

    def __init__(self, schedule: Schedule, factor: float):
        if not factor > 0:
            raise ValueError(f"factor = {factor}; expected a number > 0, such as the ratio of two resolutions")
        self.base, self.factor = schedule, factor
        self.name = f"{schedule.name} shifted by {factor:g}"
        self.t_min, self.t_max, self.preserves_variance = schedule.t_min, schedule.t_max, schedule.preserves_variance

    def _total(self, alpha: Tensor, std: Tensor) -> Tensor:
        """What alpha and std are divided by, so that they keep to the schedule's own rule."""
        if self.preserves_variance:
            return (alpha**2 + std**2).sqrt()
        return alpha + std if isinstance(self.base, Flow) else torch.ones_like(alpha)

    def alpha(self, t: Tensor) -> Tensor:
        alpha = self.base.alpha(float64(t))
        return alpha / self._total(alpha, self.factor * self.base.std(float64(t)))

    def std(self, t: Tensor) -> Tensor:
        std = self.factor * self.base.std(float64(t))
        return std / self._total(self.base.alpha(float64(t)), std)

    def t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self.base.t_of_sigma(float64(sigma) / self.factor)
