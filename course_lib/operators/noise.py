"""Noise of measurements, and a measurement in one call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from course_lib.operators.base import Operator


class GaussianNoise:
    """y = A(x) + std * eps with eps ~ N(0, I); `std` >= 0 in the units of the measurement, 0 for none."""

    def __init__(self, std: float):
        if not 0 <= std < math.inf:
            raise ValueError(f"std = {std:g}; expected a standard deviation >= 0, 0 for a measurement without noise")
        self.std = float(std)

    def __call__(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Add noise to clean measurements of any shape; numbers are drawn on the generator's device."""
        if self.std == 0:
            return clean
        eps = torch.randn(clean.shape, generator=generator, dtype=clean.dtype, device=_where(generator)).to(clean.device)
        return clean + self.std * eps

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """log N(y; clean, std^2 I) of each row, (B, ...) -> (B,); ValueError for std = 0, where there is no density."""
        if self.std == 0:
            raise ValueError("std = 0 has no density; expected std > 0, or a method for exact measurements")
        z = ((y - clean) / self.std).flatten(1)
        return -(z**2).sum(1) / 2 - z.shape[1] * math.log(self.std * math.sqrt(2 * math.pi))


class PoissonNoise:
    """y = N / rate + black with N ~ Poisson(rate * (clean - black)): counts of photons, put back on the scale of the measurement.

    rate    expected counts per unit of intensity, > 0: the noise has variance (clean - black) / rate
    black   the value at which no photon comes: 0 for intensities, -1 for pictures in [-1, 1]

    Raises ValueError for values below black, where the intensity would be negative.
    """

    def __init__(self, rate: float, black: float = 0.0):
        if not 0 < rate < math.inf:
            raise ValueError(f"rate = {rate:g}; expected a number of counts > 0 per unit of intensity")
        self.rate, self.black = float(rate), float(black)

    def _mean(self, clean: Tensor) -> Tensor:
        if bool((clean < self.black).any()):
            raise ValueError(
                f"clean has a value of {float(clean.min()):.4g}, a negative intensity; expected values >= black = {self.black:g} "
                "(black = -1 for pictures in [-1, 1])"
            )
        return self.rate * (clean - self.black)

    def __call__(self, clean: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw counts for clean measurements of any shape; numbers are drawn on the generator's device."""
        counts = torch.poisson(self._mean(clean).to(_where(generator)), generator=generator).to(clean)
        return counts / self.rate + self.black

    def log_prob(self, y: Tensor, clean: Tensor) -> Tensor:
        """log of the probability of the counts in each row, sum_i N_i log(m_i) - m_i - log(N_i!), (B, ...) -> (B,)."""
        mean, counts = self._mean(clean), self.rate * (y - self.black)
        if bool((counts < -0.5).any()):
            raise ValueError(
                f"y has a value of {float(y.min()):.4g}, a negative count; expected values >= black = {self.black:g}"
            )
        counts = counts.round()
        return (torch.xlogy(counts, mean) - mean - torch.lgamma(counts + 1)).flatten(1).sum(1)


def measure(
    A: Operator, x: Tensor, noise: GaussianNoise | PoissonNoise | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """y = A(x) with noise, (B, *shape) -> (B, *out); what the operator does not observe stays 0, without noise."""
    y = A(x)
    if noise is not None:
        y = noise(y, generator)
    return y if A.observed is None else torch.where(A.observed.to(y.device), y, 0.0)


def _where(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
